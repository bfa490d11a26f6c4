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


def angle_nodes(steps: int, largest: float, smallest: float, scale: float, power: float) -> list[float]:
    """σ̂ of the nodes ``θ_max (1 − k/N)^p``; where the last would be below the smallest angle, it is that instead."""
    last, parts = 0.0, [1 - k / steps for k in range(steps)]
    if steps > 1 and largest * parts[-1] ** power < smallest:
        parts, last = [1 - k / (steps - 1) for k in range(steps)], smallest
    return [scale * math.tan(last + (largest - last) * part**power) for part in parts]


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
    """Velocities of the last calls, oldest first, and the angles where they were."""

    velocities: list[ScaledVelocity] = field(default_factory=list)
    angles: list[float] = field(default_factory=list)

    def remember(self, velocity: ScaledVelocity, at: float) -> None:
        if self.angles and self.angles[-1] - at < SMALLEST_STEP:  # a flat part of the noise process
            self.velocities.pop()
            self.angles.pop()
        self.velocities.append(velocity)
        self.angles.append(at)

    def adams_bashforth(self, target: float, order: int) -> tuple[float, list[float]]:
        """``a`` and the weights of the last velocities."""
        if target == 0 and len(self.angles) == 1:  # a single step ends at the data prediction
            return math.cos(self.angles[0]) - 1, [-math.sin(self.angles[0])]
        return 0.0, adams_bashforth(self.angles[-order:], target)
