"""Entropic transport of point clouds: the precision, start and annealing of the solver."""

import math
from dataclasses import dataclass

import torch

from .costs import PointCost
from .fixed_point import FixedPoint, SinkhornMap, Solution
from .inputs import Marginals, Options
from .penalties import penalties
from .stabilised import PointKernel

SINGLE_TOLERANCE = 1e-5  # from here on a float32 kernel is accurate enough,
SINGLE_WEIGHT = 1e-12  # unless weights are smaller than this fraction of the largest
UNIT_ROUNDOFF = 2.0**-24
PAIRS = 64  # that measure the directions two clouds share
SWEPT_SIZE, MOST_SWEEPS = 2048, 8  # the smaller the kernel, the more plain iterations cost as much as one acceleration
ANNEAL_BELOW, ANNEAL_FACTOR = 0.01, 4.0  # of the mean cost
WARM_ITERATIONS = 30  # that a start may take where it could be replaced by annealing

Init = tuple[torch.Tensor | None, torch.Tensor]


@dataclass(frozen=True)
class Extent:
    """
    Size of a problem as read on the host.

    Args:
        x_mean, y_mean: mean squared norms of the centred points.
        x_max, y_max: largest squared norms.
        shift: squared distance of the means.
        shared: mean of ``(x'·y')²`` over pairs.
        dimension: of the space.
    """

    x_mean: float
    y_mean: float
    x_max: float
    y_max: float
    shift: float
    shared: float
    dimension: int

    @property
    def reach(self) -> float:
        """Bound of ``|2 x'·y'|``."""
        return 2 * math.sqrt(self.x_max) * math.sqrt(self.y_max)

    @property
    def diameter(self) -> float:
        """Bound of the squared distances and of the separable terms."""
        return (math.sqrt(self.x_max) + math.sqrt(self.y_max) + math.sqrt(self.shift)) ** 2

    def slope(self, epsilon: float) -> float:
        r"""
        ``t`` of the potentials ``f = −t |x'|²/s_x``, ``g = −t |y'|²/s_y`` between isotropic Gaussians of these sizes s:

            t = √(s_x s_y + (εd/4)²) − εd/4,    d = s_x s_y / E (x'·y')², the number of directions that they share

        Janati et al. 2020 (arXiv 2006.02572), equation 8.
        """
        product = self.x_mean * self.y_mean
        directions = min(max(product / self.shared, 1.0), self.dimension) if self.shared > 0 else self.dimension
        regular = epsilon * directions / 4
        return product / (math.sqrt(product + regular**2) + regular)


class PointSolver:
    """
    Solves for the potentials of two clouds, in the precision that the tolerance needs.

    Args:
        x: (batch, n, d).
        y: (batch, m, d).
        epsilon: of each problem.
        marginals: weights.
        rho: penalties of the two marginals, infinite where they are exact.
        options: tolerance and limits.
    """

    def __init__(
        self,
        x: torch.Tensor,
        y: torch.Tensor,
        epsilon: list[float],
        marginals: Marginals,
        rho: tuple[float, float],
        options: Options,
    ):
        self.points, self.epsilon, self.marginals, self.rho, self.options = (x, y), epsilon, marginals, rho, options
        self.applications = 0
        wide = options.tolerance < SINGLE_TOLERANCE or 0 < marginals.smallest < SINGLE_WEIGHT
        self.dtype = self._product_dtype = torch.float64 if wide else torch.float32
        self._centre()
        self._reaches, self._rungs, self._extents = [math.inf] * len(x), [0] * len(x), None
        if options.reads:
            self._survey()

    def _centre(self) -> None:
        exact = self.dtype == torch.float64 or not self.options.reads
        x, y = (z.double() if exact else z for z in self.points)
        if self.marginals.has_zeros:
            no_a, no_b = self.marginals.negligible()
            x, y = _without_zeros(x, self.marginals.a, no_a), _without_zeros(y, self.marginals.b, no_b)
        epsilon = torch.tensor(self.epsilon, dtype=torch.float64, device=x.device)
        self.cost = PointCost(x, y, epsilon, max_bytes=self.options.max_bytes)

    def _survey(self) -> None:
        """Read the sizes of the exponents, once, and choose dtypes and the number of annealing steps by them."""
        extents, tolerance = self._read(), self.options.tolerance
        if self.dtype == torch.float32:
            largest = max(extent.diameter / epsilon for extent, epsilon in zip(extents, self.epsilon))
            if not UNIT_ROUNDOFF * largest <= tolerance / 4:
                self.dtype = self._product_dtype = torch.float64
                self._centre()
                extents = self._read()
        self._extents = extents
        self._reaches = [extent.reach / epsilon for extent, epsilon in zip(extents, self.epsilon)]
        if not math.isfinite(max(self._reaches)):
            raise ValueError("points x and y must be finite, and so must their squared distances over epsilon")
        if UNIT_ROUNDOFF * max(self._reaches) <= tolerance / 2:
            self._product_dtype = torch.float32
        ratios = [ANNEAL_BELOW * (e.x_mean + e.y_mean) / epsilon for e, epsilon in zip(extents, self.epsilon)]
        self._rungs = [math.ceil(math.log(max(ratio, 1), ANNEAL_FACTOR)) for ratio in ratios]

    def _read(self) -> list[Extent]:
        cost = self.cost
        pairs = min(PAIRS, max(1, min(cost.shape[1:]) - 1))
        shared = (cost.x[:, :pairs] * cost.y[:, -pairs:]).sum(-1).square().mean(-1)
        sizes = cost.x_norm.mean(-1), cost.y_norm.mean(-1), cost.x_norm.amax(-1), cost.y_norm.amax(-1)
        values = torch.stack((*sizes, cost.shift_norm[:, 0], shared), -1).tolist()
        return [Extent(*row, dimension=cost.x.shape[-1]) for row in values]

    def solve(self, init: Init | None) -> Solution:
        """Potentials in the unit of the cost, started from ``init`` or between Gaussians."""
        terms, limit, top = (self.cost.row_term, self.cost.column_term), self.options.max_iterations, max(self._rungs)
        solution, iterations = None, 0
        if init is not None:
            inner = self._in_range(init, terms)
            solution = self._stage(0, inner, terms, min(limit, WARM_ITERATIONS) if top else limit, 1)
            iterations, good = solution.iterations, not top or bool((solution.error <= self.options.tolerance).all())
        if init is None or not good:
            inner = None
            for rung in range(top, -1, -1):
                solution = self._stage(rung, inner, terms, limit - iterations, self._sweeps)
                inner, iterations = (solution.phi, solution.psi), iterations + solution.iterations
        return Solution(solution.phi + terms[0], solution.psi + terms[1], solution.error, iterations)

    def _in_range(self, init: Init, terms: tuple[torch.Tensor, torch.Tensor]) -> Init:
        """
        Inner potentials of a start, brought into the range of a solution's: softened minima of ``C_ij − g_j`` differ by no
        more than costs do, and larger ones would leave no digits for the plan. Where both marginals are exact, the constant
        between the potentials goes as well.
        """
        cost = self.cost
        bound = ((cost.x_norm.amax(-1).sqrt() + cost.y_norm.amax(-1).sqrt() + cost.shift_norm[:, 0].sqrt()) ** 2)[:, None] / 2
        f, g = init
        middle = (g.amin(-1, keepdim=True) + g.amax(-1, keepdim=True)) / 2
        g = (g - middle).clamp(-bound, bound)
        if f is not None:
            f_middle = (f.amin(-1, keepdim=True) + f.amax(-1, keepdim=True)) / 2
            f = f_middle + middle + (f - f_middle).clamp(-bound, bound)
        if self.rho != (math.inf, math.inf):
            f, g = None if f is None else f - middle, g + middle
        return None if f is None else f - terms[0], g - terms[1]

    @property
    def _sweeps(self) -> int:
        """Iterations at once: one from a good start, and where the host does not read that potentials have escaped."""
        return min(max(SWEPT_SIZE // math.isqrt(math.prod(self.cost.shape)), 1), MOST_SWEEPS) if self.options.reads else 1

    def _stage(self, rung: int, inner: Init | None, terms, max_iterations: int, sweeps: int) -> Solution:
        """Inner potentials at ``4^rung ε``, or at a problem's own top rung where that is lower."""
        tolerance = self.options.tolerance
        if rung:
            tolerance = min(max(3 * tolerance, 3e-4), 3e-3)
        factors = [ANNEAL_FACTOR ** min(rung, top) for top in self._rungs]
        epsilon = [value * factor for value, factor in zip(self.epsilon, factors)]
        reach = max(reach / factor for reach, factor in zip(self._reaches, factors))
        f, g = self._gaussian_potentials(epsilon, terms) if inner is None else inner
        column = self._column(epsilon)
        psi = g / column
        precision = self.dtype, self._product_dtype, self.options.max_bytes
        kernel = PointKernel(self.cost, epsilon, self.marginals, psi, reach, *precision)
        weights = self.marginals.a / self.marginals.a.sum(-1, keepdim=True)
        step = SinkhornMap(kernel, weights, *penalties(self.rho, column, terms), sweeps)
        if inner is None and not kernel.is_flat:
            phi = kernel.phi
        else:
            phi = step.image(psi) if f is None else f / column
        solution = FixedPoint(step, tolerance, max(1, max_iterations), self.options.check_every).solve(phi, psi)
        self.applications += kernel.applications
        solution.phi, solution.psi = solution.phi * column, solution.psi * column
        return solution

    def _column(self, values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64, device=self.cost.x.device)[:, None]

    def _gaussian_potentials(self, epsilon: list[float], terms) -> tuple[torch.Tensor, torch.Tensor]:
        """Those of :meth:`Extent.slope`; f = g = 0 where sizes have not been read; of one mean if marginals are relaxed."""
        if self._extents is None:
            f, g = -self.cost.x_norm.double(), -self.cost.y_norm.double()
        else:
            slopes = [extent.slope(value) for extent, value in zip(self._extents, epsilon)]
            means = [e.x_mean for e in self._extents], [e.y_mean for e in self._extents]
            f, g = ([-slope / mean if mean else 0.0 for slope, mean in zip(slopes, side)] for side in means)
            f, g = self.cost.x_norm * self._column(f), self.cost.y_norm * self._column(g)
        if self.rho == (math.inf, math.inf):
            return f, g
        gap = ((f + terms[0]).mean(-1, keepdim=True) - (g + terms[1]).mean(-1, keepdim=True)) / 2
        return f - gap, g + gap


def _without_zeros(points: torch.Tensor, weights: torch.Tensor, negligible: torch.Tensor) -> torch.Tensor:
    """Points of negligible weight moved onto the heaviest one, where they cannot disturb the kernel."""
    heaviest = torch.take_along_dim(points, weights.argmax(-1)[:, None, None], 1)
    return torch.where(negligible[..., None], heaviest, points)
