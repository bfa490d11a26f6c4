"""Precision, recall, density and coverage of generated points by balls around their nearest neighbours."""

from typing import NamedTuple

import torch

from .points import checked_points, squared_distance_blocks

_TIE = 1e-12  # of the largest squared norm: what the squared distances of equal pairs may differ by


class ManifoldOverlap(NamedTuple):
    """How two sets of points cover one another; density may exceed 1, the others are fractions."""

    precision: float
    recall: float
    density: float
    coverage: float


def manifold_overlap(real: torch.Tensor, generated: torch.Tensor, neighbours: int = 5) -> ManifoldOverlap:
    """
    Precision, recall, density and coverage, from the balls B around points that reach their k-th nearest neighbour.

        precision = share of generated points in some B(real)      recall   = share of real points in some B(generated)
        density   = mean over generated points of #{B(real) ∋ y}/k  coverage = share of B(real) that hold a generated point

    Precision and recall: Kynkäänniemi et al. 2019 (arXiv 1904.06991, where k = 3); density and coverage: Naeem et al. 2020
    (arXiv 2002.09797, k = 5). A neighbour is another point of the same set; balls are closed. For two samples of one
    distribution density is 1 on average, and coverage near 1 − 2⁻ᵏ if the sets are of equal size.

    Args:
        real: ``(n, d)``.
        generated: ``(m, d)``.
        neighbours: k, less than n and m.

    Raises:
        ValueError: for wrong points (see :func:`checked_points`), k < 1, or no more than k points.
    """
    if neighbours < 1:
        raise ValueError(f"neighbours={neighbours}; expected at least 1")
    real, generated = checked_points(neighbours + 1, real=real, generated=generated)
    tie = _TIE * float(torch.cat((real, generated)).sub(real.mean(0)).square().sum(1).max())
    real_radii, generated_radii = (_squared_radii(points, neighbours) + tie for points in (real, generated))
    covered, recalled = (torch.zeros(len(real), dtype=torch.bool, device=real.device) for _ in range(2))
    balls = torch.zeros(len(generated), dtype=torch.int64, device=real.device)
    for rows, distances in squared_distance_blocks(real, generated):
        inside = distances <= real_radii[rows, None]
        balls += inside.sum(0)
        covered[rows] = inside.any(1)
        recalled[rows] = (distances <= generated_radii).any(1)
    precision, recall, coverage = (float(hits.double().mean()) for hits in (balls > 0, recalled, covered))
    return ManifoldOverlap(precision, recall, float(balls.double().mean()) / neighbours, coverage)


def _squared_radii(points: torch.Tensor, neighbours: int) -> torch.Tensor:
    """Squared distance from each point to its k-th nearest other point, (n,)."""
    return torch.cat([block.kthvalue(neighbours + 1).values for _, block in squared_distance_blocks(points, points)])
