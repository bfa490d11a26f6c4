"""Coefficients of a calibrated multistep solver, regressed step by step on the student's own states."""

import math

import torch

from ..adams_bashforth import adams_bashforth
from .tables import StepTable
from .teacher import Trajectories, Velocity, advance

RIDGES = (1e-6, 1e-4, 1e-2)
SMALL_RESIDUAL = 0.1  # of the median one
BASE_ORDER = 2


def distance(x: torch.Tensor, y: torch.Tensor) -> float:
    """Mean over samples of the RMS over dimensions."""
    return (x - y).square().mean(1).sqrt().mean().item()


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


def fit(velocity: Velocity, teacher: Trajectories, nodes: list[int], train: torch.Tensor) -> tuple[StepTable, torch.Tensor]:
    """
    A step table for these nodes of the teacher's grid, and where it takes every trajectory.

    Step by step on the student's own states: the teacher's state at the next node is regressed on ``v_0 ... v_n`` and ``x_n``,
    relative to Adams-Bashforth of order 2. Of ``RIDGES`` each step takes the one that serves the held-out rows best.

    Args:
        velocity: of the model, one call a node.
        teacher: its trajectories.
        nodes: indices into its grid.
        train: (batch,), the rows to fit; all others are held out.
    """
    sigmas = [teacher.sigmas[node] for node in nodes]
    angles, held_out = [math.atan(sigma) for sigma in sigmas], ~train
    noise, first = teacher.states[0], teacher.states[nodes[0]]
    start = 1.0 if nodes[0] == 0 else ((noise * first)[train].sum() / noise[train].square().sum()).item()
    x, known, weights, scales = noise * start, [], [], []
    for n, sigma in enumerate(sigmas):
        known.append(velocity(x, sigma))
        final = n + 1 == len(nodes)
        target, goal = (0.0, teacher.ends) if final else (angles[n + 1], teacher.states[nodes[n + 1]])
        row = [0.0] * (n + 1)
        row[-BASE_ORDER:] = adams_bashforth(angles[: n + 1][-BASE_ORDER:], target)
        base = advance(x, known, row)
        columns, left = torch.stack((*known, x), -1).double(), (goal - base).double()
        found = [ridge_solution(columns[train], left[train], ridge) for ridge in RIDGES]
        best = min(found, key=lambda c: distance(columns[held_out] @ c, left[held_out])).tolist()
        weights.append([a + b for a, b in zip(row, best)])
        scales.append(best[-1])
        x = advance(x * (1 + scales[-1]), known, weights[-1])
    return StepTable(sigmas, weights, scales, start), x
