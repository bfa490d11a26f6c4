"""Schrödinger bridges whose plan is known exactly, and how far a solver's plan is from it."""

import math
from collections.abc import Callable

import torch

from atlas_diffusers.bridges.mixture_potential import MixturePotential

COMPONENTS, RADIUS, SPREAD = 5, 5.0, 0.5
VARIANCES = {0.1: 0.067, 1.0: 0.061, 10.0: 0.0092}  # of the potential's Gaussians, by epsilon
Moments = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class Problem:
    """
    The Gaussian law of x, and y given x, as in the benchmark of Gushchin et al. 2023 (arXiv 2306.10161).

    Args:
        kind: `sphere`, five equal isotropic Gaussians of the potential on a sphere, or `rotated`, with covariances of
            eigenvalues from 0.1 to 1 along random axes.
        dimensions: D.
        epsilon: ε.
        seed: of the problem and its samples.
    """

    def __init__(self, kind: str, dimensions: int, epsilon: float, seed: int):
        g = torch.Generator().manual_seed(1000 * seed + dimensions)
        self.generator, self.dimensions, self.epsilon = g, dimensions, epsilon
        self.spread = SPREAD if kind == "sphere" else 1.0
        centres = torch.randn(COMPONENTS, dimensions, generator=g, dtype=torch.float64)
        centres *= (RADIUS if kind == "sphere" else 1.2 * math.sqrt(dimensions)) / centres.norm(dim=1, keepdim=True)
        if kind == "sphere":
            scatter = (0.1 * torch.randn(COMPONENTS, 1, 1, generator=g, dtype=torch.float64)).exp()
            variance = VARIANCES[epsilon] * scatter * torch.eye(dimensions, dtype=torch.float64)
        else:
            axes, _ = torch.linalg.qr(torch.randn(COMPONENTS, dimensions, dimensions, generator=g, dtype=torch.float64))
            values = 0.1 * 10 ** torch.rand(COMPONENTS, 1, dimensions, generator=g, dtype=torch.float64)
            variance = axes * values @ axes.mT
        # exp(xᵀy/ε) N(y; μ, Σ) exp(−|y|²/2ε): the potential of the benchmark is N(y; μ, Σ) for the kernel exp(−|x − y|²/2ε)
        inverse = torch.linalg.inv(variance)
        S = torch.linalg.inv(inverse + torch.eye(dimensions) / epsilon)
        mean = (S @ inverse @ centres[:, :, None])[:, :, 0]
        tilt = torch.einsum("ki,kij,kj->k", centres, inverse, centres) - torch.einsum(
            "ki,kij,kj->k", mean, torch.linalg.inv(S), mean
        )
        mass = (torch.logdet(S) - torch.logdet(variance) - tilt) / 2
        self.potential = MixturePotential(mass, mean, S, torch.zeros_like(mean), epsilon)

    def source(self, count: int) -> torch.Tensor:
        return self.spread * torch.randn(count, self.dimensions, generator=self.generator, dtype=torch.float64)

    def target(self, x: torch.Tensor) -> torch.Tensor:
        """Draws of y given x."""
        return self.potential.draw(x, 0.0, self.generator)

    def moments(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return mixture_moments(self.potential, x)


def mixture_moments(potential: MixturePotential, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean (n, D) and covariance (n, D, D) of y given x."""
    log_weights, means, S = potential.posterior(x, 0.0)
    weights = log_weights.exp()
    mean = (weights[:, :, None] * means).sum(1)
    centred = (means - mean[:, None]) * weights.sqrt()[:, :, None]
    within = torch.einsum("nk,kij->nij", weights, S) if S.ndim == 3 else torch.diag_embed(weights @ S)
    return mean, within + centred.mT @ centred


def errors(found: Moments, problem: Problem, x: torch.Tensor, variance: float) -> tuple[float, float]:
    """
    cBW2-UVP and BW2-UVP in percent of half the variance of y: the squared Bures-Wasserstein distance between the laws of y
    given x, averaged over test points x, and between the laws of y that these points are sent to. Both from exact moments.
    """
    parts = [(*found(part), *problem.moments(part)) for part in x.split(100)]
    mean, C, exact_mean, exact_C = (torch.cat(each) for each in zip(*parts))
    conditional = bures(mean, C, exact_mean, exact_C).mean()
    marginal = bures(*(value[None] for value in (*total(mean, C), *total(exact_mean, exact_C))))[0]
    return tuple((100 * value / (variance / 2)).item() for value in (conditional, marginal))


def total(mean: torch.Tensor, C: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean (D,) and covariance (D, D) of an even mixture of laws with moments (n, D) and (n, D, D)."""
    return mean.mean(0), C.mean(0) + mean.T.cov(correction=0).view(C.shape[1:])


def bures(mean: torch.Tensor, C: torch.Tensor, other_mean: torch.Tensor, other_C: torch.Tensor) -> torch.Tensor:
    """Half the squared Bures-Wasserstein distances of laws with moments (n, D) and (n, D, D)."""
    values, vectors = torch.linalg.eigh(other_C)
    root = vectors * values.clamp(min=0).sqrt()[:, None] @ vectors.mT
    overlap = torch.linalg.eigvalsh(root @ C @ root).clamp(min=0).sqrt().sum(1)
    trace = (C + other_C).diagonal(dim1=1, dim2=2).sum(1)
    return (mean - other_mean).square().sum(1) / 2 + trace / 2 - overlap
