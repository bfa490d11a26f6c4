"""Problems that fit the cache: one fused loop of few calls, on one thread."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from .anderson import AndersonMixing
from .fixed_point import WORSE
from .inputs import Marginals
from .potentials import Potentials
from .split_costs import SplitCost

FLAT = 0.75  # of a kernel's range: with smaller exponents it needs no reference
CACHE_ENTRIES = 2**17  # of a kernel, which then takes half a megabyte in float32
FIRST_SWEEPS, SWEEPS = 2, 8  # iterations before the error is looked at: at first, and after that


@contextmanager
def one_thread(entries: int) -> Iterator[None]:
    """
    No more than one thread for arrays of so many entries if they fit the cache: several would wait for each other, which on a
    busy machine takes ten times as long as the work. The setting is restored.
    """
    threads = torch.get_num_threads()
    if threads == 1 or entries > CACHE_ENTRIES:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Stage(NamedTuple):
    """A problem on the way to the last: ε, the bound of ``|M|/ε``, and the tolerance of the row error."""

    epsilon: float
    reach: float
    tolerance: float


class SmallSolver:
    r"""
    Sinkhorn's algorithm for one problem with exact marginals, ``v = b/(Kᵀ u)`` and ``u = a/(K v)``, on a kernel
    ``K = exp(φ⁰ + ψ⁰ + M/ε)``; accelerated as :class:`~atlas_diffusers.transport.fixed_point.FixedPoint` is.

    Args:
        cost: of a batch of one.
        marginals: weights, none negligible.
        dtype: of the kernel.
    """

    def __init__(self, cost: SplitCost, marginals: Marginals, dtype: torch.dtype):
        self.cost, self.dtype, self.applications = cost, dtype, 0
        self.a, self.b = marginals.a[0].to(dtype), marginals.b[0].to(dtype)
        self.total = float(self.a.sum())
        self._products, self._bound = cost.products(dtype), -math.log(torch.finfo(dtype).tiny) / 2
        self._kernel = torch.empty(cost.shape[1:], dtype=dtype)
        self._u, self._rows = torch.empty_like(self.a), torch.empty_like(self.a)
        self._v, self._columns = torch.empty_like(self.b), torch.empty_like(self.b)

    def solve(self, stages: list[Stage], limit: int) -> Potentials | None:
        """
        Inner potentials of the last stage in the unit of the cost; ``None`` if they leave the range of the kernel.

        Args:
            stages: with falling ε.
            limit: of iterations, of all stages together.
        """
        g, used = self.cost.start([stages[0].epsilon])[1][0], 0
        for stage in stages:
            if not self._iterate(stage, g / stage.epsilon, max(1, limit - used)):
                return None
            phi, psi = self._potentials()
            f, g, used = phi * stage.epsilon, psi * stage.epsilon, used + self._count
        error = torch.tensor([self._error], dtype=torch.float64)
        return Potentials(f[None], g[None], error, used)

    def _iterate(self, stage: Stage, psi: torch.Tensor, limit: int) -> bool:
        """From column potentials over ε until the tolerance or the limit; whether that went well."""
        phi, mixing, best, absorbed, last = self._refer(psi, stage), AndersonMixing(), math.inf, True, psi
        for self._count in range(1, limit + 1):
            self._sweep(FIRST_SWEEPS if self._count == 1 else SWEEPS)
            excess = torch.linalg.vector_norm(torch.addcmul(-self.a, self._u, self._rows), 1)
            self._error, distance = torch.stack((excess, phi.abs().amax().to(self.dtype))).tolist()
            self._error /= self.total
            if not (distance <= self._bound and math.isfinite(self._error)):
                if absorbed:
                    return False
                phi, mixing, absorbed = self._refer(last, stage), AndersonMixing(), True
                continue
            absorbed = False
            if self._error <= stage.tolerance:
                return True
            last, image = self._potentials()[1], self._rows.log().double().neg_()
            residual = phi - image
            shift = residual.mean()  # a constant may move from ψ to φ: keep the mean of φ
            image, residual = image + shift, residual - shift
            if self._error < best:
                best, best_image, best_residual = self._error, image, residual
            elif not self._error <= WORSE * best:
                mixing, image, residual = AndersonMixing(), best_image, best_residual
            phi = mixing.step(image[None], residual[None])[0]
            self._start(phi)
        if best < math.inf:
            self._start(best_image)
            self._sweep(1)
            excess = torch.linalg.vector_norm(torch.addcmul(-self.a, self._u, self._rows), 1)
            self._error = excess.item() / self.total
        return math.isfinite(self._error)

    def _start(self, phi: torch.Tensor) -> None:
        torch.mul(self.a, phi.exp().to(self.dtype), out=self._u)

    def _sweep(self, count: int) -> None:
        """Iterations from u; afterwards u, v and ``K v`` are those of the last plan."""
        kernel, transposed = self._kernel, self._kernel.mT
        for index in range(count):
            if index:
                torch.div(self.a, self._rows, out=self._u)
            torch.mv(transposed, self._u, out=self._columns)
            torch.div(self.b, self._columns, out=self._v)
            torch.mv(kernel, self._v, out=self._rows)
        self.applications += 2 * count

    def _potentials(self) -> tuple[torch.Tensor, torch.Tensor]:
        """φ and ψ of the last plan, float64."""
        return (self._u / self.a).log().double() + self._phi, (self._v / self.b).log().double() + self._psi

    def _refer(self, psi: torch.Tensor, stage: Stage) -> torch.Tensor:
        """Build the kernel about column potentials (about none where it is flat), and start from them: φ relative to it."""
        kernel = self._products(0, slice(None), 1 / stage.epsilon, out=self._kernel)
        if stage.reach <= FLAT * self._bound:
            self._phi, self._psi = 0.0, 0.0
            kernel.exp_()
            torch.mul(self.b, psi.clamp(-self._bound, self._bound).exp_(), out=self._v)
        else:
            psi = psi + self.b.double().log()
            constant = psi.amax()
            offset = (psi - constant).to(self.dtype)
            top = kernel.add_(offset).amax(1)
            peak = kernel.sub_(top[:, None]).amax(0)
            kernel.sub_(peak).exp_()
            self._phi, self._psi = -top.double() - constant, (offset - peak).double() + constant
            torch.exp(peak, out=self._v)
        torch.mv(kernel, self._v, out=self._rows)
        torch.div(self.a, self._rows, out=self._u)
        return self._rows.log().double().neg_()
