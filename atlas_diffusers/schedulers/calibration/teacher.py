"""
The teacher of a calibration: fine solutions of a model's probability-flow ODE.

All states are VP samples ``x = α x_0 + σ ε`` and velocities ``v = α ε − σ x_0``, flattened to (batch, d).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ...schedules import NoiseProcess
from ..adams_bashforth import adams_bashforth

Velocity = Callable[[torch.Tensor, float], torch.Tensor]
TEACHER_ORDER, TEACHER_SCALE = 4, 0.05


@dataclass
class Trajectories:
    """
    A teacher's solutions of the probability-flow ODE.

    Args:
        sigmas: σ̂ of the grid, from the noisiest level down.
        states, velocities: x and v there, (grid, batch, d).
        ends: x at σ̂ = 0, (batch, d).
    """

    sigmas: list[float]
    states: torch.Tensor
    velocities: torch.Tensor
    ends: torch.Tensor

    def part(self, rows: torch.Tensor) -> "Trajectories":
        """Some trajectories."""
        return Trajectories(self.sigmas, self.states[:, rows], self.velocities[:, rows], self.ends[rows])


def teacher_sigmas(process: NoiseProcess, steps: int) -> list[float]:
    """Even in ``asinh(σ̂/0.05)``, that is in log σ̂ above and in σ̂ below, between the ends of the training process."""
    high, low = (level.sigma_hat for level in process.ends)
    ends = math.asinh(high / TEACHER_SCALE), math.asinh(low / TEACHER_SCALE)
    inner = [TEACHER_SCALE * math.sinh(ends[0] + (ends[1] - ends[0]) * k / (steps - 1)) for k in range(1, steps - 1)]
    return [high, *inner, low]


def run_teacher(velocity: Velocity, noise: torch.Tensor, sigmas: list[float], progress=None) -> Trajectories:
    """
    Adams-Bashforth-Moulton of order 4 and 5 in the angle, one call a step: predict, evaluate, correct.

    Args:
        velocity: v of flattened samples at a σ̂.
        noise: x at the first σ̂, (batch, d).
        sigmas: the grid.
        progress: called after every step.
    """
    angles, states, velocities = [math.atan(sigma) for sigma in sigmas], [], []
    x = noise
    for n, sigma in enumerate(sigmas):
        v = velocity(x, sigma)
        if n:
            known = [*velocities[-TEACHER_ORDER:], v]
            x = advance(states[-1], known, interpolating(angles[n + 1 - len(known) : n + 1]))
        states.append(x)
        velocities.append(v)
        target = angles[n + 1] if n + 1 < len(sigmas) else 0.0
        x = advance(x, velocities[-TEACHER_ORDER:], adams_bashforth(angles[max(0, n + 1 - TEACHER_ORDER) : n + 1], target))
        if progress is not None:
            progress()
    return Trajectories(sigmas, torch.stack(states), torch.stack(velocities), x)


def interpolating(angles: list[float]) -> list[float]:
    """Adams-Moulton weights: of the integral over the last of these angles' intervals."""
    return [-weight for weight in adams_bashforth(angles, angles[-2])]


def advance(x: torch.Tensor, velocities: list[torch.Tensor], weights: list[float]) -> torch.Tensor:
    """``x + Σ w_j v_j``."""
    for weight, velocity in zip(weights, velocities):
        x = torch.add(x, velocity, alpha=weight)
    return x
