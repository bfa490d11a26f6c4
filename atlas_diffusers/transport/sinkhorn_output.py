"""What an entropic transport problem's solution says: plan, costs and maps, all from its two potentials."""

import math
from dataclasses import dataclass, field
from functools import cached_property, reduce

import torch

from .costs import Cost
from .inputs import log_weights
from .split_costs import PointCost

LARGEST_EXPONENT = 700.0


@dataclass(frozen=True, eq=False)
class SinkhornOutput:
    r"""
    Solution of ``min_P <P, C> + ε KL(P | a bᵀ)`` under the marginals a and b:

        P_ij = a_i b_j exp((f_i + g_j − C_ij)/ε)

    Potentials are in the unit of the cost, and also exist where a weight is zero. Everything else is computed when asked
    for, in blocks of rows; with leading batch dimensions every shape below has them in front. The plan and maps have the
    dtype of the points, everything else is float64.

    Args:
        f, g: potentials, (n,) and (m,).
        a, b: weights.
        epsilon: ε, ().
        row_error: L1 error of the plan's row marginal over the total mass, as the solver measured it, (). Of a relaxed
            marginal: the distance from what is optimal for its potential. Where potentials are so large that their rounding
            shows in the plan, this is the larger error of the two marginals, measured on the plan.
        tolerance: what was asked of it.
        iterations: of the slowest problem, annealing included.
        kernel_applications: products of the kernel with a vector, of all problems together.
        rho: penalties of the marginals, infinite where they are exact.
        geometry: the cost, leading dimensions flattened.
        targets: the points y, (m, d), where there are some.
        dtype: of the plan and of maps, that of the points.
    """

    f: torch.Tensor = field(repr=False)
    g: torch.Tensor = field(repr=False)
    a: torch.Tensor = field(repr=False)
    b: torch.Tensor = field(repr=False)
    epsilon: torch.Tensor
    row_error: torch.Tensor
    tolerance: float
    iterations: int
    kernel_applications: int
    rho: tuple[float, float] = field(repr=False)
    geometry: Cost = field(repr=False)
    targets: torch.Tensor | None = field(repr=False)
    dtype: torch.dtype = field(repr=False)

    @property
    def potentials(self) -> tuple[torch.Tensor, torch.Tensor]:
        """``(f, g)``, a start for another problem."""
        return self.f, self.g

    @cached_property
    def converged(self) -> bool:
        """Whether every problem reached the tolerance."""
        return bool((self.row_error <= self.tolerance).all())

    @cached_property
    def plan(self) -> torch.Tensor:
        """P, (n, m)."""
        blocks = self.geometry.each(lambda exponents, rows: exponents.exp().to(self.dtype), *self._weighted)
        return self._shaped(torch.cat(blocks, -2), 2)

    @cached_property
    def marginals(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Row and column sums of P, (n,) and (m,), measured."""
        rows, columns = self.geometry.sums(*self._weighted)
        return self._shaped(rows, 1), self._shaped(columns, 1)

    @cached_property
    def column_error(self) -> torch.Tensor:
        """As ``row_error``, of the columns; rounding, because the last step of the solver makes them exact."""
        return _distance(self.marginals[1], self.g, self.b, self.rho[1])

    @cached_property
    def measured_error(self) -> torch.Tensor:
        """The larger of the two marginals' errors, measured on the plan with all its rounding, ()."""
        return _distance(self.marginals[0], self.f, self.a, self.rho[0]).maximum(self.column_error)

    @property
    def rounding(self) -> torch.Tensor:
        """How much the rounding of the potentials can move the plan's entries, relative to their size, ()."""
        size = self.f.abs().amax(-1) + self.g.abs().amax(-1)
        return torch.finfo(self.f.dtype).eps * size / self.epsilon

    @cached_property
    def cost(self) -> torch.Tensor:
        """
        Optimal value ``<P, C> + ε KL(P | a bᵀ)`` (plus ``ρ KL`` of a relaxed marginal), by duality, ().

        Its gradient with ``differentiable=True`` needs no linear system, by the envelope theorem.
        """
        f, g = self.f.detach(), self.g.detach()
        value = _dual(f, self.a, self.rho[0]) + _dual(g, self.b, self.rho[1])
        if self.f.requires_grad:
            phi, psi = self._flat(f) / self._epsilon + self._log(self.a), self._flat(g) / self._epsilon + self._log(self.b)
            mass = self._shaped((psi + self.geometry.log_columns(phi)).exp().sum(-1), 0)
        else:
            mass = (self.b if self.rho[1] == math.inf else self.b * _exponents(g, self.rho[1]).exp()).sum(-1)
        return value - self.epsilon * (mass - self.a.sum(-1) * self.b.sum(-1))

    @cached_property
    def transport_cost(self) -> torch.Tensor:
        """``<P, C>``, ()."""
        phi, psi = self._flat(self.f) / self._epsilon, self._flat(self.g) / self._epsilon
        log_a, log_b = self._log(self.a)[..., None], self._log(self.b)[:, None]

        def part(exponents: torch.Tensor, rows: slice) -> torch.Tensor:
            cost = phi[:, rows, None] + psi[:, None] - exponents
            return ((exponents + log_a[:, rows] + log_b).exp() * cost).sum((-2, -1))

        return self._shaped(reduce(torch.add, self.geometry.each(part, phi, psi)) * self._epsilon[:, 0], 0)

    @cached_property
    def effective_size(self) -> torch.Tensor:
        """Number of columns that each row of P is spread over: exp of the entropy of the normalised row, (n,)."""

        def size(exponents: torch.Tensor, rows: slice) -> torch.Tensor:
            return torch.special.entr(exponents.log_softmax(-1).exp()).sum(-1).exp()

        sizes = self.geometry.each(size, torch.zeros_like(self._flat(self.f)), self._weighted[1])
        return self._shaped(torch.cat(sizes, -1).to(self.b.dtype), 1)

    def project(self, values: torch.Tensor) -> torch.Tensor:
        """``Σ_j P_ij values_j / Σ_j P_ij``, the mean of ``values`` (m, k) that each row couples with, (n, k)."""
        values = values.expand(*self.b.shape, values.shape[-1]).reshape(-1, *values.shape[-2:])
        return self._shaped(self.geometry.project(self._weighted[1], values), 2).to(self.dtype)

    def barycentric_map(self, points: torch.Tensor | None = None) -> torch.Tensor:
        """
        ``T(x) = Σ_j P_j(x) y_j`` with ``P_j(x) ∝ b_j exp((g_j − |x − y_j|²)/ε)``: the entropic transport map.

        Args:
            points: x, (k, d), in or out of the sample; by default the sample itself.

        Raises:
            ValueError: where there are no points (use ``project``), or for new points and another cost than |x − y|².
        """
        if self.targets is None:
            raise ValueError("this problem has no points; project(values) averages any values over the columns")
        if points is None:
            return self.project(self.targets)
        if not isinstance(self.geometry, PointCost):
            raise ValueError("new points can be mapped for the cost |x − y|² only, that is a gaussian DirectKernel")
        dtype = self.geometry.dtype
        batch = self.b.shape[:-1]
        x, y = (z.expand(*batch, *z.shape[-2:]).reshape(-1, *z.shape[-2:]).to(dtype) for z in (points, self.targets))
        cost = PointCost(x, y, self.geometry.epsilon, max_bytes=self.geometry.max_bytes)
        mapped = cost.project(self._weighted[1], y)
        return mapped.reshape(*batch, *mapped.shape[1:]).to(self.dtype)

    @property
    def _epsilon(self) -> torch.Tensor:
        return self.geometry.epsilon[:, None]

    @property
    def _weighted(self) -> tuple[torch.Tensor, torch.Tensor]:
        """``f/ε + log a`` and ``g/ε + log b``, (batch, n) and (batch, m)."""
        sides = (self.f, self.a), (self.g, self.b)
        phi, psi = (self._flat(potential) / self._epsilon + self._log(weights) for potential, weights in sides)
        return phi, psi

    def _flat(self, values: torch.Tensor) -> torch.Tensor:
        return values.reshape(-1, values.shape[-1])

    def _log(self, weights: torch.Tensor) -> torch.Tensor:
        return log_weights(self._flat(weights))

    def _shaped(self, values: torch.Tensor, dimensions: int) -> torch.Tensor:
        """The leading dimensions of the problem before the last ones."""
        return values.reshape((*self.b.shape[:-1], *values.shape[values.ndim - dimensions :]))


def _distance(marginal: torch.Tensor, potential: torch.Tensor, weights: torch.Tensor, rho: float) -> torch.Tensor:
    """L1 distance of a marginal from the weights, or from what is optimal for a relaxed one's potential, over their total."""
    target = weights if rho == math.inf else weights * _exponents(potential, rho).exp()
    return (marginal - target).abs().sum(-1) / weights.sum(-1)


def _dual(potential: torch.Tensor, weights: torch.Tensor, rho: float) -> torch.Tensor:
    if rho == math.inf:
        return (weights * potential).sum(-1)
    return -rho * (weights * _exponents(potential, rho).expm1()).sum(-1)


def _exponents(potential: torch.Tensor, rho: float) -> torch.Tensor:
    """Log of a relaxed marginal over its weights; a point without weight may ask for more than there are numbers for."""
    return (-potential / rho).clamp(max=LARGEST_EXPONENT)
