"""Between what mass is transported: two clouds of points, or the rows and columns of a matrix of costs."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from ..kernels.distances import check_points
from .inputs import Marginals
from .split_costs import MatrixCost, PointCost, SplitCost

Weights = tuple[torch.Tensor | None, torch.Tensor | None]


class Geometry(ABC):
    """Checked input, with leading dimensions ``shape`` flattened, from which costs of any precision are made."""

    shape: torch.Size
    sizes: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    targets: torch.Tensor | None
    finite: str
    """What must be finite."""

    @abstractmethod
    def cost(self, epsilon: torch.Tensor, max_bytes: int, double: bool, weights: Weights = (None, None)) -> SplitCost:
        """The cost, in float64 if asked for; weights (batch, n) and (batch, m) are for its means."""

    @abstractmethod
    def without(self, marginals: Marginals) -> "Geometry":
        """With points of negligible weight moved onto the heaviest one, where they cannot disturb the kernel."""

    @abstractmethod
    def detach(self) -> "Geometry":
        """Without gradients."""


@dataclass
class Clouds(Geometry):
    """
    Points x and y, whose cost is the squared distance.

    Args:
        x: (..., n, d).
        y: (..., m, d).

    Raises:
        ValueError: for points that do not fit, and for what looks like pictures.
    """

    x: torch.Tensor
    y: torch.Tensor
    finite = "points x and y must be finite, and so must their squared distances over epsilon"

    def __post_init__(self):
        x, y = self.x, self.y
        if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor) and x.ndim == y.ndim == 4 and x.shape[1:] == y.shape[1:]:
            raise ValueError(
                f"x {tuple(x.shape)} and y {tuple(y.shape)} have four dimensions: couple pictures (n, c, h, w) as points with "
                "x.flatten(1) and y.flatten(1), and a batch of clouds with one leading dimension, x.flatten(0, 1)"
            )
        self.shape = check_points(x, y, read=False)
        self.sizes, self.dtype, self.device, self.targets = (x.shape[-2], y.shape[-2]), y.dtype, x.device, y

    def cost(self, epsilon: torch.Tensor, max_bytes: int, double: bool, weights: Weights = (None, None)) -> PointCost:
        x, y = (_flat(z, self.shape) for z in (self.x, self.y))
        return PointCost(*((x.double(), y.double()) if double else (x, y)), epsilon, *weights, max_bytes)

    def without(self, marginals: Marginals) -> "Clouds":
        moved = zip((self.x, self.y), (marginals.a, marginals.b), marginals.negligible())
        x, y = (_moved(_flat(z, self.shape), w, no).reshape(*self.shape, *z.shape[-2:]) for z, w, no in moved)
        return Clouds(x, y)

    def detach(self) -> "Clouds":
        return Clouds(self.x.detach(), self.y.detach())


@dataclass
class Matrix(Geometry):
    """
    A matrix of costs, (..., n, m).

    Raises:
        ValueError: for another shape or dtype than float32 and float64.
    """

    values: torch.Tensor
    finite = "cost must be finite, and so must cost over epsilon"

    def __post_init__(self):
        c = self.values
        if not isinstance(c, torch.Tensor):
            raise ValueError(f"cost must be a torch tensor or a numpy array, got {type(c).__name__}")
        if c.ndim < 2 or 0 in c.shape or c.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"cost must be (..., n, m), not empty, float32 or float64; got {c.dtype} {tuple(c.shape)}")
        self.shape, self.sizes, self.dtype, self.device = c.shape[:-2], (c.shape[-2], c.shape[-1]), c.dtype, c.device
        self.targets = None

    def cost(self, epsilon: torch.Tensor, max_bytes: int, double: bool, weights: Weights = (None, None)) -> MatrixCost:
        values = self.values.reshape(-1, *self.sizes)
        return MatrixCost(values.double() if double else values, epsilon, *weights, max_bytes)

    def without(self, marginals: Marginals) -> "Matrix":
        no_a, no_b = marginals.negligible()
        rows = _moved(self.values.reshape(-1, *self.sizes), marginals.a, no_a)
        return Matrix(_moved(rows.mT, marginals.b, no_b).mT.reshape(self.values.shape))

    def detach(self) -> "Matrix":
        return Matrix(self.values.detach())


def _flat(points: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    if not shape:
        return points[None]
    return points.expand(*shape, *points.shape[-2:]).reshape(-1, *points.shape[-2:])


def _moved(points: torch.Tensor, weights: torch.Tensor, negligible: torch.Tensor) -> torch.Tensor:
    heaviest = torch.take_along_dim(points, weights.argmax(-1)[:, None, None], 1)
    return torch.where(negligible[..., None], heaviest, points)
