"""The angle of a noise level, in which few-step sampling is nearly linear, and the velocities along it."""

import functools
import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from ..schedules import NoiseLevel, data_coefficients
from .adams_bashforth import adams_bashforth

SMALLEST_STEP = 1e-9  # in radians


def angle(level: NoiseLevel, scale: float) -> float:
    """``θ = arctan(σ/(cα))``, from 0 for clean data to π/2 for noise."""
    return math.atan2(level.sigma, scale * level.alpha)


def radius(level: NoiseLevel, scale: float) -> float:
    """``r = √(σ² + c²α²)``."""
    return math.hypot(level.sigma, scale * level.alpha)


@functools.lru_cache(maxsize=4096)
def velocity_coefficients(prediction_type: str, level: NoiseLevel, scale: float) -> tuple[float, float]:
    """``(a, b)`` with ``v = cos θ ε − sin θ x_0/c = a x + b m``."""
    (of_x, of_output), r = data_coefficients(prediction_type, *level), radius(level, scale)
    on_x, on_data = scale * level.alpha / (r * level.sigma), -r / (scale * level.sigma)
    return float(on_x + on_data * of_x), float(on_data * of_output)


class ScaledVelocity(NamedTuple):
    """A velocity as ``factor · tensor``, which takes one pass over memory to make."""

    tensor: torch.Tensor
    factor: float


@dataclass
class VelocityHistory:
    """Velocities of the last calls, oldest first, the angles where they were, and the number of calls that there were."""

    velocities: list[ScaledVelocity] = field(default_factory=list)
    angles: list[float] = field(default_factory=list)
    calls: int = 0

    def make_room(self, at: float, longest: int | None) -> torch.Tensor | None:
        """Before the velocity at an angle is made: forget what it leaves no place for, and give it the memory of that."""
        if self.angles and self.angles[-1] - at < SMALLEST_STEP:  # a flat part of the noise process
            self.velocities.pop()
            self.angles.pop()
            self.calls -= 1
        if longest is None or len(self.angles) < longest:
            return None
        del self.angles[0]
        return self.velocities.pop(0).tensor

    def remember(self, velocity: ScaledVelocity, at: float) -> None:
        self.velocities.append(velocity)
        self.angles.append(at)
        self.calls += 1

    def adams_bashforth(self, target: float, order: int) -> tuple[float, list[float]]:
        """``a`` and the weights of the last velocities."""
        if target == 0 and self.calls == 1:  # a single step ends at the data prediction
            return math.cos(self.angles[0]) - 1, [-math.sin(self.angles[0])]
        return 0.0, adams_bashforth(self.angles[-order:], target)
