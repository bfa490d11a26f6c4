"""Kernels between the points of a regular grid: pixels of a picture, voxels of a volume."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from .distances import check_points, squared_distances
from .functions import ScaledKernel
from .operator import KernelOperator, logsumexp_, register_kernel_operator

_LOG_BLOCK = 2**20  # entries of one block in the logarithmic product


def find_grid(points: torch.Tensor) -> tuple[tuple[int, ...], tuple[float, ...]] | None:
    """
    Shape and spacing of the regular grid whose points, in C order, ``points (n, d)`` are; ``None`` if they are not one.

    At most three dimensions; coordinates may be off by eight units in the last place.
    """
    if points.ndim != 2 or points.shape[1] > 3 or len(points) < 2:
        return None
    shape = tuple(len(axis.unique()) for axis in points.T)
    if math.prod(shape) != len(points):
        return None
    low, high = points.amin(0), points.amax(0)
    spacing = tuple(float(extent) / (size - 1) if size > 1 else 1.0 for extent, size in zip((high - low).double(), shape))
    ideal = low.double() + grid_points(shape, spacing, points.device)
    tolerance = 8 * torch.finfo(points.dtype).eps * max(float(low.abs().max()), float(high.abs().max()))
    return (shape, spacing) if bool(((ideal - points).abs() <= tolerance).all()) else None


def grid_points(shape: Sequence[int], spacing: Sequence[float], device: torch.device | str | None = None) -> torch.Tensor:
    """Coordinates of a grid that starts at the origin, in C order, float64 ``(n, dimensions)``."""
    axes = [torch.arange(size, dtype=torch.float64, device=device) * step for size, step in zip(shape, spacing)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2)


def _fast_length(minimum: int) -> int:
    """Smallest length from ``minimum`` on whose prime factors are 2, 3 and 5."""
    length = minimum
    while math.gcd(length, 30 ** length.bit_length()) != length:
        length += 1
    return length


@register_kernel_operator("fft")
class GridKernel(KernelOperator):
    """
    ``K_ij = k(‖p_i − p_j‖)`` between the points of one regular grid, numbered in C order.

    A separable kernel (the gaussian) is a product of one small matrix an axis, and its logarithmic product goes axis by
    axis too (Solomon et al. 2015, "Convolutional Wasserstein distances"). Any other kernel is a convolution by FFT, padded
    so that nothing wraps around, in float64 with error about 1e-16 · Σ|v|; for ``v >= 0`` the result is kept at or above
    its exact lower bound ``min(K) Σ v``, because round-off may be negative. There is no logarithmic product then.

    Args:
        shape: points along each of the one to three axes.
        kernel: registered name.
        epsilon: bandwidth, in the unit of ``spacing``.
        spacing: distance of neighbours, one number or one an axis.
        scale_factors: average the kernel over bandwidths ``scale_factor · epsilon``.
        dtype: of ``dense()``; products come in the dtype of their vector.
        device: of the matrices.

    Raises:
        ValueError: for a shape, spacing, kernel, epsilon or factors out of range.
    """

    def __init__(
        self,
        shape: Sequence[int],
        kernel: str = "gaussian",
        epsilon: float = 1.0,
        spacing: float | Sequence[float] = 1.0,
        scale_factors: Sequence[float] | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        self.grid_shape = tuple(shape)
        if not 1 <= len(self.grid_shape) <= 3 or min(self.grid_shape) < 1:
            raise ValueError(f"shape={shape} must have one to three positive sizes")
        self.spacing = (float(spacing),) * len(self.grid_shape) if isinstance(spacing, int | float) else tuple(spacing)
        if len(self.spacing) != len(self.grid_shape) or not all(0 < step < math.inf for step in self.spacing):
            raise ValueError(f"spacing={spacing} must be positive, one number or one for each axis of shape {self.grid_shape}")
        size = math.prod(self.grid_shape)
        self._scaled = ScaledKernel.named(kernel, epsilon, scale_factors)
        points = grid_points(self.grid_shape, self.spacing, device).to(dtype)
        super().__init__((size, size), dtype, torch.device(device), self._scaled.cost_unit, (points, points))
        self.kernel, self.epsilon, self.scale_factors = kernel, epsilon, scale_factors
        self.is_separable = self._scaled.function.is_separable
        if self.is_separable:
            self._log_factors = [self._axis_matrices(bandwidth) for bandwidth in self._scaled.bandwidths]
            self._factors: dict[torch.dtype, list[list[torch.Tensor]]] = {}
        else:
            self._padded = [_fast_length(2 * size - 1) for size in self.grid_shape]
            self._spectrum, self._minimum = self._convolution()

    @classmethod
    def from_points(cls, x: torch.Tensor, y: torch.Tensor, **arguments: Any) -> "GridKernel":
        check_points(x, y)
        grid = find_grid(x) if x is y or torch.equal(x, y) else None
        if grid is None:
            raise ValueError(
                f"solver_type='fft' needs x and y to be the same regular grid of one to three dimensions in C order; "
                f"got {tuple(x.shape)} and {tuple(y.shape)} points that are not"
            )
        shape, spacing = grid
        return cls(shape, spacing=spacing, dtype=x.dtype, device=x.device, **arguments)

    @property
    def has_squared_distances(self) -> bool:
        return self._scaled.is_gaussian

    def matvec(self, v: torch.Tensor) -> torch.Tensor:
        self._check(v, self.shape[1])
        return self._separable(v) if self.is_separable else self._convolve(v)

    def rmatvec(self, u: torch.Tensor) -> torch.Tensor:
        return self.matvec(u)

    def logmatvec(self, f: torch.Tensor) -> torch.Tensor:
        if not self.is_separable:
            return super().logmatvec(f)
        self._check(f, self.shape[1], columns=False)
        scales = []
        for matrices in self._log_factors:
            grid = f.reshape(self.grid_shape)
            for axis, matrix in enumerate(matrices):
                grid = _log_product(matrix.to(f.dtype), grid.movedim(axis, -1)).movedim(-1, axis)
            scales.append(grid.reshape(-1))
        return torch.logsumexp(torch.stack(scales), 0) - math.log(len(scales)) if len(scales) > 1 else scales[0]

    def rlogmatvec(self, g: torch.Tensor) -> torch.Tensor:
        return self.logmatvec(g)

    def dense(self) -> torch.Tensor:
        points = grid_points(self.grid_shape, self.spacing, self.device)
        return self._scaled(squared_distances(points, points)).to(self.dtype)

    def _axis_matrices(self, bandwidth: float) -> list[torch.Tensor]:
        """``log κ`` between the points of each axis, float64."""
        axes = [grid_points([size], [step], self.device) for size, step in zip(self.grid_shape, self.spacing)]
        return [self._scaled.function.log_kernel(squared_distances(axis, axis), bandwidth) for axis in axes]

    def _separable(self, v: torch.Tensor) -> torch.Tensor:
        if v.dtype not in self._factors:
            self._factors[v.dtype] = [[log.exp().to(v.dtype) for log in matrices] for matrices in self._log_factors]
        results = []
        for matrices in self._factors[v.dtype]:
            result = v
            for axis, matrix in enumerate(matrices):
                result = _apply(matrix, result, math.prod(self.grid_shape[:axis]))
            results.append(result.reshape(v.shape))
        return torch.stack(results).mean(0) if len(results) > 1 else results[0]

    def _convolution(self) -> tuple[torch.Tensor, float]:
        """Spectrum of the kernel on the padded torus, real because the kernel is even; smallest value of the kernel."""
        offsets = [torch.arange(size, device=self.device) for size in self._padded]
        around = [torch.minimum(offset, len(offset) - offset).double() for offset in offsets]
        axes = [(offset * step).square() for offset, step in zip(around, self.spacing)]
        values = self._scaled(torch.stack(torch.meshgrid(*axes, indexing="ij")).sum(0))
        within = values[tuple(slice(size) for size in self.grid_shape)]
        return torch.fft.rfftn(values).real.clone(), float(within.min())

    def _convolve(self, v: torch.Tensor) -> torch.Tensor:
        axes = tuple(range(len(self.grid_shape)))
        grid = v.double().reshape(*self.grid_shape, -1)
        spectrum = torch.fft.rfftn(grid, s=self._padded, dim=axes) * self._spectrum[..., None]
        result = torch.fft.irfftn(spectrum, s=self._padded, dim=axes)[tuple(slice(size) for size in self.grid_shape)]
        floor = torch.where(grid.amin(axes) < 0, -math.inf, self._minimum * grid.sum(axes))
        return torch.maximum(result, floor).reshape(v.shape).to(v.dtype)


def _apply(matrix: torch.Tensor, v: torch.Tensor, before: int) -> torch.Tensor:
    """The symmetric ``matrix`` along one axis of the grid ``v``; ``before`` is the number of points on the axes before it."""
    size = len(matrix)
    after = v.numel() // (before * size)
    if after == 1:
        return v.reshape(before, size) @ matrix
    return matrix @ (v.reshape(size, after) if before == 1 else v.reshape(before, size, after))


def _log_product(matrix: torch.Tensor, f: torch.Tensor) -> torch.Tensor:
    """``log Σ_j exp(matrix_ij + f_..j)``, ``(..., size)``, in blocks of i."""
    rows = max(1, _LOG_BLOCK // f.numel())
    return torch.cat([logsumexp_(block + f[..., None, :])[..., 0] for block in matrix.split(rows)], -1)
