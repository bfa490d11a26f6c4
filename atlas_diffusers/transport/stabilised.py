"""Gibbs kernels that neither overflow nor underflow: soft minima at the speed of matrix products."""

import math
import mmap
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import reduce

import torch

from .inputs import Marginals
from .operator_cost import OperatorCost
from .split_costs import ProductSource

BLOCK_BYTES = 2**22  # of a kernel that is being built, so that it stays in cache
HUGE_PAGE_BYTES = 2**25
SMALLEST_LOG_WEIGHT = -460.0


def empty_matrix(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """``torch.empty``; a large one on a CPU takes huge pages where the system has them, as page faults cost more than exp."""
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < HUGE_PAGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def _stacked(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(rows) if len(rows) > 1 else rows[0][None]


class StabilisedKernel(ABC):
    r"""
    A kernel ``K_ij = exp(φ⁰_i + ψ⁰_j − C_ij/ε)`` about reference potentials; the soft minima of any others are

        −log Σ_i a_i e^{φ_i − C_ij/ε} = ψ⁰_j − log (Kᵀ (a e^{φ − φ⁰}))_j

    exact while ``|φ − φ⁰| ≤ bound``; ``absorb`` moves the reference. Schmitzer 2019 (arXiv 1610.06519). Where no reference
    will do, as with marginals relaxed so much that their potentials ignore the cost, ``use_logarithms`` ends the scaling.

    Args:
        marginals: weights.
        dtype: of the products with K.
    """

    def __init__(self, marginals: Marginals, dtype: torch.dtype):
        self.log_a, self.log_b = marginals.log()
        self._a, self._b = marginals.a.to(dtype), marginals.b.to(dtype)
        self.dtype, self.bound = dtype, -math.log(torch.finfo(dtype).tiny) / 2
        self.logarithmic, self.applications = False, 0
        self.phi, self.psi = torch.zeros_like(self.log_a), torch.zeros_like(self.log_b)
        self._row_offset, self._column_offset = self.log_a, self.log_b

    def _refer(self) -> None:
        self._row_offset, self._column_offset = self.log_a - self.phi, self.log_b - self.psi

    @abstractmethod
    def _times(self, v: torch.Tensor) -> torch.Tensor:
        """``K v``, (batch, n)."""

    @abstractmethod
    def _transposed_times(self, u: torch.Tensor) -> torch.Tensor:
        """``Kᵀ u``, (batch, m)."""

    @abstractmethod
    def _log_times(self, psi: torch.Tensor) -> torch.Tensor:
        """``log Σ_j e^{ψ_j − C_ij/ε}``, (batch, n), for the reference 0."""

    @abstractmethod
    def _transposed_log_times(self, phi: torch.Tensor) -> torch.Tensor:
        """``log Σ_i e^{φ_i − C_ij/ε}``, (batch, m), for the reference 0."""

    @abstractmethod
    def absorb(self, psi: torch.Tensor, members: Iterable[int]) -> None:
        """Refer to these column potentials, (batch, m), and the row potentials that belong to them."""

    def use_logarithms(self) -> None:
        """From now on exact for all potentials, and slow."""
        self.logarithmic, self.bound = True, math.inf

    def be_exact(self) -> None:
        """From now on exact for all potentials, where that can be."""
        self.use_logarithms()

    def select(self, members: torch.Tensor) -> None:
        """Keep these members of the batch."""
        self.log_a, self.log_b = self.log_a[members], self.log_b[members]
        self._a, self._b = self._a[members], self._b[members]
        self.phi, self.psi = self.phi[members], self.psi[members]
        self._refer()

    def sweep(self, phi: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        ``count`` iterations of Sinkhorn's algorithm with exact marginals, from row potentials (batch, n).

        Returns the row potentials before the last iteration, and its column and row potentials.
        """
        if self.logarithmic:
            psi = self.soft_columns(phi)
            return phi, psi, self.soft_rows(psi)
        self.applications += 2 * count * len(phi)
        columns = self._transposed_times((phi + self._row_offset).exp().to(self.dtype))
        before, rows = None, self._times(self._b / columns)
        for _ in range(count - 1):
            before, columns = rows, self._transposed_times(self._a / rows)
            rows = self._times(self._b / columns)
        phi = phi if before is None else self.phi - before.to(phi.dtype).log()
        return phi, self.psi - columns.to(phi.dtype).log(), self.phi - rows.to(phi.dtype).log()

    def soft_rows(self, psi: torch.Tensor) -> torch.Tensor:
        """``−log Σ_j b_j e^{ψ_j − C_ij/ε}``, (batch, n); infinite where that underflows."""
        self.applications += len(psi)
        if self.logarithmic:
            return self.log_soft_rows(psi)
        exponents = psi + self._column_offset
        top = self._most(exponents.amax(-1, keepdim=True))
        return self.phi - top - self._times((exponents - top).exp().to(self.dtype)).to(psi.dtype).log()

    def soft_columns(self, phi: torch.Tensor) -> torch.Tensor:
        """``−log Σ_i a_i e^{φ_i − C_ij/ε}``, (batch, m); infinite where that underflows."""
        self.applications += len(phi)
        if self.logarithmic:
            return self.log_soft_columns(phi)
        exponents = phi + self._row_offset
        top = exponents.amax(-1, keepdim=True)
        return self.psi - top - self._transposed_times((exponents - top).exp().to(self.dtype)).to(phi.dtype).log()

    def _most(self, of_columns: torch.Tensor) -> torch.Tensor:
        """A maximum over columns, of which a subclass may hold a part."""
        return of_columns

    def log_soft_rows(self, psi: torch.Tensor) -> torch.Tensor:
        """:meth:`soft_rows` of any potentials."""
        return -self._log_times(psi + self.log_b)

    def log_soft_columns(self, phi: torch.Tensor) -> torch.Tensor:
        """:meth:`soft_columns` of any potentials."""
        return -self._transposed_log_times(phi + self.log_a)


class SplitKernel(StabilisedKernel):
    """
    The kernel of a cost in its inner potentials, ``K_ij = exp(φ⁰_i + ψ⁰_j + M_ij/ε)``.

    After ``absorb`` its maximum is 1 in every row and column. It is built in one buffer, in blocks of rows that fit the
    cache; over ``max_bytes`` it is not stored, and its blocks are built again for every product.

    Args:
        cost: gives M.
        epsilons: ε of each problem.
        marginals, dtype: as in :class:`StabilisedKernel`.
        psi: column potentials to refer to at first, (batch, m).
        reach: bound of ``|M_ij/ε|``; well within the kernel's, the kernel is flat: it needs no reference, nor maxima.
        product_dtype: of M; float32 products in a float64 kernel save time in high dimension.
        max_bytes: largest size of the buffer, of all problems together.
    """

    _buffer: torch.Tensor  # if the kernel is stored, on a GPU all of it
    _tiles: Sequence[torch.Tensor] | None  # of each problem, views of the buffer
    _transposed_tiles: Sequence[torch.Tensor]

    def __init__(
        self,
        cost: ProductSource,
        epsilons: list[float],
        marginals: Marginals,
        psi: torch.Tensor,
        reach: float,
        dtype: torch.dtype,
        product_dtype: torch.dtype,
        max_bytes: int,
    ):
        super().__init__(marginals, dtype)
        self._products, self._scales = cost.products(product_dtype), [1 / e for e in epsilons]
        batch, n, m = cost.shape
        step = max(1, min(BLOCK_BYTES, max_bytes) // (m * dtype.itemsize))
        self._blocks = [slice(start, min(start + step, n)) for start in range(0, n, step)]
        self._tiles = None
        if batch * n * m * dtype.itemsize <= max_bytes:
            self._buffer = empty_matrix(cost.shape, dtype, psi.device)
            self._keep_views(self._buffer.unbind(0))
        self.is_flat = reach <= 0.75 * self.bound
        if not self.is_flat:
            self.absorb(psi, range(batch))
        elif self._tiles is not None:
            for member in range(batch):
                for rows in self._blocks:
                    self._ratios(member, rows).exp_()

    def absorb(self, psi: torch.Tensor, members: Iterable[int]) -> None:
        for member in members:
            offset = psi[member] + self.log_b[member].clamp(min=SMALLEST_LOG_WEIGHT)
            constant = self._most(offset.amax())
            offset = (offset - constant).to(self.dtype)
            tops, peaks = [], []
            for rows in self._blocks:
                block = self._ratios(member, rows).add_(offset)
                tops.append(self._most(block.amax(1, keepdim=True)))
                peaks.append(block.sub_(tops[-1]).amax(0))
            peak = torch.stack(peaks).amax(0)
            self.phi[member] = -torch.cat(tops)[:, 0].to(psi.dtype) - constant
            self.psi[member] = (offset - peak).to(psi.dtype) + constant
            if self._tiles is not None:
                for rows in self._blocks:
                    self._tiles[member][rows].sub_(peak).exp_()
        self._refer()

    def _ratios(self, member: int, rows: slice) -> torch.Tensor:
        """``M/ε`` of some rows, in their place if the kernel is stored."""
        products, scale = self._products, self._scales[member]
        if self._tiles is None:
            return products(member, rows, scale).to(self.dtype)
        block = self._tiles[member][rows]
        if products.dtype == self.dtype:
            return products(member, rows, scale, out=block)
        return block.copy_(products(member, rows, scale))

    def _block(self, member: int, rows: slice) -> torch.Tensor:
        """Rows of a kernel that is not stored."""
        block = self._ratios(member, rows)
        block.add_(self.psi[member].to(self.dtype)).add_(self.phi[member, rows, None].to(self.dtype))
        return block.exp_()

    def _times(self, v: torch.Tensor) -> torch.Tensor:
        if self._tiles is None:
            members = enumerate(v.unbind(0))
            return torch.stack([torch.cat([self._block(k, rows) @ w for rows in self._blocks]) for k, w in members])
        if v.is_cuda:
            return torch.bmm(self._buffer, v[..., None])[..., 0]
        return _stacked([torch.mv(tile, w) for tile, w in zip(self._tiles, v.unbind(0))])

    def _transposed_times(self, u: torch.Tensor) -> torch.Tensor:
        if self._tiles is None:
            members = enumerate(u.unbind(0))
            return torch.stack([reduce(torch.add, (w[r] @ self._block(k, r) for r in self._blocks)) for k, w in members])
        if u.is_cuda:
            return torch.bmm(u[:, None], self._buffer)[:, 0]
        return _stacked([torch.mv(tile, w) for tile, w in zip(self._transposed_tiles, u.unbind(0))])

    def _log_times(self, psi: torch.Tensor) -> torch.Tensor:
        def row(member: int, rows: slice) -> torch.Tensor:
            return (self._ratios(member, rows).to(psi.dtype) + psi[member]).logsumexp(1)

        return torch.stack([torch.cat([row(member, rows) for rows in self._blocks]) for member in range(len(psi))])

    def _transposed_log_times(self, phi: torch.Tensor) -> torch.Tensor:
        def part(member: int, rows: slice) -> torch.Tensor:
            return (self._ratios(member, rows).to(phi.dtype) + phi[member, rows, None]).logsumexp(0)

        return torch.stack(
            [torch.stack([part(member, rows) for rows in self._blocks]).logsumexp(0) for member in range(len(phi))]
        )

    def select(self, members: torch.Tensor) -> None:
        super().select(members)
        self._products.select(members)
        self._scales = [self._scales[member] for member in members.tolist()]
        tiles = self._tiles
        if tiles is not None and members.is_cuda:
            self._buffer = self._buffer[members]
            self._keep_views(self._buffer.unbind(0))
        elif tiles is not None:
            self._keep_views([tiles[member] for member in members.tolist()])

    def _keep_views(self, tiles: Sequence[torch.Tensor]) -> None:
        self._tiles, self._transposed_tiles = tiles, [tile.mT for tile in tiles]


class OperatorKernel(StabilisedKernel):
    """A kernel operator, by its products until a potential leaves the bound and by its logarithmic ones from then on."""

    def __init__(self, cost: OperatorCost, marginals: Marginals):
        super().__init__(marginals, cost.dtype)
        self._cost = cost
        self._no_a, self._no_b = (self.log_a == -math.inf).to(self.dtype), (self.log_b == -math.inf).to(self.dtype)

    def absorb(self, psi: torch.Tensor, members: Iterable[int]) -> None:
        """Change to logarithmic products; without them go on while products are positive."""
        try:
            self._cost.log_rows(psi)
        except NotImplementedError:
            self.bound = math.inf
        else:
            super().use_logarithms()

    def be_exact(self) -> None:
        self.absorb(self.psi, ())

    def use_logarithms(self) -> None:
        name = type(self._cost.operator).__name__
        raise ValueError(f"products with {name} are zero or negative; widen its kernel or use another")

    def _times(self, v: torch.Tensor) -> torch.Tensor:
        return self._cost.operator.matvec(v[0]) + self._no_a

    def _transposed_times(self, u: torch.Tensor) -> torch.Tensor:
        return self._cost.operator.rmatvec(u[0]) + self._no_b

    def _log_times(self, psi: torch.Tensor) -> torch.Tensor:
        return self._cost.log_rows(psi)

    def _transposed_log_times(self, phi: torch.Tensor) -> torch.Tensor:
        return self._cost.log_columns(phi)
