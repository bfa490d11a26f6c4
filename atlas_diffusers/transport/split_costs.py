"""Costs of two clouds and of a matrix, split into terms that potentials take up and a matrix that kernels are made of."""

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch.utils.checkpoint import checkpoint

from ..kernels.distances import CentredClouds
from .costs import DEFAULT_MAX_BYTES, Cost, Reduction, Result

BLOCK_BYTES = 2**26
TEMPORARIES = 4  # arrays of a block's size that live at once
PAIRS = 64  # that measure the directions two clouds share


@dataclass(frozen=True)
class Extent:
    """
    Size of a problem as read on the host.

    Args:
        reach: bound of ``|M_ij|``.
        diameter: bound of costs, of their separable terms, and of differences between the potentials of a solution.
        mean: of the costs, without what separable terms add to all of them.
    """

    reach: float
    diameter: float
    mean: float


class SplitCost(Cost):
    """
    ``C_ij = A_i + B_j − M_ij``: potentials without the separable terms, ``f − A`` and ``g − B``, are called *inner* ones, and
    exponents are sums of them and of M only.
    """

    row_term: torch.Tensor
    """``A``, (batch, n)."""
    column_term: torch.Tensor
    """``B``, (batch, m)."""
    dtype: torch.dtype

    @abstractmethod
    def ratios(self) -> Callable[[slice], torch.Tensor]:
        """``M/ε`` of ranges of rows, (batch, rows, m), with gradients."""

    @abstractmethod
    def products(self, dtype: torch.dtype) -> "Products":
        """M as a kernel uses it."""

    @abstractmethod
    def survey(self) -> list[Extent]:
        """The size of every problem, read on the host."""

    @abstractmethod
    def start(self, epsilon: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
        """Inner potentials to start from, (batch, n) and (batch, m)."""

    @abstractmethod
    def diameters(self) -> torch.Tensor:
        """:attr:`Extent.diameter` on the device, (batch, 1)."""

    def each(self, function: Reduction[Result], phi: torch.Tensor, psi: torch.Tensor) -> list[Result]:
        epsilon, ratios = self.epsilon[:, None], self.ratios()
        phi = (phi - self.row_term / epsilon).to(self.dtype)[..., None]
        psi = (psi - self.column_term / epsilon).to(self.dtype)[:, None]

        def compute(rows: slice) -> Result:
            return function(ratios(rows) + phi[:, rows] + psi, rows)

        row_bytes = self.shape[0] * self.shape[2] * self.dtype.itemsize
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


class ProductSource(Protocol):
    """What a kernel is made of; ``shape`` is (batch, n, m)."""

    shape: tuple[int, int, int]

    def products(self, dtype: torch.dtype) -> "Products":
        """M as a kernel uses it."""
        ...


class Products:
    """Blocks of ``scale · M``, one problem of the batch at a time."""

    dtype: torch.dtype

    @abstractmethod
    def __call__(self, member: int, rows: slice, scale: float, out: torch.Tensor | None = None) -> torch.Tensor:
        """``scale · M`` of some rows, (rows, m), written to ``out`` if given."""

    @abstractmethod
    def select(self, members: torch.Tensor) -> None:
        """Keep these members of the batch."""


class PointCost(SplitCost):
    r"""
    ``C_ij = |x_i − y_j|²`` with ``M_ij = 2 x'_i·y'_j`` of :class:`~atlas_diffusers.kernels.distances.CentredClouds`, so that
    a shift of a whole cloud costs no accuracy.

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
        self.epsilon, self.max_bytes, self.dtype = epsilon, max_bytes, x.dtype
        self.shape = (len(x), x.shape[1], y.shape[1])
        self.clouds = CentredClouds(x, y, a, b)
        self.row_term, self.column_term = self.clouds.row_term, self.clouds.column_term
        self._sizes: list[tuple[float, float, float]] | None = None

    def ratios(self) -> Callable[[slice], torch.Tensor]:
        x, y = self.clouds.x * (2 / self.epsilon).to(self.dtype)[:, None, None], self.clouds.y.mT
        return lambda rows: x[:, rows] @ y

    def products(self, dtype: torch.dtype) -> "PointProducts":
        return PointProducts(self.clouds.x.to(dtype), self.clouds.y.to(dtype))

    def survey(self) -> list[Extent]:
        clouds, dimension = self.clouds, self.clouds.x.shape[-1]
        pairs = min(PAIRS, max(1, min(self.shape[1:]) - 1))
        shared = (clouds.x[:, :pairs] * clouds.y[:, -pairs:]).sum(-1).square().mean(-1)
        sizes = clouds.x_norm.mean(-1), clouds.y_norm.mean(-1), clouds.x_norm.amax(-1), clouds.y_norm.amax(-1)
        rows = torch.stack((*sizes, clouds.shift_norm[:, 0], shared), -1).tolist()
        self._sizes = [(x_mean, y_mean, _directions(x_mean * y_mean, squared, dimension))
                       for x_mean, y_mean, _, _, _, squared in rows]  # fmt: skip
        return [
            Extent(
                reach=2 * math.sqrt(x_max) * math.sqrt(y_max),
                diameter=(math.sqrt(x_max) + math.sqrt(y_max) + math.sqrt(shift)) ** 2,
                mean=x_mean + y_mean,
            )
            for x_mean, y_mean, x_max, y_max, shift, _ in rows
        ]

    def start(self, epsilon: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
        r"""
        Those between isotropic Gaussians of the sizes s that a survey has read, ``f = −t |x'|²/s_x`` and ``g = −t |y'|²/s_y``:

            t = √(s_x s_y + (εd/4)²) − εd/4,    d = s_x s_y / E (x'·y')², the number of directions that they share

        Janati et al. 2020 (arXiv 2006.02572), equation 8. Without a survey f = g = 0.
        """
        clouds = self.clouds
        if self._sizes is None:
            return -clouds.x_norm.double(), -clouds.y_norm.double()
        factors = []
        for value, (x_mean, y_mean, directions) in zip(epsilon, self._sizes):
            product, regular = x_mean * y_mean, value * directions / 4
            slope = product / (math.sqrt(product + regular**2) + regular)
            factors.append([-slope / mean if mean else 0.0 for mean in (x_mean, y_mean)])
        if len(factors) == 1:
            return clouds.x_norm.double() * factors[0][0], clouds.y_norm.double() * factors[0][1]
        column = torch.tensor(factors, dtype=torch.float64, device=self.epsilon.device)
        return clouds.x_norm * column[:, :1], clouds.y_norm * column[:, 1:]

    def diameters(self) -> torch.Tensor:
        clouds = self.clouds
        return (clouds.x_norm.amax(-1).sqrt() + clouds.y_norm.amax(-1).sqrt() + clouds.shift_norm[:, 0].sqrt())[:, None] ** 2


def _directions(product: float, shared: float, dimension: int) -> float:
    return min(max(product / shared, 1.0), dimension) if shared > 0 else dimension


class PointProducts(Products):
    """``M = 2 x'·y'`` of centred clouds."""

    def __init__(self, x: torch.Tensor, y: torch.Tensor):
        self.x, self.y, self.dtype = x, y, x.dtype

    def __call__(self, member: int, rows: slice, scale: float, out: torch.Tensor | None = None) -> torch.Tensor:
        x, y = self.x[member, rows], self.y[member].mT
        if out is None:
            return torch.addmm(x[:1, :1], x, y, beta=0, alpha=2 * scale)
        return torch.addmm(out, x, y, beta=0, alpha=2 * scale, out=out)

    def select(self, members: torch.Tensor) -> None:
        self.x, self.y = self.x[members], self.y[members]


class MatrixCost(SplitCost):
    """
    A matrix of costs. A and B are its means along rows and columns, as they come out of squared distances.

    Args:
        matrix: C, (batch, n, m).
        epsilon: (batch,), float64.
        a, b: weights of the means, (batch, n) and (batch, m), float64; uniform by default.
        max_bytes: as in :class:`PointCost`.
    """

    def __init__(
        self,
        matrix: torch.Tensor,
        epsilon: torch.Tensor,
        a: torch.Tensor | None = None,
        b: torch.Tensor | None = None,
        max_bytes: int = DEFAULT_MAX_BYTES,
    ):
        self.epsilon, self.max_bytes, self.dtype = epsilon, max_bytes, matrix.dtype
        self.matrix, self.shape = matrix, (len(matrix), matrix.shape[1], matrix.shape[2])
        constant = matrix.detach()
        rows = constant.mean(-1, dtype=torch.float64) if b is None else _means(constant, b)
        columns = constant.mean(-2, dtype=torch.float64) if a is None else _means(constant.mT, a)
        half = rows.mean(-1, keepdim=True) / 2
        self.row_term, self.column_term = rows - half, columns - half

    def ratios(self) -> Callable[[slice], torch.Tensor]:
        epsilon = self.epsilon[:, None, None].to(self.dtype)
        row, column = self.row_term.to(self.dtype)[..., None], self.column_term.to(self.dtype)[:, None]
        return lambda rows: (row[:, rows] + column - self.matrix[:, rows]) / epsilon

    def products(self, dtype: torch.dtype) -> "MatrixProducts":
        return MatrixProducts(self.matrix, self.row_term.to(dtype), self.column_term.to(dtype))

    def survey(self) -> list[Extent]:
        """The mean is twice the root mean square of M."""
        products, step = self.products(self.dtype), max(1, BLOCK_BYTES // (self.shape[2] * self.dtype.itemsize))
        blocks = [slice(start, start + step) for start in range(0, self.shape[1], step)]
        values = []
        for member in range(self.shape[0]):
            norms = [torch.stack([torch.linalg.vector_norm(products(member, rows, 1.0), order, dtype=torch.float64)
                                  for order in (math.inf, 2)]) for rows in blocks]  # fmt: skip
            largest, root = torch.stack(norms).unbind(1)
            values.append(torch.stack((largest.amax(), root.square().sum())))
        found = torch.cat((torch.stack(values), self.diameters()), 1).tolist()
        count = self.shape[1] * self.shape[2]
        return [Extent(reach, diameter, 2 * math.sqrt(squares / count)) for reach, squares, diameter in found]

    def start(self, epsilon: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros_like(self.row_term), torch.zeros_like(self.column_term)

    def diameters(self) -> torch.Tensor:
        low, high = self.matrix.detach().flatten(1).aminmax(dim=1, keepdim=True)
        return high.maximum(-low).double()


def _means(matrix: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    shares = weights.detach() / weights.detach().sum(-1, keepdim=True)
    return torch.einsum("bnm,bm->bn", matrix.double(), shares)


class MatrixProducts(Products):
    """``M = A + B − C`` of a matrix C."""

    def __init__(self, matrix: torch.Tensor, row_term: torch.Tensor, column_term: torch.Tensor):
        self.matrix, self.row_term, self.column_term, self.dtype = matrix, row_term, column_term, row_term.dtype

    def __call__(self, member: int, rows: slice, scale: float, out: torch.Tensor | None = None) -> torch.Tensor:
        block = torch.sub(self.row_term[member, rows, None], self.matrix[member, rows].to(self.dtype), out=out)
        return block.add_(self.column_term[member]).mul_(scale)

    def select(self, members: torch.Tensor) -> None:
        self.matrix = self.matrix[members]
        self.row_term, self.column_term = self.row_term[members], self.column_term[members]
