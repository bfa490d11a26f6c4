"""How much memory a training step needs, found without running it."""

import weakref
from typing import Any, NamedTuple, cast

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers import CLIPTextModel

from ..config import TrainingConfig
from ..models.network import AtlasNetwork
from .family import Components
from .networks import new_network
from .sections import pixels_of_latent

FLOAT = 4


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that are made within it, and their greatest sum at any time, also on the meta device."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._known = weakref.WeakSet()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        # what comes from outside, such as a weight, is not made here, and nor are its views
        tree_map_only(torch.Tensor, lambda tensor: self._known.add(tensor.untyped_storage()), args)
        result = function(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._count, result)
        return result

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage not in self._known:
            self._known.add(storage)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._free, storage.nbytes())

    def _free(self, size: int) -> None:
        self.now -= size


class TrainingMemory(NamedTuple):
    """Bytes: ``state`` (weights, averages, both moments) stays; ``step`` is the most that a step adds, with gradients."""

    parameters: int
    state: int
    step: int

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return self.state + self.step


def estimate_memory(config: TrainingConfig) -> TrainingMemory:
    """
    Memory of a step of a recipe with new networks and labels or no conditions, in float32 throughout: an upper bound for mixed
    precision. What a library keeps for itself (a CUDA context, workspaces of convolutions) is not in it.

    Raises:
        ValueError: for a recipe with ``init_from`` or a text encoder.
    """
    if config.init_from is not None or config.text_encoder is not None:
        raise ValueError("memory is estimated for recipes with new networks and text_encoder: null")
    with torch.device("meta"):
        return _step_memory(config, new_network(config))


def memory_of(config: TrainingConfig, components: Components) -> TrainingMemory:
    """The same for networks that are there, of which all weights train, with captions where there is a text encoder."""
    with torch.device("meta"):
        unet = cast(AtlasNetwork, type(components.unet).from_config(components.unet.config))
        text_encoder = components.text_encoder
        text_encoder = None if text_encoder is None else type(text_encoder)(text_encoder.config)
        if text_encoder is not None:
            text_encoder.requires_grad_(config.trains_text_encoder)
        return _step_memory(config, unet, text_encoder, pixels_of_latent(components.vae))


def _step_memory(
    config: TrainingConfig, unet: AtlasNetwork, text_encoder: CLIPTextModel | None = None, factor: int = 1
) -> TrainingMemory:
    """On the meta device; ``factor`` pixels are a latent."""
    unet.train()
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    size, side = config.micro_batch_size or config.batch_size, config.dataset.resolution // factor
    classes, states = unet.config.get("num_class_embeds"), None
    labels = None if classes is None else torch.zeros(size, dtype=torch.long)
    with LiveBytes() as live:
        if text_encoder is not None:
            ids = torch.zeros(size, text_encoder.config.max_position_embeddings, dtype=torch.long)
            states = text_encoder(ids).last_hidden_state
        inputs = torch.empty(size, unet.config.in_channels, side, side), torch.zeros(size), states
        # the first pass of a diffusion fits two such networks at once
        drifts = [unet] * (2 if config.bridge_passes else 1)
        torch.stack([drift(*inputs, class_labels=labels).sample.square().mean() for drift in drifts]).sum().backward()
    networks = [*drifts, *([] if text_encoder is None else [text_encoder])]
    every = [p for network in networks for p in network.parameters()]
    trained = sum(p.numel() for p in every if p.requires_grad)
    frozen = sum(p.numel() for p in every) - trained
    return TrainingMemory(parameters=trained + frozen, state=FLOAT * (4 * trained + frozen), step=live.peak)
