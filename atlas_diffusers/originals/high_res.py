"""The score network under the name and the configuration of the original toolkit."""

from typing import Any

from ..config import HighResModelConfig
from ..models.unet_atlas import AtlasUNet2DModel

OWN = ("conditional", "context_dim", "lora", "use_checkpointing")


def HighResLatentScoreModel(config: HighResModelConfig | None = None, **fields: Any) -> AtlasUNet2DModel:
    """
    An :class:`AtlasUNet2DModel` from a :class:`~atlas_diffusers.config.HighResModelConfig`, or from its fields.

    Raises:
        ValueError: for fields that are wrong, or given beside a configuration.
    """
    if config is not None and fields:
        raise ValueError(f"give a configuration or fields, not both: {sorted(fields)}")
    config = config or HighResModelConfig(**fields)
    arguments = config.model_dump(exclude=set(OWN))
    if config.conditional:
        arguments["cross_attention_dim"] = config.context_dim
    else:
        arguments["cross_attention_levels"] = []
    model = AtlasUNet2DModel(**arguments)
    if config.use_checkpointing:
        model.enable_gradient_checkpointing()
    if config.lora is not None:
        model.add_adapter(config.lora.peft(config.lora.target_modules))
    return model


build_highres_score_model = HighResLatentScoreModel
