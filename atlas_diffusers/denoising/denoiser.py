"""From a network and its conditions to predictions."""

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch

from .guidance import ClassifierFreeGuidance, Conditions, Guidance
from .process import SchedulerProcess
from .tiles import Tiles


@dataclass(frozen=True)
class Denoiser:
    """
    A network's predictions for the samples of a scheduler, ``denoiser(x, t)``.

    Args:
        network: a UNet or transformer of Diffusers, or anything called as ``network(x, t, **conditions, **options)``; gives a
            tensor, a tuple, or an output with ``sample``.
        process: of the scheduler whose samples are denoised.
        conditions: arguments of the network with one row a sample.
        unconditional: the same for "no condition", needed by guidance.
        options: further arguments of the network, the same at every call.
        guidance: combines predictions with and without the condition.
        tiles: the network sees these parts of a sample, one after the other.
        batch_size: most samples in one network call (twice as many with guidance); all by default.
        context: entered around every network call, such as a LoRA scale.
    """

    network: Callable[..., Any]
    process: SchedulerProcess
    conditions: Conditions = field(default_factory=dict)
    unconditional: Conditions | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    guidance: Guidance = ClassifierFreeGuidance()
    tiles: Tiles | None = None
    batch_size: int | None = None
    context: Callable[[], AbstractContextManager] = nullcontext

    def __call__(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """
        The prediction for ``x``, (batch, ...), at timestep t, a scalar.

        Raises:
            ValueError: for a network that gives another shape.
        """
        inputs = self.process.network_input(x, t)
        if len(x) <= (self.batch_size or len(x)):
            return self._prediction(inputs, t) if len(x) else x
        parts = torch.arange(len(x), device=x.device).split(self.batch_size)
        return torch.cat([self.part(rows)._prediction(inputs[rows], t) for rows in parts])

    def part(self, rows: torch.Tensor | slice) -> "Denoiser":
        """The denoiser of some samples of the batch."""
        unconditional = None if self.unconditional is None else _rows_of(self.unconditional, rows)
        return replace(self, conditions=_rows_of(self.conditions, rows), unconditional=unconditional)

    def _prediction(self, inputs: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        def call(x: torch.Tensor, conditions: Conditions) -> torch.Tensor:
            with self.context():
                found = call_network(self.network, x, t, {**conditions, **self.options})
            if found.shape != x.shape and not self.process.predicts_variance:
                raise ValueError(f"the model gives {tuple(found.shape)} for a sample of {tuple(x.shape)}")
            return found

        def predict(x: torch.Tensor) -> torch.Tensor:
            return self.guidance(call, x, t, self.conditions, self.unconditional, self.process.level)

        return predict(inputs) if self.tiles is None else self.tiles.blend(predict, inputs)


def call_network(network: Callable[..., Any], x: torch.Tensor, t: torch.Tensor, arguments: Mapping[str, Any]) -> torch.Tensor:
    """What a network of any kind makes of ``x`` at t; Diffusers' transformers take both by name, and one t a sample."""
    if _is_transformer(type(getattr(network, "_orig_mod", network))):
        result = network(hidden_states=x, timestep=t.expand(len(x)), **arguments)
    else:
        result = network(x, t, **arguments)
    if torch.is_tensor(result):
        return result
    return result[0] if isinstance(result, tuple) else result.sample


@lru_cache
def _is_transformer(cls: type) -> bool:
    forward = getattr(cls, "forward", None)
    return forward is not None and {"hidden_states", "timestep"} <= set(inspect.signature(forward).parameters)


def _rows_of(conditions: Conditions, rows: torch.Tensor | slice) -> Conditions:
    return {name: value if value is None else value[rows] for name, value in conditions.items()}
