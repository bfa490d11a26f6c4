"""Calibration of the multistep solver: a teacher's trajectories, nodes placed on them, coefficients fitted on-policy."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict

import torch
from tqdm.auto import tqdm

from .cache import Cache
from .fit import Candidate, Followed, distances, fit, follow
from .model import Model
from .node_placement import Placement
from .refine import refine
from .reports import StepReport
from .tables import StepTable
from .teacher import CHECKED, Trajectories, kept, run_teacher

# weight of inner residuals, ridge: each serves distributions that those before it do not
PLACEMENTS = (
    (0.5, 1e-4), (0.5, 1e-3), (1.0, 1e-4), (0.5, 1e-2), (0.1, 1e-2),
    (1.0, 1e-1), (0.5, 1e-5), (1.0, 1e-3), (0.2, 1e-4), (0.1, 1e-1),
)  # fmt: skip
HELD_OUT = 3
FEWEST_TABLES = 2


class Calibrator:
    """
    Tables for several step counts from one teacher.

    Args:
        model: what is calibrated.
        teacher: its trajectories; every third is held out.
        plain: where the uncalibrated solver goes, by network calls.
        cache: of what was tried.
    """

    def __init__(self, model: Model, teacher: Trajectories, plain: dict[int, torch.Tensor], cache: Cache | None):
        self.model, self.teacher, self.plain, self.cache = model, teacher, plain, cache
        self.train = torch.arange(len(teacher.ends), device=teacher.ends.device) % HELD_OUT != HELD_OUT - 1
        self.restarts: dict[int, tuple[float, ...]] = {}
        self.placement = Placement(teacher.part(self.train), from_top=not model.scales_noise)

    def table(self, steps: int, calls: int, before: StepTable | None = None) -> tuple[StepTable, StepReport]:
        """The best table found by ``calls`` network calls a trajectory, against the plain solver and the table ``before``."""
        found = self._refined(steps, calls)
        if before is not None:
            found = min(found, follow(self.model, self.teacher, before), key=lambda candidate: self.held_out(candidate.errors))
        calibrated, plain = self.held_out(found.errors), self.held_out(distances(kept(self.plain[steps]), self.teacher.ends))
        distances_held_out = found.errors[~self.train]
        standard_error = (distances_held_out.std() / len(distances_held_out) ** 0.5).item()
        return found.table, StepReport(plain, calibrated, calibrated < plain, standard_error, self.restarts[steps])

    def _refined(self, steps: int, calls: int) -> Candidate:
        """The best nodes, and Gauss-Newton steps from there."""
        reserved = calls_to_refine(steps, calls)
        stored = {} if self.cache is None else self.cache.read_tables(steps, self.teacher)
        if (key := ("refined", calls)) in stored:
            self._note(steps, [self._read(entry) for way, entry in stored.items() if way[0] != key[0]])
            return self._read(stored[key])
        tried = self._search(steps, max((calls - reserved) // steps, FEWEST_TABLES), stored)
        self._note(steps, tried.values())
        found = tried[self._best(tried)]
        if reserved:
            start = found if isinstance(found, Followed) else follow(self.model, self.teacher, found.table)
            found = self._improved(start, calls - steps * len(tried))
        self._store(steps, tried | {key: found})
        return found

    def _note(self, steps: int, tried: Iterable[Candidate]) -> None:
        self.restarts[steps] = tuple(sorted(self.held_out(candidate.errors) for candidate in tried))

    def _improved(self, found: Followed, calls: int) -> Followed:
        """After Gauss-Newton steps for as long as they help and ``calls`` network calls a trajectory allow."""
        last = None
        while found is not last:
            last = found
            found, cost = refine(self.model, self.teacher, last, self.train, calls, self.held_out)
            calls -= cost
        return found

    def _search(self, steps: int, evaluations: int, stored: dict[tuple, dict]) -> dict[tuple, Candidate]:
        """``evaluations`` tables by their nodes: those of several placements, and the best of them moved."""
        tried = {}
        for settings in PLACEMENTS:
            if len(tried) < (2 * evaluations + 2) // 3:
                self._try(self.placement.place(steps, *settings), tried, stored)
        moves = self.placement.moves(steps)
        while len(tried) < evaluations and (move := next(moves, None)):
            self._try(self.placement.moved(self._best(tried), *move), tried, stored)
        return tried

    def _best(self, tried: dict[tuple, Candidate]) -> tuple:
        """The nodes that serve held-out trajectories best; the ways of all others are forgotten."""
        best = min(tried, key=lambda nodes: self.held_out(tried[nodes].errors))
        tried.update({nodes: Candidate(other.table, other.errors) for nodes, other in tried.items() if nodes != best})
        return best

    def held_out(self, errors: torch.Tensor) -> float:
        """Mean over the trajectories that nothing was fitted to."""
        return errors[~self.train].mean().item()

    def _try(self, nodes: Sequence[int] | None, tried: dict[tuple, Candidate], stored: dict[tuple, dict]) -> None:
        """Fit these nodes, unless they were tried before."""
        if nodes is None or (key := tuple(nodes)) in tried:
            return
        if key in stored:
            tried[key] = self._read(stored[key])
            return
        tried[key] = fit(self.model, self.teacher, nodes, self.train)
        self._store(len(nodes), tried)

    def _store(self, steps: int, tried: dict[tuple, Candidate]) -> None:
        if self.cache is not None:
            entries = [
                {"key": key, "table": asdict(candidate.table), "errors": candidate.errors.tolist()}
                for key, candidate in tried.items()
            ]
            self.cache.write_tables(steps, self.teacher, entries)

    def _read(self, entry: dict) -> Candidate:
        errors = torch.tensor(entry["errors"], dtype=torch.float64, device=self.teacher.ends.device)
        return Candidate(StepTable(**entry["table"]), errors)


def calls_to_refine(steps: int, calls: int) -> int:
    """Of ``calls`` a trajectory, those for Gauss-Newton steps: half, where that is enough for the last two rows of a table."""
    return calls // 2 if calls // 2 >= 2 * steps + 2 else 0


def planned_calls(budget: int, count: int, teacher_steps: int, calls: Sequence[int]) -> int:
    """Network calls that all of it takes where the teacher's steps suffice."""
    fixed = count * (teacher_steps + sum(calls)) + CHECKED * 3 * teacher_steps
    return max(budget, fixed + count * FEWEST_TABLES * sum(calls))


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
