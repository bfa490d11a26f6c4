"""Low-rank adapters on a frozen pipeline, by PEFT, in Diffusers' file format."""

import re
from pathlib import Path
from typing import Any

import torch

import atlas_diffusers

from ..config import LoRAConfig
from .family import Components


def add_adapters(components: Components, config: LoRAConfig) -> None:
    """
    Freeze the networks and give them adapters ``W + (α/r) B A``, with A random and B zero.

    Raises:
        ValueError: for target modules that a network does not have, adapters for text encoders that are not there, patterns
            that no adapter has, and a pipeline that could not load adapters.
    """
    if components.pipeline is not None and not hasattr(components.pipeline, "save_lora_weights"):
        name = type(components.pipeline).__name__
        raise ValueError(f"lora: Diffusers' {name} has no load_lora_weights; leave out lora to train all weights")
    networks = components.networks
    if config.text_encoder_modules and list(networks.values()) == [components.unet]:
        names = config.text_encoder_modules
        raise ValueError(f"lora.text_encoder_modules={names}, but the pipeline has no text encoder that could have adapters")
    used = set()
    for module in networks.values():
        network: Any = module
        network.requires_grad_(False)
        if targets := config.target_modules if network is components.unet else config.text_encoder_modules:
            known = [layer for layer, _ in network.named_modules()]
            if missing := [target for target in targets if not any(f".{layer}".endswith(f".{target}") for layer in known)]:
                raise ValueError(f"lora: {type(network).__name__} has no modules named {missing}")
            adapted = [layer for layer in known if any(f".{layer}".endswith(f".{target}") for target in targets)]
            # as PEFT reads them, which warns of others
            fitting = {p for p in config.rank_pattern if any(re.match(rf"(.*\.)?({p})$", layer) for layer in adapted)}
            network.add_adapter(config.peft(targets, fitting))
            used |= fitting
    if unused := sorted(set(config.rank_pattern) - used):
        raise ValueError(f"lora.rank_pattern: no module with an adapter matches {unused}")


def write_adapters(folder: Path, components: Components, networks: dict[str, torch.nn.Module], dtype: torch.dtype) -> None:
    """Write ``pytorch_lora_weights.safetensors`` as the pipeline loads it, with ranks and scales."""
    from peft import get_peft_model_state_dict

    arguments: dict[str, Any] = {}
    for name, network in networks.items():
        configurations: dict[str, Any] | None = getattr(network, "peft_config", None)
        if configurations:
            state = get_peft_model_state_dict(network)
            arguments[f"{name}_lora_layers"] = {key: value.to(dtype).contiguous() for key, value in state.items()}
            arguments[f"{name}_lora_adapter_metadata"] = configurations["default"].to_dict()
    pipeline = atlas_diffusers.AtlasPipeline if components.pipeline is None else type(components.pipeline)
    pipeline.save_lora_weights(folder, **arguments)
