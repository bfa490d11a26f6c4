"""The teacher of a calibration: fine solutions of a model's probability-flow ODE."""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from ..adams_bashforth import adams_bashforth
from .model import Model

TEACHER_ORDER, TEACHER_SCALE = 4, 0.05
MOST_COORDINATES = 16_384
CHECKED, TEACHER_SHARE, MOST_TEACHER_STEPS = 4, 0.1, 300
HIGHEST_NODE = 30.0  # σ̂ above which the flow is a straight line


@dataclass
class Trajectories:
    """
    A teacher's solutions of the probability-flow ODE.

    Args:
        sigmas: σ̂ of the grid, from the noisiest level down.
        states, velocities: x/r and v there, (grid, batch, d) with all coordinates or ``MOST_COORDINATES`` of them.
        ends: x at σ̂ = 0, (batch, d).
    """

    sigmas: list[float]
    states: torch.Tensor
    velocities: torch.Tensor
    ends: torch.Tensor

    def part(self, rows: torch.Tensor) -> "Trajectories":
        """Some trajectories."""
        return Trajectories(self.sigmas, self.states[:, rows], self.velocities[:, rows], self.ends[rows])


def teacher_sigmas(low: float, high: float, steps: int) -> list[float]:
    """
    Even in ``asinh(σ̂/0.05)``, that is in log σ̂ above and in σ̂ below, from the least of ``high`` and 30 to ``low``; where
    ``high`` is more, it is a node of its own.
    """
    above = [high] if high > HIGHEST_NODE else []
    count = steps - len(above)
    first, last = math.asinh(min(high, HIGHEST_NODE) / TEACHER_SCALE), math.asinh(low / TEACHER_SCALE)
    inner = [TEACHER_SCALE * math.sinh(first + (last - first) * k / (count - 1)) for k in range(1, count - 1)]
    return [*above, min(high, HIGHEST_NODE), *inner, low]


def kept(x: torch.Tensor) -> torch.Tensor:
    """The coordinates that distances are measured in: all, or ``MOST_COORDINATES`` of them drawn by chance; (batch, d)."""
    return x if x.shape[1] <= MOST_COORDINATES else x[:, chosen_coordinates(x.shape[1]).to(x.device)]


@cache
def chosen_coordinates(size: int) -> torch.Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(0))[:MOST_COORDINATES].sort().values


class Teacher:
    """
    Adams-Bashforth-Moulton of order 4 and 5 in the angle, one call a step: predict, evaluate, correct. A step of
    :meth:`Model.march`.

    Args:
        sigmas: the grid.
        progress: called after every step.
    """

    corrected: torch.Tensor
    predicted: torch.Tensor

    def __init__(self, sigmas: list[float], progress: Callable[[], object] | None = None):
        self.sigmas, self.angles, self.progress = sigmas, [math.atan(sigma) for sigma in sigmas], progress
        self.states, self.velocities, self.recent = [], [], []

    def __call__(self, n: int, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if n:
            known = [*self.recent, v]
            # what a pipeline does to samples between steps, such as masks, it does to both
            x = advance(self.corrected, known, interpolating(self.angles[n + 1 - len(known) : n + 1])) + (x - self.predicted)
        self.recent = [*self.recent, v][-TEACHER_ORDER:]
        self.states.append(kept(x))
        self.velocities.append(kept(v))
        target = self.angles[n + 1] if n + 1 < len(self.angles) else 0.0
        weights = adams_bashforth(self.angles[n + 1 - len(self.recent) : n + 1], target)
        self.corrected, self.predicted = x, advance(x, self.recent, weights)
        if self.progress is not None:
            self.progress()
        return self.predicted

    def trajectories(self) -> Trajectories:
        """After the last step."""
        return Trajectories(self.sigmas, torch.stack(self.states), torch.stack(self.velocities), kept(self.predicted))


def run_teacher(
    model: Model, sigmas: list[float], rows: slice = slice(None), progress: Callable[[], object] | None = None
) -> Trajectories:
    """Fine solutions of some of a model's trajectories."""
    teacher = Teacher(sigmas, progress)
    model.march(sigmas, teacher, rows=rows)
    return teacher.trajectories()


def teacher_steps_that_suffice(model: Model, plain: torch.Tensor, steps: int) -> int:
    """
    ``steps``, doubled until twice as many would move the ends of a few trajectories by less than a tenth of what the plain
    solver is away from them: strong guidance makes a flow so stiff that the ends of 36 steps are nowhere near.

    Args:
        plain: where the plain solver goes, (trajectories, d).
        steps: network calls of one trajectory.
    """
    rows, lowest = slice(0, min(model.count, CHECKED)), model.scheduler.process.ends[1].sigma_hat

    def ends(steps: int) -> torch.Tensor:
        return run_teacher(model, teacher_sigmas(lowest, model.top, steps), rows).ends

    coarse = ends(steps)
    while True:
        fine = ends(2 * steps)
        moved, left = ((end - fine).square().mean(1).sqrt().median().item() for end in (coarse, kept(plain[rows])))
        if moved <= TEACHER_SHARE * left:
            return steps
        if 2 * steps > MOST_TEACHER_STEPS:
            warnings.warn(
                f"the teacher's ends still move by {moved:.2g} from {steps} to {2 * steps} steps, where the plain solver is "
                f"{left:.2g} away: tables for so stiff a flow may not help; use weaker guidance",
                stacklevel=6,
            )
            return steps
        steps, coarse = 2 * steps, fine


def interpolating(angles: list[float]) -> list[float]:
    """Adams-Moulton weights: of the integral over the last of these angles' intervals."""
    return [-weight for weight in adams_bashforth(angles, angles[-2])]


def advance(x: torch.Tensor, velocities: list[torch.Tensor], weights: list[float]) -> torch.Tensor:
    """``x + Σ w_j v_j``."""
    for weight, velocity in zip(weights, velocities):
        x = torch.add(x, velocity, alpha=weight)
    return x
