"""Squared Euclidean distances between point clouds: exactly zero between identical points, accurate far from the origin."""

import torch

_DIRECT_DIM = 16  # up to here differences cost no more than a matrix product
_NEAR = 0.01  # below this fraction of |x|² + |y|² the product has lost two digits
_MANY = 1 / 8  # fraction of such pairs from which on the whole block is computed from differences


def check_points(x: torch.Tensor, y: torch.Tensor, read: bool = True) -> torch.Size:
    """
    The common leading dimensions of two clouds of points ``(..., n, d)`` and ``(..., m, d)``.

    Args:
        x, y: the clouds.
        read: look for values that are not finite.

    Raises:
        ValueError: for other shapes, different dtypes or devices, a dtype other than float32 and float64, NaN or infinity.
    """
    for name, points in (("x", x), ("y", y)):
        if not isinstance(points, torch.Tensor):
            raise ValueError(f"points {name} must be a torch tensor or a numpy array, got {type(points).__name__}")
    shapes = f"{tuple(x.shape)} and {tuple(y.shape)}"
    if x.ndim < 2 or y.ndim < 2 or x.shape[-1] != y.shape[-1] or 0 in x.shape or 0 in y.shape:
        raise ValueError(f"points must be (..., n, d) and (..., m, d), none empty; got {shapes}")
    if x.dtype != y.dtype or x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"points must both be float32 or both float64; got {x.dtype} and {y.dtype}")
    if x.device != y.device:
        raise ValueError(f"points must be on one device; got {x.device} and {y.device}")
    for name, points in (("x", x), ("y", y)) if read else ():
        if not bool(torch.stack(points.aminmax()).isfinite().all()):
            raise ValueError(f"points {name} must be finite; {int((~points.isfinite()).sum())} coordinates are NaN or infinite")
    if x.ndim == y.ndim == 2:
        return torch.Size()
    try:
        return torch.broadcast_shapes(x.shape[:-2], y.shape[:-2])
    except RuntimeError:
        raise ValueError(f"leading dimensions of the points must broadcast; got {shapes}") from None


def squared_norm(points: torch.Tensor) -> torch.Tensor:
    """``|x_i|²``, ``(..., n)``, without a copy of the points ``(..., n, d)``."""
    return torch.linalg.vector_norm(points, dim=-1).square()


class CentredClouds:
    r"""
    ``|x_i − y_j|² = A_i + B_j − 2 x'_i·y'_j`` with each cloud centred by itself, ``x' = x − x̄`` and ``y' = y − ȳ``:

        A_i = |x'_i|² + 2 x'_i·s + |s|²,    B_j = |y'_j|² − 2 y'_j·s,    s = x̄ − ȳ

    Args:
        x: points, ``(..., n, d)``.
        y: points, ``(..., m, d)``; leading dimensions broadcast.
        a, b: weights of the means, ``(..., n)`` and ``(..., m)``; uniform by default.
    """

    def __init__(
        self, x: torch.Tensor, y: torch.Tensor, a: torch.Tensor | None = None, b: torch.Tensor | None = None
    ):
        means = _mean(x, a), _mean(y, b)
        self.x, self.y, self.shift = x - means[0], y - means[1], means[0] - means[1]
        self.x_norm, self.y_norm, self.shift_norm = (squared_norm(z) for z in (self.x, self.y, self.shift))

    @property
    def row_term(self) -> torch.Tensor:
        """``A``, ``(..., n)``."""
        return torch.add(self.x_norm, (self.x @ self.shift.mT)[..., 0], alpha=2) + self.shift_norm

    @property
    def column_term(self) -> torch.Tensor:
        """``B``, ``(..., m)``."""
        return torch.sub(self.y_norm, (self.y @ self.shift.mT)[..., 0], alpha=2)


def _mean(points: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """The mean of the points, ``(..., 1, d)``, without gradient: any centre gives the same distances."""
    if weights is None:
        return points.detach().mean(-2, keepdim=True)
    shares = weights.detach() / weights.detach().sum(-1, keepdim=True)
    return shares[..., None, :].to(points.dtype) @ points.detach()


class PairDistances:
    """
    ``‖x_i − y_j‖²``, one block of rows at a time.

    Up to 16 dimensions from the differences themselves. Above, from :class:`CentredClouds`, a matrix product; pairs where
    that cancels (under 1% of the terms) are computed again from their differences, and with many of them the whole block is.

    Args:
        x: points, ``(..., n, d)``.
        y: points, ``(..., m, d)``; leading dimensions broadcast.
    """

    def __init__(self, x: torch.Tensor, y: torch.Tensor):
        self.x, self.y = x, y
        self._clouds = None if x.shape[-1] <= _DIRECT_DIM else CentredClouds(x, y)
        if self._clouds is not None:
            self._terms = self._clouds.row_term, self._clouds.column_term

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Squared distances of ``x[start:stop]`` to all of ``y``, ``(..., stop − start, m)``."""
        if self._clouds is None:
            return self._from_differences(start, stop)
        clouds, (row_term, column_term) = self._clouds, self._terms
        distances = (clouds.x[..., start:stop, :] @ clouds.y.mT).mul_(-2)
        distances = distances.add_(row_term[..., start:stop, None]).add_(column_term[..., None, :])
        size = clouds.x_norm[..., start:stop, None] + clouds.shift_norm[..., None]
        near = distances < (2 * _NEAR) * size.detach()
        count = int(near.sum())
        if count > _MANY * near.numel():
            return self._from_differences(start, stop)
        if count:
            pairs = near.nonzero(as_tuple=True)
            distances.index_put_(pairs, self._near_pairs(self.x[..., start:stop, :], pairs, distances.shape))
        return distances

    def _from_differences(self, start: int, stop: int) -> torch.Tensor:
        x = self.x[..., start:stop, :]
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
