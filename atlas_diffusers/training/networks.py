"""What a recipe trains: new networks, or those of a pipeline, and the noise process."""

from dataclasses import dataclass

import torch

import atlas_diffusers

from ..conditioning import build_text_encoder, build_tokenizer
from ..config import TrainingConfig
from ..models import AtlasUNet2DModel
from .data import PictureDataset
from .lora import add_adapters


@dataclass
class Networks:
    """Parts of a pipeline; ``text_encoder``, ``tokenizer`` and ``vae`` may be ``None``."""

    unet: torch.nn.Module
    text_encoder: torch.nn.Module | None
    tokenizer: object | None
    vae: torch.nn.Module | None
    scheduler: object


def build_networks(config: TrainingConfig, dataset: PictureDataset) -> Networks:
    """
    In float32; the weights of new ones depend on ``config.seed`` alone.

    Raises:
        ValueError: for a scheduler that does not exist, adapters for modules that do not, and arguments of networks out of
            range.
    """
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        if config.init_from is None:
            networks, process = _new_networks(config, dataset), {}
        else:
            start = atlas_diffusers.AtlasPipeline.from_pretrained(config.init_from, dtype=torch.float32)
            networks = Networks(start.unet, start.text_encoder, start.tokenizer, start.vae, None)
            process = start.scheduler.config
        if config.lora is not None:
            add_adapters(networks.unet, networks.text_encoder, config.lora)
    if config.scheduler is None:
        networks.scheduler = atlas_diffusers.AtlasDDIMScheduler.from_config(process)
    else:
        networks.scheduler = scheduler_from_dict(config.scheduler)
    if networks.vae is not None:
        networks.vae.requires_grad_(False)
    if config.gradient_checkpointing:
        networks.unet.enable_gradient_checkpointing()
    networks.unet.to(memory_format=torch.channels_last)
    return networks


def _new_networks(config: TrainingConfig, dataset: PictureDataset) -> Networks:
    arguments = {"sample_size": config.dataset.resolution, **config.model}
    tokenizer = text_encoder = None
    if (t := config.text_encoder) is not None:
        tokenizer = build_tokenizer(dataset.captions(), t.vocab_size, t.max_length)
        text_encoder = build_text_encoder(tokenizer, t.hidden_size, t.num_layers, t.num_heads)
        arguments.setdefault("cross_attention_dim", t.hidden_size)
    return Networks(AtlasUNet2DModel.from_config(arguments), text_encoder, tokenizer, None, None)


def scheduler_from_dict(config: dict):
    """A scheduler from its configuration; ``_class_name`` names one of this package's classes."""
    name = config.get("_class_name", "AtlasDDIMScheduler")
    if name not in atlas_diffusers.SCHEDULERS:
        raise ValueError(f"scheduler._class_name={name!r} is unknown; allowed are {atlas_diffusers.SCHEDULERS}")
    return getattr(atlas_diffusers, name)(**{k: v for k, v in config.items() if k != "_class_name"})
