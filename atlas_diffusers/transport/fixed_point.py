"""Sinkhorn's iteration as a fixed-point problem of the row potentials, and its accelerated solution."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .anderson import AndersonMixing
from .penalties import Penalty
from .potentials import Potentials
from .stabilised import StabilisedKernel

WORSE = 3.0
NO_ERROR_YET, LARGEST_EXPONENT = 1e300, 230.0


class Evaluation(NamedTuple):
    """
    Outcome of some iterations: the potentials φ and ψ of the last plan and its L1 row error over the total mass, (batch,);
    the next row potentials, and the residual, the first row potentials less these.
    """

    phi: torch.Tensor
    psi: torch.Tensor
    image: torch.Tensor
    residual: torch.Tensor
    error: torch.Tensor


class SinkhornMap:
    r"""
    One iteration ``φ -> T(φ)`` of Sinkhorn's algorithm in the log domain, with potentials over ε:

        ψ_j = −log Σ_i a_i e^{φ_i − C_ij/ε},    T(φ)_i = −log Σ_j b_j e^{ψ_j − C_ij/ε}

    The plan of (φ, ψ) has its column marginal exactly, and its row error ``|a e^{φ − T(φ)} − a|₁`` costs nothing. Relaxed
    marginals: Chizat et al. 2016 (arXiv 1607.05816).

    Args:
        kernel: gives the soft minima.
        weights: row weights over their total, (batch, n).
        row, column: penalties where that marginal is relaxed.
        sweeps: iterations at once, if no marginal is relaxed.
    """

    def __init__(
        self,
        kernel: StabilisedKernel,
        weights: torch.Tensor,
        row: Penalty | None = None,
        column: Penalty | None = None,
        sweeps: int = 1,
    ):
        self.kernel, self.weights, self.row, self.column, self.sweeps = kernel, weights, row, column, sweeps

    def image(self, psi: torch.Tensor) -> torch.Tensor:
        """The row potentials that belong to column potentials."""
        potential = self.kernel.soft_rows(psi)
        return potential if self.row is None else self.row.relax(potential)

    @property
    def is_relaxed(self) -> bool:
        return self.row is not None or self.column is not None

    def distance(self, phi: torch.Tensor) -> torch.Tensor:
        """Of the potentials from the kernel's reference; a relaxed marginal may take all of them far away."""
        offset = phi - self.kernel.phi
        if self.is_relaxed:
            return (offset.amax(-1) - offset.amin(-1)) / 2
        return torch.linalg.vector_norm(offset, math.inf, dim=-1)

    def bounded(self, phi: torch.Tensor) -> torch.Tensor:
        """The potentials, no further from the kernel's reference than its bound, where no marginal is relaxed."""
        bound = math.inf if self.is_relaxed else self.kernel.bound
        return phi.clamp(self.kernel.phi - bound, self.kernel.phi + bound)

    def moderate(self, phi: torch.Tensor) -> torch.Tensor:
        """
        Row potentials that ask for relaxed marginals below ``e^LARGEST_EXPONENT`` times the weights, as any solution does: plan
        and cost are then finite.
        """
        if self.column is not None:
            psi = self.column.relax(self.kernel.soft_columns(phi))
            excess = (self.column.log_target(psi) - LARGEST_EXPONENT).amax(-1, keepdim=True).clamp(min=0)
            phi = phi - excess * (1 + 1 / self.column.ratio)
        if self.row is not None:
            phi = phi.maximum(-LARGEST_EXPONENT / self.row.ratio - self.row.term)
        return phi

    def __call__(self, phi: torch.Tensor) -> Evaluation:
        if self.is_relaxed:
            return self._relaxed(phi)
        last, psi, image = self.kernel.sweep(phi, self.sweeps)
        change = last - image
        error = torch.linalg.vector_norm(self.weights * change.expm1(), 1, dim=-1)
        residual = change if last is phi else phi - image
        shift = residual.mean(-1, keepdim=True)  # a constant may move from ψ to φ: keep the mean of φ
        return Evaluation(last, psi, image + shift, residual - shift, error)

    def _relaxed(self, phi: torch.Tensor) -> Evaluation:
        psi = self.kernel.soft_columns(phi)
        if self.column is not None:
            psi = self.column.relax(psi)
        image = self.image(psi)
        residual = phi - image
        ratio, log_target = (0.0, torch.zeros_like(phi)) if self.row is None else (self.row.ratio, self.row.log_target(phi))
        rows, target = ((log_target + change).clamp(max=LARGEST_EXPONENT).exp() for change in (residual * (1 + ratio), 0.0))
        error = torch.linalg.vector_norm(self.weights * (rows - target), 1, dim=-1)
        error = error.where(image.isfinite().all(-1), math.nan)
        shift = self._translation(image, psi)
        return Evaluation(phi, psi, image + shift, residual - shift, error)

    def _translation(self, phi: torch.Tensor, psi: torch.Tensor) -> torch.Tensor:
        """
        The best constant to move from ψ to φ, at which both relaxed marginals have one mass, (batch, 1).

        Séjourné, Vialard & Peyré 2022 (arXiv 2201.00730).
        """
        ratio, masses = 0.0, []
        for penalty, log_weights, potential in ((self.row, self.kernel.log_a, phi), (self.column, self.kernel.log_b, psi)):
            if penalty is not None:
                ratio, log_weights = ratio + penalty.ratio, log_weights + penalty.log_target(potential)
            masses.append(log_weights.logsumexp(-1, keepdim=True))
        return (masses[0] - masses[1]) / ratio

    def select(self, members: torch.Tensor) -> None:
        """Keep these members of the batch."""
        self.kernel.select(members)
        self.weights = self.weights[members]
        for penalty in (self.row, self.column):
            if penalty is not None:
                penalty.select(members)


@dataclass
class Solution:
    """Potentials over ε, (batch, n) and (batch, m), and the row error they have, (batch,)."""

    phi: torch.Tensor
    psi: torch.Tensor
    error: torch.Tensor
    iterations: int = 0

    def times(self, epsilon: torch.Tensor) -> Potentials:
        """In the unit of the cost, for ε (batch, 1)."""
        return Potentials(self.phi * epsilon, self.psi * epsilon, self.error, self.iterations)

    def store(self, members: torch.Tensor, evaluation: Evaluation) -> None:
        self.phi[members], self.psi[members], self.error[members] = evaluation.phi, evaluation.psi, evaluation.error


@dataclass
class State:
    """The iterate, the column potentials of the last one, and the best iterate so far."""

    phi: torch.Tensor
    psi: torch.Tensor
    best_error: torch.Tensor
    best_image: torch.Tensor
    best_residual: torch.Tensor

    def select(self, members: torch.Tensor) -> "State":
        return State(*(tensor[members] for tensor in vars(self).values()))


def choose(mask: torch.Tensor | bool, new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """``new`` for the members of the batch where the mask holds (one bool answers for all), otherwise ``old``."""
    if isinstance(mask, bool):
        return new if mask else old
    return torch.where(mask.view(-1, *[1] * (new.ndim - 1)), new, old)


def as_mask(flags: list[bool], device: torch.device) -> torch.Tensor | bool:
    """A mask for ``choose``."""
    return flags[0] if len(set(flags)) == 1 else torch.tensor(flags, device=device)


class FixedPoint:
    """
    Accelerated solution of ``φ = T(φ)`` for a batch of problems.

    An error ``WORSE`` times the best so far sends a problem back to its best iterate, with an empty history. The host reads
    the errors every ``check_every`` iterations: it then drops the problems that have converged, and has the kernel absorb
    potentials that have left its bound. With ``check_every=None`` it never reads: ``max_iterations`` are run without a branch
    on data, in which converged problems stand still.

    Args:
        step: the map T.
        tolerance: of the row error.
        max_iterations: limit.
        check_every: iterations between readings.
    """

    def __init__(self, step: SinkhornMap, tolerance: float, max_iterations: int, check_every: int | None):
        self.step, self.tolerance = step, tolerance
        self.max_iterations, self.check_every = max_iterations, check_every
        self._mixing, self._absorbed = AndersonMixing(), False

    def solve(self, phi: torch.Tensor, psi: torch.Tensor) -> Solution:
        """Start from row potentials ``phi`` (batch, n); ``psi`` (batch, m) are those that the kernel refers to."""
        self._state = State(phi, psi, phi.new_full((len(phi),), NO_ERROR_YET), phi, torch.zeros_like(phi))
        self._members, solution = torch.arange(len(phi), device=phi.device), None
        for iteration in range(1, self.max_iterations + 1):
            evaluation, reading = self.step(self._state.phi), None
            if self.check_every and iteration % self.check_every == 0:
                reading = self._read(evaluation)
                if self._absorb(reading):
                    continue
                converged = [error <= self.tolerance for error, _, _ in reading]
                if all(converged):
                    return self._finish(solution, evaluation, iteration)
                if any(converged):
                    if solution is None:
                        solution = Solution(phi.clone(), psi.clone(), self._state.best_error.clone())
                    evaluation, reading = self._drop(converged, evaluation, reading, solution)
            self._advance(evaluation, reading)
        state = self._state
        state.phi = choose(evaluation.error <= self.tolerance, evaluation.phi, state.best_image)
        if self.step.is_relaxed and not self.check_every:  # nobody has read where they went
            self.step.kernel.be_exact()
            state.phi = self.step.moderate(state.phi)
        last = self.step(state.phi)
        finite = last.error.isfinite() & last.psi.isfinite().all(-1)
        last = last._replace(psi=choose(finite, last.psi, state.psi), error=last.error.nan_to_num(nan=math.inf))
        return self._finish(solution, last, iteration)

    def _finish(self, solution: Solution | None, evaluation: Evaluation, iteration: int) -> Solution:
        if solution is None:
            return Solution(evaluation.phi, evaluation.psi, evaluation.error, iteration)
        solution.store(self._members, evaluation)
        solution.iterations = iteration
        return solution

    def _read(self, evaluation: Evaluation) -> list[list[float]]:
        """Error, best error so far and distance from the kernel's reference of each problem."""
        distance = self.step.distance(self._state.phi)
        return torch.stack((evaluation.error, self._state.best_error, distance), -1).tolist()

    def _absorb(self, reading: list[list[float]]) -> bool:
        """
        Rebuild the kernel where potentials have left its bound, and go on there from the last column potentials.

        Potentials that are out again at once belong there: from then on the kernel computes in logarithms.
        """
        kernel, state = self.step.kernel, self._state
        escaped = [not (distance <= kernel.bound and math.isfinite(error)) for error, _, distance in reading]
        again, self._absorbed = self._absorbed, any(escaped)
        if not self._absorbed or kernel.logarithmic:
            return False
        if again:
            kernel.use_logarithms()
        else:
            kernel.absorb(state.psi, [member for member, left in enumerate(escaped) if left])
        mask = torch.tensor(escaped, device=state.phi.device)
        state.phi = choose(mask, self.step.image(state.psi), state.phi)
        self._mixing.forget(mask)
        return True

    def _drop(
        self, converged: list[bool], evaluation: Evaluation, reading: list[list[float]], solution: Solution
    ) -> tuple[Evaluation, list[list[float]]]:
        """Store the problems that have converged and go on with the rest."""
        going = [member for member, done in enumerate(converged) if not done]
        done, rest = torch.tensor(converged).nonzero()[:, 0], torch.tensor(going)
        done, rest = (index.to(self._state.phi.device) for index in (done, rest))
        solution.store(self._members[done], Evaluation(*(tensor[done] for tensor in evaluation)))
        self._members = self._members[rest]
        self._state = self._state.select(rest)
        self._mixing.select(rest)
        self.step.select(rest)
        return Evaluation(*(tensor[rest] for tensor in evaluation)), [reading[member] for member in going]

    def _advance(self, evaluation: Evaluation, reading: list[list[float]] | None) -> None:
        """One accelerated step, or a return to the best iterate."""
        state, error = self._state, evaluation.error
        if reading is None:
            better, worse = error < state.best_error, ~(error <= WORSE * state.best_error)
        else:
            better = as_mask([error < best for error, best, _ in reading], error.device)
            worse = as_mask([not error <= WORSE * best for error, best, _ in reading], error.device)
        state.best_error = choose(better, error, state.best_error)
        state.best_image = choose(better, evaluation.image, state.best_image)
        state.best_residual = choose(better, evaluation.residual, state.best_residual)
        if worse is not False:
            self._mixing.forget(worse if isinstance(worse, torch.Tensor) else torch.ones_like(error, dtype=torch.bool))
        image = choose(worse, state.best_image, evaluation.image)
        phi = self._mixing.step(image, choose(worse, state.best_residual, evaluation.residual))
        if self.check_every != 1:
            phi = choose(error <= self.tolerance, evaluation.phi, phi)
        if not self.check_every:
            phi = self.step.bounded(phi)
        state.phi, state.psi = phi, choose(worse, state.psi, evaluation.psi)
