"""How the predictions for a condition, and for none, become one."""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from ..schedules import NoiseLevel

Conditions = Mapping[str, torch.Tensor | None]  # by the name of the network's argument, (batch, ...) each
Predict = Callable[[torch.Tensor, Conditions], torch.Tensor]
Level = Callable[[torch.Tensor], NoiseLevel]


class Guidance(Protocol):
    """
    Combines predictions: called with ``predict(x, conditions)``, the network's input, the timestep, the conditions, those that
    stand for none (``None`` where there is no guidance), and the level of the timestep as a function.
    """

    def __call__(
        self,
        predict: Predict,
        x: torch.Tensor,
        timestep: torch.Tensor,
        conditions: Conditions,
        unconditional: Conditions | None,
        level: Level,
    ) -> torch.Tensor: ...


@dataclass(frozen=True)
class ClassifierFreeGuidance:
    r"""
    ``m = m_∅ + w (m_c − m_∅)``, both terms in one network call (Ho & Salimans 2022, arXiv 2207.12598).

    Args:
        scale: w; at 1 only ``m_c`` is computed.
        rescale: share of m rescaled to the standard deviation of ``m_c`` (Lin et al. 2023, arXiv 2305.08891).
        interval: lowest and highest σ̂ = σ/α with guidance (Kynkäänniemi et al. 2024, arXiv 2404.07724); elsewhere ``m_c``.

    Raises:
        ValueError: for a scale that is no number, a share outside [0, 1], and an interval that is none.
    """

    scale: float = 1.0
    rescale: float = 0.0
    interval: tuple[float, float] | None = None

    def __post_init__(self):
        if not math.isfinite(self.scale):
            raise ValueError(f"guidance_scale={self.scale}; expected a finite number")
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"guidance_rescale={self.rescale}; expected a number in [0, 1]")
        if self.interval is not None and not 0 <= self.interval[0] <= self.interval[1]:
            raise ValueError(f"guidance_interval={self.interval}; expected (lowest, highest) noise level, 0 or above")

    def __call__(
        self,
        predict: Predict,
        x: torch.Tensor,
        timestep: torch.Tensor,
        conditions: Conditions,
        unconditional: Conditions | None,
        level: Level,
    ) -> torch.Tensor:
        """The prediction for ``x``, as of :class:`Guidance`."""
        if unconditional is None or self.scale == 1 or not self._holds_at(level, timestep):
            return predict(x, conditions)
        both = {name: _joined(unconditional[name], value) for name, value in conditions.items()}
        without, conditional = predict(torch.cat([x] * 2), both).chunk(2)
        prediction = without + self.scale * (conditional - without)
        return rescale_noise_cfg(prediction, conditional, self.rescale) if self.rescale > 0 else prediction

    def _holds_at(self, level: Level, timestep: torch.Tensor) -> bool:
        return self.interval is None or self.interval[0] <= level(timestep).sigma_hat <= self.interval[1]


def _joined(without: torch.Tensor | None, value: torch.Tensor | None) -> torch.Tensor | None:
    return value if value is None or without is None else torch.cat([without, value])


class DiffusersGuidance:
    """
    A guider of ``diffusers.guiders``, in a copy of its own because it may keep state from step to step.

    Args:
        guider: any guider; ``guider.new()`` would lose arguments given by position, so it is copied.
        network: what the guider may hook.
        timesteps: of the whole call, in order.
    """

    def __init__(self, guider: Any, network: Any, timesteps: list[float]):
        self.guider, self.network, self.timesteps = copy.deepcopy(guider), network, timesteps
        self._next = 0

    def __call__(
        self,
        predict: Predict,
        x: torch.Tensor,
        timestep: torch.Tensor,
        conditions: Conditions,
        unconditional: Conditions | None,
        level: Level,
    ) -> torch.Tensor:
        """The prediction for ``x``, as of :class:`Guidance`."""
        step = self.timesteps.index(timestep.item(), self._next)
        self._next = step + 1
        self.guider.set_state(step=step, num_inference_steps=len(self.timesteps), timestep=timestep)
        without = {} if unconditional is None else unconditional
        pairs = {name: (value, without[name]) for name, value in conditions.items() if value is not None}
        batches = self.guider.prepare_inputs(pairs)
        for batch in batches:
            self.guider.prepare_models(self.network)
            batch.noise_pred = predict(x, {name: getattr(batch, name) for name in pairs})
            self.guider.cleanup_models(self.network)
        return self.guider(batches).pred
