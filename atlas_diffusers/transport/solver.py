"""Entropic transport of points and cost matrices: the precision, start and annealing of the solver."""

import math
from dataclasses import replace

import torch

from .fixed_point import FixedPoint, SinkhornMap
from .geometry import Geometry
from .inputs import Init, Marginals, Options
from .penalties import penalties
from .potentials import Potentials
from .small import CACHE_ENTRIES, SmallSolver, Stage
from .split_costs import SplitCost
from .stabilised import SplitKernel

SINGLE_TOLERANCE = 1e-5  # from here on a float32 kernel is accurate enough,
SINGLE_WEIGHT = 1e-12  # unless weights are smaller than this fraction of the largest
UNIT_ROUNDOFF = 2.0**-24
SWEPT_SIZE, MOST_SWEEPS = 2048, 8  # the smaller the kernel, the more plain iterations cost as much as one acceleration
ANNEAL_BELOW, ANNEAL_FACTOR = 0.01, 4.0  # of the mean cost
WARM_ITERATIONS = 30  # that a start may take where it could be replaced by annealing


class Solver:
    """
    Solves for potentials, in the precision that the tolerance needs.

    Args:
        geometry: between what, without gradients.
        epsilon: of each problem.
        marginals: weights.
        rho: penalties of the two marginals, infinite where they are exact.
        options: tolerance and limits.
    """

    def __init__(
        self,
        geometry: Geometry,
        epsilon: list[float],
        marginals: Marginals,
        rho: tuple[float, float],
        options: Options,
    ):
        self.geometry, self.epsilon, self.marginals, self.rho, self.options = geometry, epsilon, marginals, rho, options
        if marginals.has_zeros:
            self.geometry = geometry.without(marginals)
        self.applications, self.rounding = 0, math.inf
        wide = options.tolerance < SINGLE_TOLERANCE or 0 < marginals.smallest < SINGLE_WEIGHT
        self.dtype = self._product_dtype = torch.float64 if wide else torch.float32
        self.cost = self._cost()
        self._reaches, self._rungs = [math.inf] * len(epsilon), [0] * len(epsilon)
        if options.reads:
            self._survey()

    def _cost(self) -> SplitCost:
        epsilon = torch.tensor(self.epsilon, dtype=torch.float64, device=self.geometry.device)
        double = self.dtype == torch.float64 or not self.options.reads
        return self.geometry.cost(epsilon, self.options.max_bytes, double)

    def _survey(self) -> None:
        """Read the sizes of the exponents, once, and choose dtypes and the number of annealing steps by them."""
        extents, tolerance = self.cost.survey(), self.options.tolerance
        if self.dtype == torch.float32:
            largest = max(extent.diameter / epsilon for extent, epsilon in zip(extents, self.epsilon))
            if not UNIT_ROUNDOFF * largest <= tolerance / 4:
                self.dtype = self._product_dtype = torch.float64
                self.cost = self._cost()
                extents = self.cost.survey()
        self._reaches = [extent.reach / epsilon for extent, epsilon in zip(extents, self.epsilon)]
        if not math.isfinite(max(self._reaches)):
            raise ValueError(self.geometry.finite)
        if self.rho == (math.inf, math.inf):  # potentials of a solution lie within twice the diameter
            largest = max(extent.diameter / epsilon for extent, epsilon in zip(extents, self.epsilon))
            self.rounding = 4 * torch.finfo(torch.float64).eps * largest
        if UNIT_ROUNDOFF * max(self._reaches) <= tolerance / 2:
            self._product_dtype = torch.float32
        ratios = [ANNEAL_BELOW * extent.mean / epsilon for extent, epsilon in zip(extents, self.epsilon)]
        self._rungs = [math.ceil(math.log(max(ratio, 1), ANNEAL_FACTOR)) for ratio in ratios]

    def solve(self, init: Init | None) -> Potentials:
        """Potentials started from ``init``, or from where the cost says."""
        limit, top = self.options.max_iterations, max(self._rungs)
        if init is None:
            solution = self._solve_small() if self._is_small else None
            solution = solution or self._anneal(top, 0)
        else:
            solution = self._stage(0, self._in_range(init), min(limit, WARM_ITERATIONS) if top else limit, 1)
            if top and not bool((solution.error <= self.options.tolerance).all()):
                solution = self._anneal(top, solution.iterations)
        return replace(solution, f=solution.f + self.cost.row_term, g=solution.g + self.cost.column_term)

    def _anneal(self, top: int, used: int) -> Potentials:
        """Inner potentials, rung by rung; ``used`` iterations are counted already."""
        inner = None
        for rung in range(top, 0, -1):
            stage = self._stage(rung, inner, self.options.max_iterations - used, self._sweeps)
            inner, used = (stage.f, stage.g), used + stage.iterations
        last = self._stage(0, inner, self.options.max_iterations - used, self._sweeps)
        return replace(last, iterations=used + last.iterations)

    @property
    def _is_small(self) -> bool:
        """Whether the fused loop serves: one problem that fits the cache, with exact marginals, read at every iteration."""
        entries, marginals = math.prod(self.cost.shape), self.marginals
        return (
            entries <= CACHE_ENTRIES
            and len(self.epsilon) == 1
            and self.rho == (math.inf, math.inf)
            and self.options.check_every == 1
            and entries * self.dtype.itemsize <= self.options.max_bytes
            and not marginals.has_zeros
            and self.geometry.device.type == "cpu"
        )

    def _solve_small(self) -> Potentials | None:
        (epsilon,), (reach,), (top,) = self.epsilon, self._reaches, self._rungs
        factors = [ANNEAL_FACTOR**rung for rung in range(top, -1, -1)]
        stages = [Stage(epsilon * factor, reach / factor, self._tolerance(factor > 1)) for factor in factors]
        small = SmallSolver(self.cost, self.marginals, self.dtype)
        solution = small.solve(stages, self.options.max_iterations)
        self.applications += small.applications
        return solution

    def _tolerance(self, on_the_way: bool) -> float:
        """Of a stage: that of annealing is looser."""
        tolerance = self.options.tolerance
        return min(max(3 * tolerance, 3e-4), 3e-3) if on_the_way else tolerance

    def _in_range(self, init: Init) -> Init:
        """
        Inner potentials of a start, brought into the range of a solution's: softened minima of ``C_ij − g_j`` differ by no
        more than costs do, and larger ones would leave no digits for the plan. Where both marginals are exact, the constant
        between the potentials goes as well.
        """
        bound, (f, g) = self.cost.diameters() / 2, init
        middle = (g.amin(-1, keepdim=True) + g.amax(-1, keepdim=True)) / 2
        g = (g - middle).clamp(-bound, bound)
        if f is not None:
            f_middle = (f.amin(-1, keepdim=True) + f.amax(-1, keepdim=True)) / 2
            f = f_middle + middle + (f - f_middle).clamp(-bound, bound)
        if self.rho != (math.inf, math.inf):
            f, g = None if f is None else f - middle, g + middle
        return None if f is None else f - self.cost.row_term, g - self.cost.column_term

    @property
    def _sweeps(self) -> int:
        """Iterations at once: one from a good start, and where the host does not read that potentials have escaped."""
        return min(max(SWEPT_SIZE // math.isqrt(math.prod(self.cost.shape)), 1), MOST_SWEEPS) if self.options.reads else 1

    def _stage(self, rung: int, inner: Init | None, max_iterations: int, sweeps: int) -> Potentials:
        """Inner potentials at ``4^rung ε``, or at a problem's own top rung where that is lower."""
        factors = [ANNEAL_FACTOR ** min(rung, top) for top in self._rungs]
        epsilon = [value * factor for value, factor in zip(self.epsilon, factors)]
        reach = max(reach / factor for reach, factor in zip(self._reaches, factors))
        f, g = self._first(epsilon) if inner is None else inner
        column = torch.tensor(epsilon, dtype=torch.float64, device=self.geometry.device)[:, None]
        psi = g / column
        precision = self.dtype, self._product_dtype, self.options.max_bytes
        kernel = SplitKernel(self.cost, epsilon, self.marginals, psi, reach, *precision)
        weights = self.marginals.a / self.marginals.a.sum(-1, keepdim=True)
        terms = self.cost.row_term, self.cost.column_term
        step = SinkhornMap(kernel, weights, *penalties(self.rho, column, terms), sweeps)
        if inner is None and not kernel.is_flat:
            phi = kernel.phi
        else:
            phi = step.image(psi) if f is None else f / column
        solution = FixedPoint(step, self._tolerance(rung > 0), max(1, max_iterations), self.options.check_every).solve(phi, psi)
        self.applications += kernel.applications
        return solution.times(column)

    def _first(self, epsilon: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
        """Where the cost starts; if a marginal is relaxed, with whole potentials of one mean."""
        f, g = self.cost.start(epsilon)
        if self.rho == (math.inf, math.inf):
            return f, g
        gap = ((f + self.cost.row_term).mean(-1, keepdim=True) - (g + self.cost.column_term).mean(-1, keepdim=True)) / 2
        return f - gap, g + gap
