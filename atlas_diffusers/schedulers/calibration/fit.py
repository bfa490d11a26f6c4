"""Coefficients of a calibrated multistep solver, regressed step by step on the student's own states."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..adams_bashforth import adams_bashforth
from .model import Model
from .tables import StepTable
from .teacher import Trajectories, advance, kept

RIDGES = (1e-6, 1e-4, 1e-2)
SMALL_RESIDUAL = 0.1  # of the median one
BASE_ORDER = 2


@dataclass(frozen=True)
class Way:
    """States x/r and velocities at the nodes of a table, and the ends, with all coordinates, (trajectories, d)."""

    states: list[torch.Tensor]
    velocities: list[torch.Tensor]
    ends: torch.Tensor


@dataclass(frozen=True)
class Candidate:
    """A step table that was run, and the RMS distance of each end from the teacher's, (trajectories,)."""

    table: StepTable
    errors: torch.Tensor


@dataclass(frozen=True)
class Followed(Candidate):
    """A candidate with the way that it takes the trajectories."""

    way: Way


def distances(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """RMS over dimensions of every sample."""
    return (x - y).double().square().mean(1).sqrt()


def distance(x: torch.Tensor, y: torch.Tensor) -> float:
    """Mean over samples of the RMS over dimensions."""
    return distances(x, y).mean().item()


def ridge_solution(columns: torch.Tensor, wanted: torch.Tensor, ridge: float) -> torch.Tensor:
    """
    The coefficients c with least mean over samples of ``|wanted - columns @ c|``, not squared, so that the few trajectories
    that no coefficients serve do not decide: least squares, and once more with every sample weighted by its distance.

    Args:
        columns: (batch, d, k).
        wanted: (batch, d).
        ridge: of the penalty ``ridge |c|²`` for columns of unit norm.
    """
    weights = torch.ones(len(wanted), 1, dtype=wanted.dtype, device=wanted.device)
    for _ in range(2):
        found = least_squares((columns * weights[..., None]).flatten(0, 1), (wanted * weights).flatten(), ridge)
        left = torch.linalg.vector_norm(wanted - columns @ found, dim=1, keepdim=True)
        weights = left.clamp(min=SMALL_RESIDUAL * left.median().item() + 1e-30).rsqrt()
    return found


def least_squares(columns: torch.Tensor, wanted: torch.Tensor, ridge: float) -> torch.Tensor:
    """With the penalty; columns (rows, k), wanted (rows,)."""
    matrix, right = columns.mT @ columns, columns.mT @ wanted
    norms = matrix.diagonal().sqrt().clamp(min=1e-30)
    penalty = ridge * torch.eye(len(norms), dtype=matrix.dtype, device=matrix.device)
    return torch.linalg.solve(matrix / norms / norms[:, None] + penalty, right / norms) / norms


class Fit:
    """
    Regresses the teacher's state at the next node on ``v_0 ... v_n`` and ``x_n``, relative to Adams-Bashforth of order 2, in
    float64. A step of :meth:`Model.march`.

    Args:
        teacher: its trajectories.
        nodes: indices into its grid.
        train: (trajectories,), the rows to fit; all others are held out.
    """

    def __init__(self, teacher: Trajectories, nodes: Sequence[int], train: torch.Tensor):
        self.teacher, self.nodes, self.train = teacher, nodes, train
        self.sigmas = [teacher.sigmas[node] for node in nodes]
        self.angles = [math.atan(sigma) for sigma in self.sigmas]
        noise, first = teacher.states[0][train], teacher.states[nodes[0]][train]
        self.start = 1.0 if nodes[0] == 0 else ((noise * first).sum() / noise.square().sum()).item()
        self.states, self.velocities, self.weights, self.scales = [], [], [], []

    def __call__(self, n: int, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        self.states.append(x)
        self.velocities.append(v)
        final = n + 1 == len(self.nodes)
        target, goal = (0.0, self.teacher.ends) if final else (self.angles[n + 1], self.teacher.states[self.nodes[n + 1]])
        row = [0.0] * (n + 1)
        row[-BASE_ORDER:] = adams_bashforth(self.angles[: n + 1][-BASE_ORDER:], target)
        base = kept(advance(x, self.velocities, row))
        columns = torch.stack([kept(column).double() for column in (*self.velocities, x)], -1)
        wanted, train = goal.double() - base.double(), self.train
        found = [ridge_solution(columns[train], wanted[train], ridge) for ridge in RIDGES]
        best = min(found, key=lambda c: distance(columns[~train] @ c, wanted[~train])).tolist()
        self.weights.append([a + b for a, b in zip(row, best)])
        self.scales.append(best[-1])
        return advance(x * (1 + self.scales[-1]), self.velocities, self.weights[-1])


def fit(model: Model, teacher: Trajectories, nodes: Sequence[int], train: torch.Tensor) -> Followed:
    """A step table for these nodes of the teacher's grid, at one call a node and trajectory."""
    fitting = Fit(teacher, nodes, train)
    ends = model.march(fitting.sigmas, fitting, fitting.start)
    table = StepTable(fitting.sigmas, fitting.weights, fitting.scales, fitting.start)
    return Followed(table, distances(kept(ends), teacher.ends), Way(fitting.states, fitting.velocities, ends))


def follow(model: Model, teacher: Trajectories, table: StepTable) -> Followed:
    """Run a step table, at one call a node and trajectory."""
    states, velocities = [], []

    def step(n: int, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        states.append(x)
        velocities.append(v)
        return advance(x * (1 + table.scales[n]), velocities, table.weights[n])

    ends = model.march(table.sigmas, step, table.start)
    return Followed(table, distances(kept(ends), teacher.ends), Way(states, velocities, ends))
