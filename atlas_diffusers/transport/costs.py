"""Transport costs as the solver and its output see them: block by block, potentials included."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from ..kernels import GridKernel, KernelOperator

DEFAULT_MAX_BYTES = 2**31
BLOCK_BYTES = 2**26
TEMPORARIES = 4  # arrays of a block's size that live at once
HELD_MATRICES = 12  # of the plan's size, that the gradients of an output hold
Reduction = Callable[[torch.Tensor, slice], Any]


def squared_norm(points: torch.Tensor) -> torch.Tensor:
    """``|x_i|²``, (..., n), without a copy of the points (..., n, d)."""
    return torch.linalg.vector_norm(points, dim=-1).square()


class Cost(ABC):
    """
    Exponents ``φ_i + ψ_j − C_ij/ε`` of a batch of problems, from which everything else follows.

    ``shape`` is (batch, n, m) and ``epsilon`` (batch,); potentials here are divided by ε.
    """

    shape: tuple[int, int, int]
    epsilon: torch.Tensor
    max_bytes: int

    @property
    def holds_gradients(self) -> bool:
        """Whether the gradients of an output, which hold several matrices, fit ``max_bytes``."""
        return HELD_MATRICES * math.prod(self.shape) * self.epsilon.itemsize <= self.max_bytes

    @abstractmethod
    def each(self, function: Reduction, phi: torch.Tensor, psi: torch.Tensor) -> list:
        """
        ``function(exponents, rows)`` of every block of rows.

        Args:
            function: takes exponents (batch, rows, m) and the range of these rows.
            phi, psi: potentials over ε, (batch, n) and (batch, m).
        """

    def log_rows(self, psi: torch.Tensor) -> torch.Tensor:
        """``log Σ_j e^{ψ_j − C_ij/ε}``, (batch, n)."""
        zero = psi.new_zeros(self.shape[:2])
        return torch.cat(self.each(lambda block, rows: block.logsumexp(-1).to(psi.dtype), zero, psi), -1)

    def log_columns(self, phi: torch.Tensor) -> torch.Tensor:
        """``log Σ_i e^{φ_i − C_ij/ε}``, (batch, m)."""
        zero = phi.new_zeros(self.shape[0], self.shape[2])
        parts = self.each(lambda block, rows: block.logsumexp(-2).to(phi.dtype), phi, zero)
        return torch.stack(parts).logsumexp(0)

    def sums(self, phi: torch.Tensor, psi: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``Σ_j`` and ``Σ_i`` of ``e^{φ_i + ψ_j − C_ij/ε}``, (batch, n) and (batch, m), float64."""
        return (phi + self.log_rows(psi)).exp(), (psi + self.log_columns(phi)).exp()

    def project(self, psi: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Averages of ``values`` (batch, m, k) with weights ∝ ``e^{ψ_j − C_ij/ε}``, (batch, n, k)."""
        zero = psi.new_zeros(self.shape[:2])
        return torch.cat(self.each(lambda block, rows: block.softmax(-1) @ values.to(block.dtype), zero, psi), -2)


class PointCost(Cost):
    r"""
    ``C_ij = |x_i − y_j|² = A_i + B_j − 2 x'_i·y'_j`` with each cloud centred by itself, ``x' = x − x̄`` and ``y' = y − ȳ``:

        A_i = |x'_i|² + 2 x'_i·s + |s|²,    B_j = |y'_j|² − 2 y'_j·s,    s = x̄ − ȳ

    The separable terms go into the potentials exactly, so that exponents are sums of inner products only and a shift of
    a whole cloud costs no accuracy. Potentials without them, ``f − A`` and ``g − B``, are called *inner* potentials.

    Args:
        x: (batch, n, d).
        y: (batch, m, d), of the same dtype, in which the products are taken.
        epsilon: (batch,), float64.
        a, b: weights of the means, (batch, n) and (batch, m), float64; uniform by default.
        max_bytes: largest block; gradients hold no more than this, and compute the blocks again beyond it.
    """

    def __init__(
        self,
        x: torch.Tensor,
        y: torch.Tensor,
        epsilon: torch.Tensor,
        a: torch.Tensor | None = None,
        b: torch.Tensor | None = None,
        max_bytes: int = DEFAULT_MAX_BYTES,
    ):
        self.epsilon, self.max_bytes = epsilon, max_bytes
        self.shape = (len(x), x.shape[1], y.shape[1])
        mean_x, mean_y = _mean(x, a), _mean(y, b)
        self.x, self.y, self.shift = x - mean_x, y - mean_y, mean_x - mean_y
        self.x_norm, self.y_norm, self.shift_norm = (squared_norm(z) for z in (self.x, self.y, self.shift))

    @property
    def row_term(self) -> torch.Tensor:
        """``A``, (batch, n)."""
        return torch.baddbmm(self.x_norm[..., None], self.x, self.shift.mT, alpha=2)[..., 0] + self.shift_norm

    @property
    def column_term(self) -> torch.Tensor:
        """``B``, (batch, m)."""
        return torch.baddbmm(self.y_norm[..., None], self.y, self.shift.mT, alpha=-2)[..., 0]

    def each(self, function: Reduction, phi: torch.Tensor, psi: torch.Tensor) -> list:
        epsilon = self.epsilon[:, None]
        phi, psi = phi - self.row_term / epsilon, psi - self.column_term / epsilon
        phi, psi = phi.to(self.x.dtype)[..., None], psi.to(self.x.dtype)[:, None]
        x = self.x * (2 / epsilon).to(self.x.dtype)[..., None]

        def compute(rows: slice) -> Any:
            return function(x[:, rows] @ self.y.mT + phi[:, rows] + psi, rows)

        row_bytes = self.shape[0] * self.shape[2] * x.itemsize
        if torch.is_grad_enabled() and not self.holds_gradients:
            compute = partial(checkpoint, compute, use_reentrant=False, preserve_rng_state=False)
        step = max(1, min(BLOCK_BYTES, self.max_bytes // TEMPORARIES) // row_bytes)
        return [compute(slice(start, start + step)) for start in range(0, self.shape[1], step)]

    def sums(self, phi: torch.Tensor, psi: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Those of the plan's own entries, rounding included."""

        def both(block: torch.Tensor, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
            plan = block.exp().to(psi.dtype)
            return plan.sum(-1), plan.sum(-2)

        rows, columns = zip(*self.each(both, phi, psi))
        return torch.cat(rows, -1), torch.stack(columns).sum(0)


def _mean(points: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    if weights is None:
        return points.mean(-2, keepdim=True)
    shares = weights / weights.sum(-1, keepdim=True)
    return (shares[:, None].to(points.dtype) @ points).detach()


class OperatorCost(Cost):
    """
    ``C_ij = −ε log K_ij`` of a positive kernel operator K of shape (n, m), as a batch of one; grids in float64.

    Args:
        operator: K.
        epsilon: (1,), float64.
        points: where C is the squared distance between points, these: (n, d) and (m, d).
    """

    def __init__(
        self,
        operator: KernelOperator,
        epsilon: torch.Tensor,
        points: tuple[torch.Tensor, torch.Tensor] | None = None,
    ):
        self.operator, self.epsilon, self.max_bytes = operator, epsilon, DEFAULT_MAX_BYTES
        self.shape = (1, *operator.shape)
        self.dtype = torch.float64 if isinstance(operator, GridKernel) else operator.dtype
        self._of_points = None if points is None else PointCost(*(z[None].to(self.dtype) for z in points), epsilon)

    def each(self, function: Reduction, phi: torch.Tensor, psi: torch.Tensor) -> list:
        """Over the blocks of the points, or the dense kernel as one."""
        if self._of_points is not None:
            return self._of_points.each(function, phi, psi)
        kernel = self.operator.dense().to(phi.dtype)
        exponents = kernel.clamp(min=torch.finfo(kernel.dtype).tiny).log() + phi[..., None] + psi[:, None]
        return [function(exponents, slice(None))]

    def log_rows(self, psi: torch.Tensor) -> torch.Tensor:
        return self._log_product(self.operator.logmatvec, psi)

    def log_columns(self, phi: torch.Tensor) -> torch.Tensor:
        return self._log_product(self.operator.rlogmatvec, phi)

    def _log_product(self, product: Callable[[torch.Tensor], torch.Tensor], potential: torch.Tensor) -> torch.Tensor:
        """In the dtype of the operator but for the largest potential, which goes past it."""
        top = potential.amax()
        return (product((potential[0] - top).to(self.dtype)).to(potential.dtype) + top)[None]

    def project(self, psi: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        weights = (psi[0] - psi[0].amax()).exp().to(self.dtype)[:, None]
        sums = self.operator.matvec(torch.cat((weights, weights * values[0].to(self.dtype)), 1))
        means = sums[:, 1:] / sums[:, :1]
        return means[None] if bool(means.isfinite().all()) else super().project(psi, values)
