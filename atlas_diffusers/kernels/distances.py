"""Squared Euclidean distances between point clouds: exactly zero between identical points, accurate far from the origin."""

import torch

_DIRECT_DIM = 16  # up to here differences cost no more than a matrix product
_NEAR = 0.01  # below this fraction of |x|² + |y|² the product has lost two digits
_MANY = 1 / 8  # fraction of such pairs from which on the whole block is computed from differences


def check_points(x: torch.Tensor, y: torch.Tensor) -> None:
    """
    Check two clouds of points ``(..., n, d)`` and ``(..., m, d)``.

    Raises:
        ValueError: for other shapes, different dtypes or devices, a dtype other than float32 and float64, NaN or infinity.
    """
    if x.ndim < 2 or y.ndim < 2 or x.shape[-1] != y.shape[-1] or 0 in x.shape or 0 in y.shape:
        raise ValueError(f"points must be (..., n, d) and (..., m, d), none empty; got {tuple(x.shape)} and {tuple(y.shape)}")
    if x.dtype != y.dtype or x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"points must both be float32 or both float64; got {x.dtype} and {y.dtype}")
    if x.device != y.device:
        raise ValueError(f"points must be on one device; got {x.device} and {y.device}")
    for name, points in (("x", x), ("y", y)):
        if not bool(torch.stack(points.aminmax()).isfinite().all()):
            raise ValueError(f"points {name} must be finite; {int((~points.isfinite()).sum())} coordinates are NaN or infinite")


def _square_norm(points: torch.Tensor) -> torch.Tensor:
    """``|x|²`` of each row, without an array of the squares."""
    return torch.linalg.vector_norm(points, dim=-1).square()


class PairDistances:
    """
    ``‖x_i − y_j‖²``, one block of rows at a time.

    Up to 16 dimensions from the differences themselves. Above, as ``|x'|² + |y'|² − 2 x'·y'`` of the centred clouds, a
    matrix product; pairs where that cancels (under 1% of ``|x'|² + |y'|²``) are computed again from their differences, and
    with many of them the whole block is.

    Args:
        x: points, ``(..., n, d)``.
        y: points, ``(..., m, d)``; leading dimensions broadcast.
    """

    def __init__(self, x: torch.Tensor, y: torch.Tensor):
        self.x, self.y = x, y
        self._by_differences = x.shape[-1] <= _DIRECT_DIM
        if not self._by_differences:
            centre = (x.mean(-2, keepdim=True) + y.mean(-2, keepdim=True)) / 2
            self._centre = centre.detach()
            self._centred_y = y - self._centre
            self._norm_y = _square_norm(self._centred_y)

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Squared distances of ``x[start:stop]`` to all of ``y``, ``(..., stop − start, m)``."""
        x = self.x[..., start:stop, :]
        if self._by_differences:
            return self._from_differences(x)
        centred = x - self._centre
        norm = _square_norm(centred)
        distances = (centred @ self._centred_y.mT).mul_(-2).add_(norm[..., :, None]).add_(self._norm_y[..., None, :])
        near = distances < (2 * _NEAR) * norm.detach()[..., :, None]
        count = int(near.sum())
        if count > _MANY * near.numel():
            return self._from_differences(x)
        if count:
            pairs = near.nonzero(as_tuple=True)
            distances.index_put_(pairs, self._near_pairs(x, pairs, distances.shape))
        return distances

    def _from_differences(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cdist(x, self.y, compute_mode="donot_use_mm_for_euclid_dist").square()

    def _near_pairs(self, x: torch.Tensor, near: tuple[torch.Tensor, ...], shape: torch.Size) -> torch.Tensor:
        """``‖x_i − y_j‖²`` of the listed pairs ``(..., i, j)``, in pieces that take less memory than the block."""
        *batch, i, j = near
        x, y = x.expand(*shape[:-2], -1, -1), self.y.expand(*shape[:-2], -1, -1)
        piece = max(1, shape.numel() // (4 * x.shape[-1]))
        pieces = zip(*(index.split(piece) for index in (*batch, i, j)))
        return torch.cat([(x[(*batch, i)] - y[(*batch, j)]).square().sum(-1) for *batch, i, j in pieces])


def squared_distances(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """``‖x_i − y_j‖²`` of points ``(..., n, d)`` and ``(..., m, d)``, ``(..., n, m)``; see :class:`PairDistances`."""
    return PairDistances(x, y).rows(0, x.shape[-2])


@torch.no_grad()
def median_bandwidth(
    x: torch.Tensor, y: torch.Tensor, max_points: int = 512, generator: torch.Generator | None = None
) -> float:
    """
    Median distance between the points of two clouds, coinciding pairs left out: a bandwidth that suits their scale.

    The median heuristic: Garreau, Jitkrittum & Kanagawa 2017 (arXiv 1707.07269).

    Args:
        x: points, ``(n, d)``.
        y: points, ``(m, d)``.
        max_points: larger clouds are represented by that many random points.
        generator: chooses these points; by default a new one with seed 0.

    Raises:
        ValueError: for wrong points, or if all of them coincide.
    """
    check_points(x, y)
    generator = generator or torch.Generator().manual_seed(0)
    order = [torch.randperm(len(z), generator=generator, device=generator.device) for z in (x, y)]
    sample = [z[index[:max_points].to(z.device)] for z, index in zip((x, y), order)]
    distances = squared_distances(*sample)
    distances = distances[distances > 0]
    if not len(distances):
        raise ValueError(f"the {len(sample[0])} points of x and {len(sample[1])} of y coincide: they have no median distance")
    return float(distances.sqrt().median())
