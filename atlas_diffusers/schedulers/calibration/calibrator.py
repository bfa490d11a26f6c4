"""Calibration of the multistep solver: a teacher's trajectories, nodes placed on them, coefficients fitted on-policy."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from tqdm.auto import tqdm

from .cache import Cache
from .fit import Candidate, distances, fit, follow
from .model import Model
from .node_placement import Placement
from .refine import refine
from .tables import StepTable
from .teacher import Trajectories, kept, run_teacher

# weight of inner residuals, ridge: each serves distributions that those before it do not
PLACEMENTS = (
    (0.5, 1e-4), (0.5, 1e-3), (1.0, 1e-4), (0.5, 1e-2), (0.1, 1e-2),
    (1.0, 1e-1), (0.5, 1e-5), (1.0, 1e-3), (0.2, 1e-4), (0.1, 1e-1),
)  # fmt: skip
HELD_OUT = 3
FEWEST_TABLES = 2
REFINED = {}
REFINED_SHARE = 0.0


@dataclass(frozen=True)
class StepReport:
    """Mean RMS distance of held-out ends from the teacher's, without and with the table; whether the table is kept."""

    uncalibrated: float
    calibrated: float
    kept: bool


class Calibrator:
    """
    Tables for several step counts from one teacher.

    Args:
        model: what is calibrated.
        teacher: its trajectories; every third is held out.
        cache: of what was tried.
    """

    def __init__(self, model: Model, teacher: Trajectories, cache: Cache | None):
        self.model, self.teacher, self.cache = model, teacher, cache
        self.train = torch.arange(len(teacher.ends), device=teacher.ends.device) % HELD_OUT != HELD_OUT - 1
        self.placement = Placement(teacher.part(self.train), from_top=not model.scales_noise)

    def table(self, steps: int, calls: int, before: StepTable | None = None) -> tuple[StepTable, StepReport]:
        """The best table found by ``calls`` network calls a trajectory, against the plain solver and the table ``before``."""
        reserved = REFINED.get(steps, 0) if calls < 100 else int(calls * REFINED_SHARE)
        found, spent = self._search(steps, max((calls - reserved) // steps, FEWEST_TABLES))
        while spent + steps < calls and reserved:
            better, cost = refine(self.model, self.teacher, found, self.train, calls - spent, self.score)
            spent += cost
            if better is found:
                break
            found = better
        if before is not None:
            found = min(found, follow(self.model, self.teacher, before), key=lambda candidate: self.score(candidate.errors))
        calibrated, plain = self.held_out(found.errors), self.held_out(self.plain_errors(steps))
        return found.table, StepReport(plain, calibrated, calibrated < plain)

    def _search(self, steps: int, evaluations: int) -> tuple[Candidate, int]:
        """The best nodes of ``evaluations`` tables, with their coefficients, and the calls a trajectory that they took."""
        tried = {}
        stored = {} if self.cache is None else self.cache.read_tried(steps, self.teacher)
        for settings in PLACEMENTS:
            if len(tried) < (2 * evaluations + 2) // 3:
                self._try(self.placement.place(steps, *settings), tried, stored)
        moves = self.placement.moves(steps)
        while len(tried) < evaluations and (move := next(moves, None)):
            best = min(tried, key=lambda nodes: self.score(tried[nodes].errors))
            self._try(self.placement.moved(best, *move), tried, stored)
        return min(tried.values(), key=lambda candidate: self.score(candidate.errors)), steps * len(tried)

    def held_out(self, errors: torch.Tensor) -> float:
        """Mean over the trajectories that nothing was fitted to."""
        return errors[~self.train].mean().item()

    def score(self, errors: torch.Tensor) -> float:
        """What candidates are compared by."""
        return self.held_out(errors)

    def _try(self, nodes: list[int] | None, tried: dict[tuple, Candidate], stored: dict[tuple, dict]) -> None:
        """Fit these nodes, unless they were tried before."""
        if nodes is None or (key := tuple(nodes)) in tried:
            return
        if key in stored:
            table, errors = StepTable(**stored[key]["table"]), torch.tensor(stored[key]["errors"], dtype=torch.float64)
            tried[key] = Candidate(table, None, errors.to(self.teacher.ends.device))
            return
        tried[key] = fit(self.model, self.teacher, nodes, self.train)
        if self.cache is not None:
            entries = [
                {"nodes": nodes, "table": asdict(candidate.table), "errors": candidate.errors.tolist()}
                for nodes, candidate in tried.items()
            ]
            self.cache.write_tried(len(nodes), self.teacher, entries)

    def plain_errors(self, steps: int) -> torch.Tensor:
        """Of the uncalibrated solver, one a trajectory."""
        ends = self.model.plain(steps)
        return distances(kept(ends), self.teacher.ends)


def calls_for_tables(budget: int, count: int, teacher_steps: int, calls: Sequence[int]) -> int:
    """Network calls a trajectory for the tables of one number of calls, when ``budget`` are divided among all of them."""
    return max(0, (budget // count - teacher_steps - sum(calls)) // len(calls))


def planned_calls(budget: int, count: int, teacher_steps: int, calls: Sequence[int]) -> int:
    """Network calls that all of it takes."""
    share = calls_for_tables(budget, count, teacher_steps, calls)
    return count * (teacher_steps + sum(n + n * max(share // n, FEWEST_TABLES) for n in calls))


def teach(model: Model, sigmas: list[float], cache: Cache | None, progress: bool) -> Trajectories:
    """The teacher's trajectories, batch by batch; batches that ``cache`` has are read, others written to it."""
    parts = []
    with tqdm(total=len(model.parts()) * len(sigmas), desc="teacher", disable=not progress) as bar:
        for rows in model.parts():
            part = None if cache is None else cache.read_teacher(model, sigmas, rows)
            if part is None:
                part = run_teacher(model, sigmas, rows, bar.update)
                if cache is not None:
                    cache.write_teacher(model, part, rows)
            else:
                bar.update(len(sigmas))
            parts.append(part)
    states, velocities = (torch.cat([getattr(part, name) for part in parts], 1) for name in ("states", "velocities"))
    return Trajectories(sigmas, states, velocities, torch.cat([part.ends for part in parts]))
