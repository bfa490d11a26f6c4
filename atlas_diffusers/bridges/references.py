"""References that particles are coupled with: in memory, or in files that are read in blocks."""

from abc import ABC, abstractmethod
from typing import Any

import torch

from ..kernels.distances import PairDistances
from ..transport import SinkhornOutput, entropic_transport
from ..transport.split_costs import PointCost, SplitCost


class ReferenceSet(ABC):
    """
    m points ``y`` as a bridge uses them.

    ``shape`` is ``(m, ...)``; particles come flattened, (n, d), in data units.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def __len__(self) -> int:
        return self.shape[0]

    @abstractmethod
    def to(self, device: torch.device | str) -> "ReferenceSet":
        """The same references, on another device."""

    @abstractmethod
    def take(self, indices: torch.Tensor) -> torch.Tensor:
        """The references of these indices, (k, d)."""

    @abstractmethod
    def transport(self, x: torch.Tensor, epsilon: float, max_bytes: int, **options: Any) -> SinkhornOutput:
        """Entropic transport of particles, with options of :func:`~atlas_diffusers.transport.entropic_transport`."""

    @abstractmethod
    def cost(self, x: torch.Tensor, epsilon: float, max_bytes: int) -> SplitCost:
        """``|x_i − y_j|²``, as a batch of one."""

    @abstractmethod
    def average(self, cost: SplitCost, psi: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Means of the references with weights ∝ ``exp(ψ_kj − C_ij/ε)``, and exp of the entropy of these.

        Args:
            cost: between the particles and these references.
            psi: ψ, (k, m).

        Returns:
            (k, n, d) and (k, n).
        """

    @abstractmethod
    def nearest(self, x: torch.Tensor) -> torch.Tensor:
        """Euclidean distance of each particle to its nearest reference, (n,)."""


def shares(exponents: torch.Tensor, psi: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights ∝ ``exp(exponents + ψ)`` of exponents (1, n, m) and ψ (k, m): (k, n, m), and exp of their entropy, (k, n)."""
    weights = (exponents + psi[:, None].to(exponents.dtype)).softmax(-1)
    return weights, torch.special.entr(weights).sum(-1).exp()


class ReferencePoints(ReferenceSet):
    """References that are in memory, ``(m, ...)``."""

    def __init__(self, values: torch.Tensor):
        if not bool(values.isfinite().all()):
            raise ValueError(f"references contain {int((~values.isfinite()).sum())} values that are NaN or infinite")
        self.shape, self.dtype, self.device = tuple(values.shape), values.dtype, values.device
        self.points = values.flatten(1)
        self._centre = self.points.mean(0)
        self._centred = self.points - self._centre

    def to(self, device: torch.device | str) -> "ReferencePoints":
        return ReferencePoints(self.points.view(self.shape).to(device))

    def take(self, indices: torch.Tensor) -> torch.Tensor:
        return self.points[indices]

    def transport(self, x: torch.Tensor, epsilon: float, max_bytes: int, **options: Any) -> SinkhornOutput:
        return entropic_transport(x, self.points, epsilon, max_bytes=max_bytes, **options)

    def cost(self, x: torch.Tensor, epsilon: float, max_bytes: int) -> PointCost:
        width = torch.tensor([epsilon], dtype=torch.float64, device=self.device)
        return PointCost(x[None], self.points[None], width, max_bytes=max_bytes)

    def average(self, cost: SplitCost, psi: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        def part(exponents: torch.Tensor, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
            weights, sizes = shares(exponents, psi)
            return weights.to(self.dtype) @ self._centred + self._centre, sizes

        none = torch.zeros(cost.shape[:2], dtype=psi.dtype, device=psi.device), psi.new_zeros(1, len(self))
        means, sizes = zip(*cost.each(part, *none))
        return torch.cat(means, 1), torch.cat(sizes, 1)

    def nearest(self, x: torch.Tensor) -> torch.Tensor:
        return PairDistances(x, self.points).rows(0, len(x)).amin(1).sqrt()
