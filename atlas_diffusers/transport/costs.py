"""Transport costs as the solver and its output see them: block by block, potentials included."""

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch

from ..kernels import GridKernel, KernelOperator

BLOCK_BYTES = 2**26


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

    @abstractmethod
    def blocks(self, phi: torch.Tensor, psi: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """Row ranges and their exponents, (batch, rows, m), for potentials (batch, n) and (batch, m)."""

    def log_rows(self, psi: torch.Tensor) -> torch.Tensor:
        """``log Σ_j e^{ψ_j − C_ij/ε}``, (batch, n)."""
        zero = psi.new_zeros(self.shape[:2])
        return torch.cat([block.logsumexp(-1) for _, block in self.blocks(zero, psi)], -1).to(psi.dtype)

    def log_columns(self, phi: torch.Tensor) -> torch.Tensor:
        """``log Σ_i e^{φ_i − C_ij/ε}``, (batch, m)."""
        zero = phi.new_zeros(self.shape[0], self.shape[2])
        return torch.stack([block.logsumexp(-2).to(phi.dtype) for _, block in self.blocks(phi, zero)]).logsumexp(0)

    def project(self, psi: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Averages of ``values`` (batch, m, k) with weights ∝ ``e^{ψ_j − C_ij/ε}``, (batch, n, k)."""
        zero = psi.new_zeros(self.shape[:2])
        return torch.cat([block.softmax(-1) @ values.to(block.dtype) for _, block in self.blocks(zero, psi)], -2)


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
    """

    def __init__(
        self,
        x: torch.Tensor,
        y: torch.Tensor,
        epsilon: torch.Tensor,
        a: torch.Tensor | None = None,
        b: torch.Tensor | None = None,
    ):
        self.epsilon = epsilon
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

    def blocks(self, phi: torch.Tensor, psi: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        epsilon = self.epsilon[:, None]
        phi, psi = phi - self.row_term / epsilon, psi - self.column_term / epsilon
        phi, psi = phi.to(self.x.dtype)[..., None], psi.to(self.x.dtype)[:, None]
        x = self.x * (2 / epsilon).to(self.x.dtype)[..., None]
        step = max(1, BLOCK_BYTES // (self.shape[0] * self.shape[2] * x.itemsize))
        for start in range(0, self.shape[1], step):
            rows = slice(start, start + step)
            yield rows, x[:, rows] @ self.y.mT + phi[:, rows] + psi


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
        self.operator, self.epsilon = operator, epsilon
        self.shape = (1, *operator.shape)
        self.dtype = torch.float64 if isinstance(operator, GridKernel) else operator.dtype
        self._of_points = None if points is None else PointCost(*(z[None].to(self.dtype) for z in points), epsilon)

    def blocks(self, phi: torch.Tensor, psi: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """Those of the points, or one of the dense kernel."""
        if self._of_points is not None:
            yield from self._of_points.blocks(phi, psi)
            return
        kernel = self.operator.dense().to(phi.dtype)
        yield slice(None), kernel.clamp(min=torch.finfo(kernel.dtype).tiny).log() + phi[..., None] + psi[:, None]

    def log_rows(self, psi: torch.Tensor) -> torch.Tensor:
        return self.operator.logmatvec(psi[0].to(self.dtype)).to(psi.dtype)[None]

    def log_columns(self, phi: torch.Tensor) -> torch.Tensor:
        return self.operator.rlogmatvec(phi[0].to(self.dtype)).to(phi.dtype)[None]

    def project(self, psi: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        weights = (psi[0] - psi[0].amax()).exp().to(self.dtype)[:, None]
        sums = self.operator.matvec(torch.cat((weights, weights * values[0].to(self.dtype)), 1))
        means = sums[:, 1:] / sums[:, :1]
        return means[None] if bool(means.isfinite().all()) else super().project(psi, values)
