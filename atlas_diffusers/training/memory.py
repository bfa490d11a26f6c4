"""How much memory a training step needs, found without running it."""

import weakref
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from ..config import TrainingConfig
from .networks import new_network

FLOAT = 4


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that are made within it, and their greatest sum at any time, also on the meta device."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._known = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
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
        unet = new_network(config).train()
        if config.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        size = config.micro_batch_size or config.batch_size
        shape = (size, unet.config.in_channels, config.dataset.resolution, config.dataset.resolution)
        labels = None if unet.config.num_class_embeds is None else torch.zeros(size, dtype=torch.long)
        with LiveBytes() as live:
            output = unet(torch.empty(shape), torch.zeros(size), class_labels=labels).sample
            output.square().mean().backward()
        count = sum(p.numel() for p in unet.parameters())
    return TrainingMemory(parameters=count, state=4 * FLOAT * count, step=live.peak)
