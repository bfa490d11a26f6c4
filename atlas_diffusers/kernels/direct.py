"""The kernel matrix itself: exact, stored if it fits, otherwise computed block by block."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint

from .distances import PairDistances, check_points
from .functions import ScaledKernel
from .operator import KernelOperator, logsumexp_, register_kernel_operator

DEFAULT_MAX_BYTES = 2**30
Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
_BLOCK_BYTES = 2**23  # a block and its temporaries then stay in cache
_TEMPORARIES = 5  # arrays of a block's size that live at once


def _version(x: torch.Tensor) -> int:
    return 0 if x.is_inference() else x._version


def _log_product(log_kernel: torch.Tensor, f: torch.Tensor) -> torch.Tensor:
    return logsumexp_(log_kernel + f.mT)


def _slice(matrix: torch.Tensor, rows: tuple[int, int]) -> torch.Tensor:
    return matrix[..., slice(*rows), :]


@register_kernel_operator("direct")
class DirectKernel(KernelOperator):
    """
    ``K_ij = k(‖x_i − y_j‖)``, exact; differentiable in the points.

    The matrix is computed on first use and kept by this object while its points are not modified in place. If it is larger
    than ``max_bytes``, blocks of rows are computed anew in each product (and in its gradient), and nothing is kept.

    Args:
        x: points, ``(..., n, d)``, float32 or float64.
        y: points, ``(..., m, d)``; leading dimensions broadcast, and vectors are then ``(..., m)`` or ``(..., m, k)``.
        kernel: registered name.
        epsilon: bandwidth, in the unit of the points.
        scale_factors: average the kernel over bandwidths ``scale_factor · epsilon``.
        max_bytes: largest size of the kernel matrix, or block of it with its temporaries (one row at least), in memory.

    Raises:
        ValueError: for wrong points, kernel, epsilon, factors, or ``max_bytes`` below 1.
    """

    options = ("max_bytes",)

    def __init__(
        self,
        x: torch.Tensor,
        y: torch.Tensor,
        kernel: str = "gaussian",
        epsilon: float = 1.0,
        scale_factors: Sequence[float] | None = None,
        max_bytes: int = DEFAULT_MAX_BYTES,
    ):
        self.batch_shape = check_points(x, y)
        if max_bytes < 1:
            raise ValueError(f"max_bytes={max_bytes} must be at least 1")
        self._scaled = ScaledKernel.named(kernel, epsilon, scale_factors)
        super().__init__((x.shape[-2], y.shape[-2]), x.dtype, x.device, self._scaled.cost_unit, (x, y))
        self.x, self.y, self.kernel, self.epsilon = x, y, kernel, epsilon
        self.scale_factors, self.max_bytes = scale_factors, max_bytes
        self._kept: tuple[tuple, torch.Tensor] | None = None

    @property
    def has_squared_distances(self) -> bool:
        return self._scaled.is_gaussian

    def matvec(self, v: torch.Tensor) -> torch.Tensor:
        return self._reduce(torch.matmul, v, False)

    def rmatvec(self, u: torch.Tensor) -> torch.Tensor:
        return self._reduce(torch.matmul, u, True)

    def logmatvec(self, f: torch.Tensor) -> torch.Tensor:
        return self._reduce(_log_product, f, False)

    def rlogmatvec(self, g: torch.Tensor) -> torch.Tensor:
        return self._reduce(_log_product, g, True)

    def dense(self) -> torch.Tensor:
        matrix = self._matrix(log=False)
        return matrix.clone() if self._kept and matrix is self._kept[1] else matrix

    @property
    def _points_need_grad(self) -> bool:
        return torch.is_grad_enabled() and (self.x.requires_grad or self.y.requires_grad)

    def _check(self, vector: torch.Tensor, size: int, columns: bool = True) -> None:
        batch = self.batch_shape
        if vector.shape[: len(batch)] != batch:
            raise ValueError(f"expected leading dimensions {tuple(batch)}, got a vector of shape {tuple(vector.shape)}")
        super()._check(vector[(0,) * len(batch)], size, columns)

    def _reduce(self, product: Product, vector: torch.Tensor, transposed: bool) -> torch.Tensor:
        """``product(block, vector)`` over the whole matrix, or blocks of its rows (columns if transposed) that fit."""
        log = product is _log_product
        self._check(vector, self.shape[0 if transposed else 1], columns=not log)
        is_vector = vector.ndim == len(self.batch_shape) + 1
        columns = vector[..., None] if is_vector else vector
        if self._fits:
            values = partial(_slice, self._matrix(log).mT if transposed else self._matrix(log))
        else:
            values = partial(self._values, PairDistances(*((self.y, self.x) if transposed else (self.x, self.y))), log)

        def compute(rows: tuple[int, int], columns: torch.Tensor) -> torch.Tensor:
            return product(values(rows), columns)

        if not self._fits and torch.is_grad_enabled() and (self._points_need_grad or vector.requires_grad):
            compute = partial(checkpoint, compute, use_reentrant=False, preserve_rng_state=False)
        n, m = reversed(self.shape) if transposed else self.shape
        # written in place: a list of small pieces would fragment the heap by as much as the whole matrix
        result = columns.new_empty(*self.batch_shape, n, columns.shape[-1])
        for rows in self._rows(n, m):
            result[..., slice(*rows), :] = compute(rows, columns)
        return result[..., 0] if is_vector else result

    @property
    def _fits(self) -> bool:
        return self.batch_shape.numel() * self.shape[0] * self.shape[1] * self.dtype.itemsize <= self.max_bytes

    def _rows(self, n: int, m: int) -> list[tuple[int, int]]:
        """Ranges of n rows, each small enough with its temporaries."""
        row_bytes = _TEMPORARIES * self.batch_shape.numel() * m * self.dtype.itemsize
        step = max(1, min(self.max_bytes, _BLOCK_BYTES) // row_bytes)
        return [(start, min(start + step, n)) for start in range(0, n, step)]

    def _values(self, distances: PairDistances, log: bool, rows: tuple[int, int]) -> torch.Tensor:
        squared = distances.rows(*rows)
        return self._scaled.log(squared) if log else self._scaled(squared)

    def _matrix(self, log: bool) -> torch.Tensor:
        """``K`` or ``log K``, ``(..., n, m)``; the last one is kept if it is small enough and needs no gradient."""
        if self._points_need_grad:
            return self._values(PairDistances(self.x, self.y), log, (0, self.shape[0]))
        key = (log, _version(self.x), _version(self.y))
        if self._kept is None or self._kept[0] != key:
            self._kept = None
            matrix = self.x.new_empty(*self.batch_shape, *self.shape)
            distances = PairDistances(self.x, self.y)
            for rows in self._rows(*self.shape):
                matrix[..., slice(*rows), :] = self._values(distances, log, rows)
            if not self._fits:
                return matrix
            self._kept = (key, matrix)
        return self._kept[1]
