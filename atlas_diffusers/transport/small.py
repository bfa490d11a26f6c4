"""Problems that fit the cache: one fused loop of few calls, on one thread."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch

from .anderson import RIDGE
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


class SmallMixing:
    """:class:`~atlas_diffusers.transport.anderson.AndersonMixing` of one problem in NumPy, whose Gram matrix is made anew."""

    def __init__(self, depth: int = 16):
        self.depth, self._count, self._last = depth, 0, None

    def step(self, image: np.ndarray, residual: np.ndarray) -> np.ndarray:
        """The next point, from ``T(x)`` and ``x − T(x)``, all (size,)."""
        last, self._last = self._last, (image, residual)
        if last is None:
            self._images, self._residuals = (np.empty((self.depth, len(image))) for _ in range(2))
            return image
        slot = self._count % self.depth
        np.subtract(image, last[0], out=self._images[slot])
        np.subtract(residual, last[1], out=self._residuals[slot])
        self._count += 1
        if self._count < 2:
            return image
        used = min(self._count, self.depth)
        images, residuals = self._images[:used], self._residuals[:used]
        gram = residuals @ residuals.T
        gram.flat[:: used + 1] = gram.flat[:: used + 1] * (1 + RIDGE) + np.finfo(gram.dtype).tiny
        return image - np.linalg.solve(gram, residuals @ residual) @ images


class Stage(NamedTuple):
    """A problem on the way to the last: ε, the bound of ``|M|/ε``, and the tolerance of the row error."""

    epsilon: float
    reach: float
    tolerance: float


class SmallSolver:
    r"""
    Sinkhorn's algorithm for one problem with exact marginals, ``v = b/(Kᵀ u)`` and ``u = a/(K v)``, on a kernel
    ``K = exp(φ⁰ + ψ⁰ + M/ε)``; accelerated as :class:`~atlas_diffusers.transport.fixed_point.FixedPoint` is.

    Vectors are NumPy's views of tensors: short ones take it a third of PyTorch's time.

    Args:
        cost: of a batch of one.
        marginals: weights, none negligible.
        dtype: of the kernel.
    """

    def __init__(self, cost: SplitCost, marginals: Marginals, dtype: torch.dtype):
        self.cost, self.applications = cost, 0
        self.a, self.b = marginals.a[0].to(dtype).numpy(), marginals.b[0].to(dtype).numpy()
        self.total = float(self.a.sum())
        self._products, self._bound = cost.products(dtype), -math.log(torch.finfo(dtype).tiny) / 2
        self._kernel = torch.empty(cost.shape[1:], dtype=dtype)
        self._scalings = [torch.empty(size, dtype=dtype) for size in cost.shape[1:]]
        self._sums = [torch.empty_like(scaling) for scaling in self._scalings]
        (self._u, self._v), (self._rows, self._columns) = ([z.numpy() for z in pair] for pair in (self._scalings, self._sums))
        self._excess = np.empty_like(self._u)

    def solve(self, stages: list[Stage], limit: int) -> Potentials | None:
        """
        Inner potentials of the last stage in the unit of the cost; ``None`` if they leave the range of the kernel.

        Args:
            stages: with falling ε.
            limit: of iterations, of all stages together.
        """
        f, g, used = None, self.cost.start([stages[0].epsilon])[1][0].numpy(), 0
        with np.errstate(all="ignore"):
            for stage in stages:
                if not self._iterate(stage, g / stage.epsilon, max(1, limit - used)):
                    return None
                phi, psi = self._potentials()
                f, g, used = phi * stage.epsilon, psi * stage.epsilon, used + self._count
        error = torch.tensor([self._error], dtype=torch.float64)
        return Potentials(torch.from_numpy(f)[None], torch.from_numpy(g)[None], error, used)

    def _iterate(self, stage: Stage, psi: np.ndarray, limit: int) -> bool:
        """From column potentials over ε until the tolerance or the limit; whether that went well."""
        phi, mixing, best, absorbed, last = self._refer(psi, stage), SmallMixing(), math.inf, True, psi
        best_image = best_residual = phi
        for self._count in range(1, limit + 1):
            self._sweep(FIRST_SWEEPS if self._count == 1 else SWEEPS)
            if not (np.abs(phi).max() <= self._bound and math.isfinite(self._error)):
                if absorbed:
                    return False
                phi, mixing, absorbed = self._refer(last, stage), SmallMixing(), True
                continue
            absorbed = False
            if self._error <= stage.tolerance:
                return True
            last, image = self._potentials()[1], -np.log(self._rows).astype(np.float64)
            residual = phi - image
            shift = residual.mean()  # a constant may move from ψ to φ: keep the mean of φ
            image, residual = image + shift, residual - shift
            if self._error < best:
                best, best_image, best_residual = self._error, image, residual
            elif not self._error <= WORSE * best:
                mixing, image, residual = SmallMixing(), best_image, best_residual
            phi = mixing.step(image, residual)
            self._start(phi)
        if best < math.inf:
            self._start(best_image)
            self._sweep(1)
        return math.isfinite(self._error)

    def _start(self, phi: np.ndarray) -> None:
        np.multiply(self.a, np.exp(phi), out=self._u, casting="same_kind")

    def _sweep(self, count: int) -> None:
        """Iterations from u; afterwards u, v and ``K v`` are those of the last plan, and its row error is known."""
        kernel, transposed, (u, v), (rows, columns) = self._kernel, self._kernel.mT, self._scalings, self._sums
        for index in range(count):
            if index:
                np.divide(self.a, self._rows, out=self._u)
            torch.mv(transposed, u, out=columns)
            np.divide(self.b, self._columns, out=self._v)
            torch.mv(kernel, v, out=rows)
        self.applications += 2 * count
        excess = np.subtract(np.multiply(self._u, self._rows, out=self._excess), self.a, out=self._excess)
        self._error = float(np.abs(excess, out=excess).sum()) / self.total

    def _potentials(self) -> tuple[np.ndarray, np.ndarray]:
        """φ and ψ of the last plan, float64."""
        return np.log(self._u / self.a) + self._phi, np.log(self._v / self.b) + self._psi

    def _refer(self, psi: np.ndarray, stage: Stage) -> np.ndarray:
        """Build the kernel about column potentials (about none where it is flat), and start from them: φ relative to it."""
        kernel = self._products(0, slice(None), 1 / stage.epsilon, out=self._kernel).numpy()
        if stage.reach <= FLAT * self._bound:
            self._phi, self._psi = np.float64(0), np.float64(0)
            np.exp(kernel, out=kernel)
            np.multiply(self.b, np.exp(psi.clip(-self._bound, self._bound)), out=self._v, casting="same_kind")
        else:
            psi = psi + np.log(self.b.astype(np.float64))
            constant = psi.max()
            offset = (psi - constant).astype(kernel.dtype)
            kernel += offset
            top = kernel.max(1)
            kernel -= top[:, None]
            peak = kernel.max(0)
            kernel -= peak
            np.exp(kernel, out=kernel)
            self._phi, self._psi = -top.astype(np.float64) - constant, (offset - peak).astype(np.float64) + constant
            np.exp(peak, out=self._v)
        torch.mv(self._kernel, self._scalings[1], out=self._sums[0])
        np.divide(self.a, self._rows, out=self._u)
        return -np.log(self._rows).astype(np.float64)
