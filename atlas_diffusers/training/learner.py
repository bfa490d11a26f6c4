"""What trains, as one module: strategies that split weights over processes take one."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor


class Learner(torch.nn.Module):
    """
    The networks that train, as one module, through which each of them is called.

    Args:
        networks: by name.
    """

    def __init__(self, networks: dict[str, torch.nn.Module]):
        super().__init__()
        for name, network in networks.items():
            self.add_module(name, network)
        classes = {type(module).__name__ for module in self.modules()}
        blocks = [name for network in networks.values() for name in getattr(network, "_no_split_modules", None) or ()]
        # what Accelerate splits one by one where the launch names no classes
        self._no_split_modules = [name for name in dict.fromkeys(blocks) if name in classes]

    def forward(self, network: str, *args: Any, **kwargs: Any) -> Any:
        """What a network says."""
        return self.get_submodule(network)(*map(_opened, args), **{name: _opened(value) for name, value in kwargs.items()})


@dataclass(frozen=True)
class Sealed:
    """A tensor that a strategy does not see."""

    value: torch.Tensor


def _sealed(value: Any) -> Any:
    """Timesteps would be rounded, as all that a module is called with is, to the precision of split weights."""
    is_of_pictures = isinstance(value, torch.Tensor) and value.ndim == 1 and value.is_floating_point()
    return Sealed(value) if is_of_pictures else value


def _opened(value: Any) -> Any:
    return value.value if isinstance(value, Sealed) else value


class Called:
    """A network that is called through the learner, as the accelerator prepared it."""

    def __init__(self, learner: Any, name: str):
        self.learner, self.name = learner, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.learner(self.name, *map(_sealed, args), **{name: _sealed(value) for name, value in kwargs.items()})


def plain_name(name: str) -> str:
    """Of a weight, without what wrappers add."""
    return name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")


def hollow_copy(network: torch.nn.Module) -> torch.nn.Module:
    """A copy whose weights are on the meta device and take no memory."""
    weights = {id(p): torch.nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in network.parameters()}
    return copy.deepcopy(network, weights)


@torch.no_grad()
def fill(hollow: torch.nn.Module, weights: dict[str, torch.Tensor], device: torch.device) -> None:
    """Give a hollow copy its weights, gathered from all processes where they are split; every process must call it."""
    gathered = {name: whole(weight.detach().to(device)) for name, weight in weights.items()}
    hollow.load_state_dict({**hollow.state_dict(), **gathered}, assign=True)


def drain(hollow: torch.nn.Module) -> None:
    """Take the weights from a copy that :func:`fill` filled; buffers stay."""
    weights = {name: torch.empty_like(weight, device="meta") for name, weight in hollow.named_parameters()}
    hollow.load_state_dict({**hollow.state_dict(), **weights}, assign=True)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that may be split, gathered from all processes; every process must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
