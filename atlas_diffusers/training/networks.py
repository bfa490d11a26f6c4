"""What a recipe trains: new networks, or those of a pipeline, and the noise process."""

import copy
from typing import Any

import torch
from diffusers.training_utils import cast_training_params
from diffusers.utils import logging

from .. import models
from ..conditioning import build_text_encoder, build_tokenizer
from ..config import TrainingConfig
from ..models.network import AtlasNetwork
from ..pipelines.prompts import reads_text
from .families import Own, family_of
from .family import Components
from .lora import add_adapters
from .losses import loss_weighting
from .objective_table import objective_class
from .sections import build_section, load_autoencoder, pixels_of_latent

logger = logging.get_logger(__name__)
UNREAD_CAPTIONS = (
    "the network does not read captions: give model.cross_attention_levels, such as [1], or train without prompts by "
    "text_encoder: null"
)
NETWORKS: dict[str, type[AtlasNetwork]] = {name: getattr(models, name) for name in models.NETWORKS}


def build_components(config: TrainingConfig, captions: list[str]) -> Components:
    """
    In float32; the weights of new ones depend on ``config.seed`` alone.

    Raises:
        ValueError: for a scheduler that does not exist, adapters for modules that do not, arguments that networks and
            schedulers do not have or that are out of range, a resolution or labels that the network cannot take, and captions
            that it does not read.
    """
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        if config.init_from is None:
            components = _new_components(config, captions)
        else:
            components = family_of(config).load(config)
        if config.lora is not None:
            add_adapters(components, config.lora)
    _choose_scheduler(components, config)
    _freeze(components, config)
    if config.gradient_checkpointing:
        components.unet.enable_gradient_checkpointing()
    if config.num_resolutions > 1:
        components.unet.register_to_config(num_resolutions=config.num_resolutions)
    _check_sizes(components, config)
    if config.cache_latents and components.vae is None:
        raise ValueError(f"cache_latents: the pipeline init_from={config.init_from!r} has no autoencoder")
    if config.cache_text_embeddings and components.text_encoder is None:
        raise ValueError("cache_text_embeddings: there is no text encoder")
    _check_text(components, config)
    if config.bridge_passes:
        components.backward_unet = copy.deepcopy(components.unet)
    return components


def _choose_scheduler(components: Components, config: TrainingConfig) -> None:
    """The noise process; a pipeline of Diffusers keeps its own scheduler unless another one, or process, is asked for."""
    start = {} if config.init_from is None else (components.pipeline or components).scheduler.config
    components.scheduler = objective_class(config).build_scheduler(config, start)
    asked = config.scheduler is not None or config.objective != components.family.objective
    if components.pipeline is not None and asked:
        components.pipeline.scheduler = components.scheduler


def _freeze(components: Components, config: TrainingConfig) -> None:
    """Leave gradients to what trains, in float32, and put the rest in evaluation mode."""
    for module in components.others:
        module.requires_grad_(False).eval()
    for module in components.networks.values():
        trains = module is components.unet or config.trains_text_encoder
        module.train(trains)
        if not trains:
            module.requires_grad_(False)
    cast_training_params(list(components.networks.values()))


def check_recipe(config: TrainingConfig) -> None:
    """Raise ``ValueError`` for what can be known to be wrong of networks and noise process without data or weights."""
    if config.init_from is None and config.model and config.vae is None:
        with torch.device("meta"):
            network = new_network(config)
        if config.text_encoder is not None and not reads_text(network.config):
            _check_captions(config)
    objective_class(config).build_scheduler(config, {})
    if config.loss_weighting is not None:
        loss_weighting(**config.loss_weighting)


def _check_captions(config: TrainingConfig) -> None:
    """A network that reads no captions is wrong where there are some, which data of one's own may not have."""
    if "text_encoder" in config.model_fields_set or config.dataset.name.startswith("embedded:"):
        raise ValueError(UNREAD_CAPTIONS)
    logger.warning(f"if the data have captions: {UNREAD_CAPTIONS}")


def side_multiple(components: Components, config: TrainingConfig) -> int:
    """What must divide the sides of pictures, at the largest of the resolutions."""
    return components.family.side_multiple(components) * 2 ** (config.num_resolutions - 1)


def _check_sizes(components: Components, config: TrainingConfig) -> None:
    d, unet, multiple = config.dataset, components.unet.config, side_multiple(components, config)
    if d.resolution % multiple:
        raise ValueError(f"dataset.resolution={d.resolution} must be a multiple of {multiple} for this network")
    if components.pipeline is not None:
        return _check_pictures(components, config)
    if components.vae is None and d.channels != unet.in_channels:
        raise ValueError(f"dataset.channels={d.channels}, but the network has in_channels={unet.in_channels}")
    if components.vae is not None and components.vae.config.latent_channels != unet.in_channels:
        latents = components.vae.config.latent_channels
        raise ValueError(f"the autoencoder has {latents} channels, but the network has in_channels={unet.in_channels}")
    if (d.label_column is None) != (unet.get("num_class_embeds") is None):
        raise ValueError(
            f"dataset.label_column={d.label_column!r} and num_class_embeds={unet.get('num_class_embeds')}: give both or neither"
        )


def _check_pictures(components: Components, config: TrainingConfig) -> None:
    """Of a pipeline of Diffusers: its autoencoder reads colours, and it takes no labels."""
    d, channels, name = config.dataset, components.vae.config.in_channels, type(components.pipeline).__name__
    if d.channels != channels:
        raise ValueError(f"dataset.channels={d.channels}, but the autoencoder has in_channels={channels}")
    if d.label_column is not None:
        raise ValueError(f"dataset.label_column={d.label_column!r}, but {name} takes no labels")


def _check_text(components: Components, config: TrainingConfig) -> None:
    if config.lora is not None and not config.samples and not components.unet.config.get("guidance_embeds"):
        config.refuse(["guidance_scale"], "of adapters whose network is told no guidance, in a run that makes no pictures")
    if components.pipeline is not None:
        return
    takes_text = components.text_encoder is not None and reads_text(components.unet.config)
    if components.text_encoder is not None and not takes_text:
        raise ValueError(UNREAD_CAPTIONS)
    if config.sample_prompts and not takes_text:
        raise ValueError(f"sample_prompts={config.sample_prompts}, but the network takes no text")
    if not takes_text and config.dataset.label_column is None:
        config.refuse(["caption_dropout"], "without captions or labels")
    if components.text_encoder is None:
        config.refuse(["train_text_encoder"], "of a pipeline without text encoder")


def _new_components(config: TrainingConfig, captions: list[str]) -> Components:
    tokenizer = text_encoder = None
    if (t := config.text_encoder) is not None:
        tokenizer = build_tokenizer(captions, t.vocab_size, t.max_length)
        text_encoder = build_text_encoder(tokenizer, t.hidden_size, t.num_layers, t.num_heads)
    vae = None if config.vae is None else load_autoencoder(config.vae)
    return Components(new_network(config, vae), text_encoder, tokenizer, vae, None, Own)


def new_network(config: TrainingConfig, vae: Any = None) -> AtlasNetwork:
    """
    The network that a recipe describes; sizes that it does not give are those of the data, or of an autoencoder's latents, and
    of the text encoder.
    """
    d, name = config.dataset, config.model.get("_class_name", "AtlasUNet2DModel")
    if name not in NETWORKS:
        raise ValueError(f"model._class_name={name!r} is unknown; allowed are {sorted(NETWORKS)}")
    channels = d.channels if vae is None else vae.config.latent_channels
    size = {"sample_size": d.resolution // pixels_of_latent(vae), "in_channels": channels, "out_channels": channels}
    arguments = {**size, **config.model}
    arguments.pop("_class_name", None)
    if config.text_encoder is not None:
        arguments.setdefault("cross_attention_dim", config.text_encoder.hidden_size)
    return build_section(NETWORKS[name], arguments, "model")
