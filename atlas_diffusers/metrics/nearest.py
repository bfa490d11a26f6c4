"""Nearest neighbours in pixels."""

import torch

from ..kernels import squared_distances


def nearest_neighbours(queries: torch.Tensor, references: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    For each query the nearest reference: ``min_j √mean((q − r_j)²)`` over all its values.

    Args:
        queries: ``(n, ...)``.
        references: ``(m, ...)`` of the same trailing shape.

    Returns:
        Root-mean-square distances ``(n,)`` in the units of the values, and indices ``(n,)``.
    """
    if queries.shape[1:] != references.shape[1:]:
        raise ValueError(f"queries are {tuple(queries.shape[1:])} each, references {tuple(references.shape[1:])}")
    q, r = queries.flatten(1).double(), references.flatten(1).double()
    squared, indices = squared_distances(q, r).min(dim=1)
    return (squared / q.shape[1]).sqrt(), indices
