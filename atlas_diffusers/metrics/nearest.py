"""Nearest neighbours in pixels."""

import torch


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
    distances = torch.cdist(q, r, compute_mode="donot_use_mm_for_euclid_dist") / q.shape[1] ** 0.5
    return distances.min(dim=1)
