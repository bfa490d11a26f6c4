"""Gauss-Newton steps on the end of a table's trajectories, by differences of the model instead of its derivatives."""

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from .fit import Followed, distance, follow, ridge_solution
from .model import Model
from .tables import StepTable
from .teacher import Trajectories, advance, kept

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
DIFFERENCE = 0.02  # of coefficients of vectors of unit size, and of log σ̂
LONGEST = 0.25  # step of any number, beyond which differences say little
SHORTENED = (1.0, 0.5)  # parts of a step that are tried

Entry = TypeVar("Entry")


@dataclass(frozen=True)
class Unknown:
    """A number of a table of ``calls`` nodes: ``w_nj``, ``a_n`` (j is -1), or the logarithm of σ̂_n (j is ``None``)."""

    calls: int
    n: int
    j: int | None

    @property
    def first(self) -> int:
        """The first network call that notices when it changes."""
        return self.n if self.j is None else self.n + 1

    @property
    def cost(self) -> int:
        """Network calls of its derivative, a trajectory."""
        return self.calls - self.first

    def changed(self, table: StepTable, by: float) -> StepTable:
        """The table with the number greater by ``by``."""
        if self.j is None:
            return replace(table, sigmas=_with(table.sigmas, self.n, table.sigmas[self.n] * math.exp(by)))
        if self.j < 0:
            return replace(table, scales=_with(table.scales, self.n, table.scales[self.n] + by))
        row = _with(table.weights[self.n], self.j, table.weights[self.n][self.j] + by)
        return replace(table, weights=_with(table.weights, self.n, row))


def _with(values: list[Entry], index: int, value: Entry) -> list[Entry]:
    return [*values[:index], value, *values[index + 1 :]]


def affordable(calls: int, budget: int) -> list[Unknown]:
    """Unknowns from the last row to the first node, as many rows as ``budget`` network calls a trajectory allow."""
    chosen, spent = [], 1  # a march begins at the start noise
    for n in reversed(range(calls)):
        for group in ([Unknown(calls, n, j) for j in (*range(n + 1), -1)], [Unknown(calls, n, None)] if n else []):
            spent += sum(unknown.cost for unknown in group)
            if spent > budget:
                return chosen
            chosen += group
    return chosen


def refine(
    model: Model,
    teacher: Trajectories,
    candidate: Followed,
    train: torch.Tensor,
    budget: int,
    score: Callable[[torch.Tensor], float],
) -> tuple[Followed, int]:
    """
    One Gauss-Newton step for the mean distance of ends, damped so that held-out ends come nearest by the linear model.

    Args:
        candidate: a table and its trajectories.
        train: (trajectories,), the rows to fit.
        budget: network calls a trajectory.
        score: of distances; a step is taken only if it falls.

    Returns:
        The better candidate, or the one given, and the network calls a trajectory.
    """
    calls = len(candidate.table.sigmas)
    unknowns = affordable(calls, budget - calls)
    if not any(unknown.cost for unknown in unknowns):
        return candidate, 0
    spent = 1 + sum(unknown.cost for unknown in unknowns)
    columns = derivatives(model, candidate, unknowns)
    wanted = teacher.ends.double() - kept(candidate.way.ends).double()
    solution = damped_solution(columns, wanted, train)
    for part in SHORTENED:
        if spent + calls > budget:
            break
        table = candidate.table
        try:
            for unknown, by in zip(unknowns, solution):
                table = unknown.changed(table, part * by)
        except ValueError:  # nodes that no longer fall
            continue
        spent += calls
        found = follow(model, teacher, table)
        if score(found.errors) < score(candidate.errors):
            return found, spent
    return candidate, spent


def damped_solution(columns: torch.Tensor, wanted: torch.Tensor, train: torch.Tensor) -> list[float]:
    """Of ridge solutions of the training rows, none of them longer than ``LONGEST``, the one that serves held-out rows best."""
    found = [ridge_solution(columns[train], wanted[train], ridge) for ridge in RIDGES]
    found = [solution * (LONGEST / solution.abs().max()).clamp(max=1) for solution in found]
    return min(found, key=lambda c: distance(columns[~train] @ c, wanted[~train])).tolist()


def derivatives(model: Model, candidate: Followed, unknowns: Sequence[Unknown]) -> torch.Tensor:
    """Of the ends by the unknowns, (trajectories, d, unknowns); one march through the ends of all changed trajectories."""
    table, columns = candidate.table, []
    changed = [unknown.changed(table, DIFFERENCE) for unknown in unknowns]
    sigmas = [sigma for unknown, other in zip(unknowns, changed) for sigma in other.sigmas[unknown.first :]]

    def ends() -> Generator[torch.Tensor, torch.Tensor, None]:
        for unknown, other in zip(unknowns, changed):
            end = yield from changed_end(other, candidate, unknown)
            columns.append((kept(end).double() - kept(candidate.way.ends).double()) / DIFFERENCE)

    states = ends()

    def step(n: int, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return next(states, x) if n == 0 else _sent(states, v, x)

    model.march([table.sigmas[0], *sigmas], step, table.start)
    return torch.stack(columns, -1)


def _sent(states: Generator[torch.Tensor, torch.Tensor, None], v: torch.Tensor, otherwise: torch.Tensor) -> torch.Tensor:
    try:
        return states.send(v)
    except StopIteration:
        return otherwise


def changed_end(table: StepTable, candidate: Followed, unknown: Unknown) -> Generator[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where a changed table ends; yields states, and is sent the velocities there."""
    way = candidate.way
    known, x = list(way.velocities[: unknown.first]), way.states[unknown.n]
    if unknown.j is not None:
        x = advance(x * (1 + table.scales[unknown.n]), known, table.weights[unknown.n])
    for n in range(unknown.first, unknown.calls):
        known.append((yield x))
        x = advance(x * (1 + table.scales[n]), known, table.weights[n])
    return x
