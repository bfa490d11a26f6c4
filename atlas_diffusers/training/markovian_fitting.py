"""Iterative Markovian fitting: two networks learn a bridge forward and backward, each from pairs that the other makes."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..bridges.brownian import bridge_displacement, follow

Displacement = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class MarkovianFitting:
    r"""
    The losses of passes that approach the Schrödinger bridge between two data sets with ``σ W`` as reference.

    The first pass fits both networks to Brownian bridges between given pairs. Then by turns one network follows its diffusion
    from real samples, and the other is fitted to Brownian bridges between these and where they came: a coupling whose one
    marginal is exact. The last pass fits the forward network. Shi et al. 2023 (arXiv 2303.16852), algorithm 1; Peluchetti 2023
    (arXiv 2304.00917).

    Args:
        forward, backward: networks of ``(x, r)`` with the share r of the time left, (batch,), in their own direction; see
            :func:`~atlas_diffusers.bridges.brownian.bridge_displacement`.
        sigma: σ, in the unit of the data.
        passes: in all, at least 1.
        steps: that make a pair, see :func:`~atlas_diffusers.bridges.brownian.follow`.
    """

    forward: Displacement
    backward: Displacement
    sigma: float
    passes: int
    steps: int = 10

    def loss(
        self,
        number: int,
        source: torch.Tensor,
        target: torch.Tensor,
        left: torch.Tensor,
        noise: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """
        ``E ‖d_θ(x, r) − d‖²`` of what learns in a pass.

        Args:
            number: of the pass, from 0.
            source, target: samples of both data sets, (batch, ...), paired in the first pass.
            left: r, (batch,), in (0, 1).
            noise: draws standard normal numbers like its argument.
        """
        if number == 0:
            return self._loss(self.forward, source, target, left, noise) + self._loss(
                self.backward, target, source, left, noise
            )
        if self.fits_forward(number):
            return self._loss(self.forward, self.follow(self.backward, target, noise), target, left, noise)
        return self._loss(self.backward, self.follow(self.forward, source, noise), source, left, noise)

    def fits_forward(self, number: int) -> bool:
        """Whether the forward network learns in a pass after the first."""
        return (self.passes - 1 - number) % 2 == 0

    @torch.no_grad()
    def follow(self, network: Displacement, x: torch.Tensor, noise: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Where the diffusion of a network takes samples."""
        return follow(lambda x, left: network(x, x.new_full((len(x),), left)), x, self.sigma, self.steps, noise)

    def _loss(self, network: Displacement, start: torch.Tensor, end: torch.Tensor, left: torch.Tensor, noise: Callable):
        x, displacement = bridge_displacement(start, end, left, self.sigma, noise(start))
        return (network(x, left) - displacement).square().mean()
