"""Marginals that are relaxed: penalties instead of constraints."""

import math
from dataclasses import dataclass

import torch


@dataclass
class Penalty:
    """
    A relaxed marginal, ``ρ KL(marginal | weights)``: the soft minimum is damped by ``λ = ρ/(ρ + ε)``.

    Args:
        ratio: ε/ρ, (batch, 1).
        term: the separable term of the cost over ε, which inner potentials leave out, (batch, size).
    """

    ratio: torch.Tensor
    term: torch.Tensor

    def relax(self, potential: torch.Tensor) -> torch.Tensor:
        return torch.lerp(-self.term, potential, 1 / (1 + self.ratio))

    def log_target(self, potential: torch.Tensor) -> torch.Tensor:
        """Logarithm of the marginal that is optimal for this potential, over the weights."""
        return -self.ratio * (potential + self.term)

    def select(self, members: torch.Tensor) -> None:
        self.ratio, self.term = self.ratio[members], self.term[members]


def penalties(
    rho: tuple[float, float], epsilon: torch.Tensor, terms: tuple[torch.Tensor, torch.Tensor]
) -> tuple[Penalty | None, Penalty | None]:
    """Penalties of rows and columns, none where ρ is infinite; ε (batch, 1), and the separable terms of the cost."""
    row, column = (None if r == math.inf else Penalty(epsilon / r, term / epsilon) for r, term in zip(rho, terms))
    return row, column
