"""What the distances between sets of points share: checks, and blocks of rows that bound the memory."""

from collections.abc import Iterator

import torch

from ..kernels.distances import PairDistances

BLOCK_BYTES = 2**26


def checked_points(minimum: int, **clouds: torch.Tensor) -> list[torch.Tensor]:
    """
    Two or more sets of points, each ``(n, d)`` with the same d, as float64 without gradients.

    Raises:
        ValueError: for another shape or dtype, different d or devices, fewer than ``minimum`` points, NaN or infinity.
    """
    first = next(iter(clouds.values()))
    for name, points in clouds.items():
        if points.ndim != 2 or not points.is_floating_point():
            raise ValueError(f"{name} must be floating point of shape (n, d); got {points.dtype} {tuple(points.shape)}")
        if points.shape[1] != first.shape[1] or not points.shape[1]:
            raise ValueError(f"points must have the same dimension d >= 1; got {first.shape[1]} and {points.shape[1]}")
        if points.device != first.device:
            raise ValueError(f"points must be on one device; got {first.device} and {points.device}")
        if len(points) < minimum:
            raise ValueError(f"{name} has {len(points)} points; expected at least {minimum}")
        if not bool(points.isfinite().all()):
            raise ValueError(f"{name} must be finite; {int((~points.isfinite()).sum())} coordinates are NaN or infinite")
    return [points.detach().double() for points in clouds.values()]


def row_blocks(n: int, m: int) -> Iterator[slice]:
    """Ranges that cut n rows of m float64 values into blocks of at most 64 MiB (or of one row)."""
    step = max(1, BLOCK_BYTES // (8 * m))
    return (slice(start, start + step) for start in range(0, n, step))


def squared_distance_blocks(x: torch.Tensor, y: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """
    Row ranges and their ``‖x_i − y_j‖²``, (rows, m), exactly 0 where points coincide.

    Args:
        x: float64 points, ``(n, d)``.
        y: float64 points, ``(m, d)``.
    """
    distances = PairDistances(x, y)
    for rows in row_blocks(len(x), len(y)):
        yield rows, distances.rows(rows.start, rows.stop)
