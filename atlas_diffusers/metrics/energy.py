"""Energy distance between two sets of points."""

import torch

from .points import checked_points, squared_distance_blocks


def energy_distance(x: torch.Tensor, y: torch.Tensor) -> float:
    """
    Energy distance between the empirical distributions of two sets of points.

        2 E‖x − y‖ − E‖x − x'‖ − E‖y − y'‖

    Székely & Rizzo 2013 (J. Stat. Plan. Inference 143); an MMD² with the kernel −‖x − y‖, Sejdinovic et al. 2012 (arXiv
    1207.6076). It is the V-statistic, each mean over all pairs, those of a point with itself included: never negative but
    for rounding, and 0 only for equal sets. Two samples of one distribution have E‖x − x'‖ (1/n + 1/m) on average.

    Args:
        x: ``(n, d)``.
        y: ``(m, d)``.

    Raises:
        ValueError: for wrong points (see :func:`checked_points`).
    """
    x, y = checked_points(1, x=x, y=y)
    return 2 * _mean_distance(x, y) - _mean_distance(x, x) - _mean_distance(y, y)


def _mean_distance(x: torch.Tensor, y: torch.Tensor) -> float:
    """Mean of ``‖x_i − y_j‖`` over all pairs."""
    return sum(float(block.sqrt_().sum()) for _, block in squared_distance_blocks(x, y)) / (len(x) * len(y))
