"""Low-rank adapters on a frozen pipeline, by PEFT, in Diffusers' file format."""

from pathlib import Path

import torch

from ..config import LoRAConfig


def add_adapters(unet: torch.nn.Module, text_encoder: torch.nn.Module | None, config: LoRAConfig) -> None:
    """
    Freeze the networks and give them adapters ``W + (α/r) B A``, with A random and B zero.

    Raises:
        ValueError: for target modules that a network does not have, or adapters for a text encoder that is not there.
    """
    if config.text_encoder_modules and text_encoder is None:
        raise ValueError(f"lora.text_encoder_modules={config.text_encoder_modules}, but the pipeline has no text encoder")
    for network, modules in ((unet, config.target_modules), (text_encoder, config.text_encoder_modules)):
        if network is None:
            continue
        network.requires_grad_(False)
        if modules:
            names = [f".{name}" for name, _ in network.named_modules()]
            missing = [module for module in modules if not any(name.endswith(f".{module}") for name in names)]
            if missing:
                raise ValueError(f"lora: {type(network).__name__} has no modules named {missing}")
            network.add_adapter(config.peft(modules))


def write_adapters(folder: Path, networks: dict[str, torch.nn.Module], dtype: torch.dtype) -> None:
    """Write ``pytorch_lora_weights.safetensors`` of ``unet`` and ``text_encoder``, with their ranks and scales."""
    from peft import get_peft_model_state_dict

    import atlas_diffusers

    arguments = {}
    for name, network in networks.items():
        if getattr(network, "peft_config", None):
            state = get_peft_model_state_dict(network)
            arguments[f"{name}_lora_layers"] = {key: value.to(dtype).contiguous() for key, value in state.items()}
            arguments[f"{name}_lora_adapter_metadata"] = network.peft_config["default"].to_dict()
    atlas_diffusers.AtlasPipeline.save_lora_weights(folder, **arguments)
