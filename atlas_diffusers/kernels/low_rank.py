"""Kernels of low rank: products of two thin matrices."""

from collections.abc import Callable

import torch

from .distances import check_points
from .operator import KernelOperator

_BLOCK = 2**22  # entries of one float64 block of features


def features_by_rows(features: Callable[[torch.Tensor], torch.Tensor], points: torch.Tensor, width: int) -> torch.Tensor:
    """``features(points)`` with the arithmetic in float64 and the result in the dtype of the points, block by block."""
    rows = max(1, _BLOCK // max(width, points.shape[1]))
    return torch.cat([features(block.double()).to(points.dtype) for block in points.split(rows)])


def check_flat_points(x: torch.Tensor, y: torch.Tensor, operator: type) -> None:
    """``check_points``, and no leading dimensions."""
    check_points(x, y)
    if x.ndim > 2 or y.ndim > 2:
        raise ValueError(
            f"{operator.__name__} takes points (n, d) and (m, d) without leading dimensions; "
            f"got {tuple(x.shape)} and {tuple(y.shape)}"
        )


class LowRankKernel(KernelOperator):
    """
    ``K ≈ A Bᵀ``: a product costs ``(n + m) r`` instead of ``n m``.

    Args:
        left: A, ``(n, r)``.
        right: B, ``(m, r)``.
        cost_unit, points: as in :class:`KernelOperator`.
    """

    def __init__(
        self,
        left: torch.Tensor,
        right: torch.Tensor,
        cost_unit: float | None = None,
        points: tuple[torch.Tensor, torch.Tensor] | None = None,
    ):
        super().__init__((len(left), len(right)), left.dtype, left.device, cost_unit, points)
        self.left, self.right = left, right

    def matvec(self, v: torch.Tensor) -> torch.Tensor:
        self._check(v, self.shape[1])
        return self.left @ (self.right.mT @ v)

    def rmatvec(self, u: torch.Tensor) -> torch.Tensor:
        self._check(u, self.shape[0])
        return self.right @ (self.left.mT @ u)

    def dense(self) -> torch.Tensor:
        return self.left @ self.right.mT
