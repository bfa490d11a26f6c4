"""What a recipe leaves open, decided by the data."""

import math
from typing import Any

from ..config import TextEncoderConfig, TrainingConfig
from ..pipelines.loading import class_of
from .data import BridgePairs, PictureDataset
from .families import Own, family_of

# sides up to this many pixels: patch size and channel multipliers
SHAPES = (
    (16, 1, [1, 2]),
    (32, 2, [1, 2, 2]),
    (64, 2, [1, 2, 3]),
    (128, 4, [1, 2, 3]),
    (256, 4, [1, 2, 3, 4]),
    (math.inf, 4, [1, 2, 3, 4, 4]),
)
PIXELS_OF_LATENT = 8
TOKENS_OF_WORD, MOST_TOKENS = 2, 77
# up to this many pictures: base channels
WIDTHS = ((2_000, 48), (20_000, 64), (200_000, 96), (math.inf, 128))


def complete_recipe(
    config: TrainingConfig, pictures: PictureDataset | BridgePairs, captions: list[str], processes: int = 1
) -> TrainingConfig:
    """
    The recipe with steps instead of passes and, where it neither starts from a pipeline nor describes them, a text encoder for
    data that have captions, and a network; where it starts from one of Diffusers, with the objective that this learned by, and
    text encoders that stay as they are.

    Raises:
        ValueError: for a text encoder that was asked for and data without captions, and for an objective that is not that of
            the pipeline.
    """
    changes: dict[str, Any] = {}
    if config.epochs is not None:
        seen = config.epochs * len(pictures)
        changes = {"max_steps": math.ceil(seen / (config.batch_size * processes)), "epochs": None}
    if config.init_from is not None:
        family = family_of(config)
        if config.train_text_encoder is None and family is not Own:
            changes["train_text_encoder"] = False
        if family.objective == "flow_matching" != config.objective:
            if "objective" in config.model_fields_set:
                name = class_of(config.init_from)
                raise ValueError(f"objective={config.objective!r}, but a {name} learned a flow; it needs 'flow_matching'")
            changes["objective"] = family.objective
    else:
        text = changes["text_encoder"] = _text_encoder(config, captions)
        if not config.model:
            changes["model"] = derive_model(config, pictures, text)
    return config.model_copy(update=changes)


def _text_encoder(config: TrainingConfig, captions: list[str]) -> TextEncoderConfig | None:
    """The recipe's; where it says nothing, one that reads the longest caption, or none for data without captions."""
    if config.text_encoder is None:
        return None
    longest = max((len(text.split()) for text in captions), default=0)
    if "text_encoder" in config.model_fields_set:
        if not longest:
            raise ValueError("text_encoder needs captions, but no picture has one; set text_encoder: null")
        return config.text_encoder
    tokens = min(max(TextEncoderConfig().max_length, TOKENS_OF_WORD * longest + 2), MOST_TOKENS)
    return TextEncoderConfig(max_length=tokens) if longest else None


def derive_model(config: TrainingConfig, pictures: PictureDataset | BridgePairs, text: TextEncoderConfig | None) -> dict:
    """
    Arguments of ``AtlasUNet2DModel``: patches and levels by the resolution, widths by the number of pictures, attention in the
    deeper half of the levels, to captions too where there are some, and classes where there are labels.
    """
    d = config.dataset
    # of an autoencoder the recipe only says where it is; those of Stable Diffusion make latents of 8 pixels
    seen = d.resolution if config.vae is None else d.resolution // PIXELS_OF_LATENT
    patch, multipliers = next((patch, list(mult)) for side, patch, mult in SHAPES if seen <= side)
    while len(multipliers) > 1 and seen % (patch * 2 ** (len(multipliers) - 1) * 2 ** (config.num_resolutions - 1)):
        multipliers.pop()
    count = math.inf if d.streaming else len(pictures)
    levels = list(range((len(multipliers) + 1) // 2, len(multipliers))) or [0]
    width = next(width for most, width in WIDTHS if count <= most)
    model = {
        "base_channels": width, "channel_mult": multipliers, "num_res_blocks": 1, "attention_levels": levels, "num_heads": 4,
        "patch_size": patch, "norm_num_groups": 16,
    }  # fmt: skip
    if text is not None:
        model |= {"cross_attention_levels": [*levels], "addition_embed_type": "text"}
    if d.label_column is not None and not d.streaming:
        model["num_class_embeds"] = pictures.classes()
    return model
