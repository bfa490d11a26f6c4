"""Transport costs as a solution sees them: exponents block by block, potentials included."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TypeVar

import torch

DEFAULT_MAX_BYTES = 2**31
HELD_MATRICES = 12  # of the plan's size, that the gradients of an output hold
Result = TypeVar("Result")
Reduction = Callable[[torch.Tensor, slice], Result]


class Cost(ABC):
    """
    Exponents ``φ_i + ψ_j − C_ij/ε`` of a batch of problems, from which everything else follows.

    ``shape`` is (batch, n, m) and ``epsilon`` (batch,); potentials here are divided by ε.
    """

    shape: tuple[int, int, int]
    epsilon: torch.Tensor
    max_bytes: int

    @property
    def holds_gradients(self) -> bool:
        """Whether the gradients of an output, which hold several matrices, fit ``max_bytes``."""
        return HELD_MATRICES * math.prod(self.shape) * self.epsilon.itemsize <= self.max_bytes

    @abstractmethod
    def each(self, function: Reduction[Result], phi: torch.Tensor, psi: torch.Tensor) -> list[Result]:
        """
        ``function(exponents, rows)`` of every block of rows.

        Args:
            function: takes exponents (batch, rows, m) and the range of these rows.
            phi, psi: potentials over ε, (batch, n) and (batch, m).
        """

    def log_rows(self, psi: torch.Tensor) -> torch.Tensor:
        """``log Σ_j e^{ψ_j − C_ij/ε}``, (batch, n)."""
        zero = psi.new_zeros(self.shape[:2])
        return torch.cat(self.each(lambda block, rows: block.logsumexp(-1).to(psi.dtype), zero, psi), -1)

    def log_columns(self, phi: torch.Tensor) -> torch.Tensor:
        """``log Σ_i e^{φ_i − C_ij/ε}``, (batch, m)."""
        zero = phi.new_zeros(self.shape[0], self.shape[2])
        parts = self.each(lambda block, rows: block.logsumexp(-2).to(phi.dtype), phi, zero)
        return torch.stack(parts).logsumexp(0)

    def sums(self, phi: torch.Tensor, psi: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``Σ_j`` and ``Σ_i`` of ``e^{φ_i + ψ_j − C_ij/ε}``, (batch, n) and (batch, m), float64."""
        return (phi + self.log_rows(psi)).exp(), (psi + self.log_columns(phi)).exp()

    def project(self, psi: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Averages of ``values`` (batch, m, k) with weights ∝ ``e^{ψ_j − C_ij/ε}``, (batch, n, k)."""
        zero = psi.new_zeros(self.shape[:2])
        return torch.cat(self.each(lambda block, rows: block.softmax(-1) @ values.to(block.dtype), zero, psi), -2)
