"""Potentials of a transport problem, and starts for the next of a series."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Potentials:
    """f and g in the unit of the cost, (batch, n) and (batch, m), the row error of their plan, (batch,), and iterations."""

    f: torch.Tensor
    g: torch.Tensor
    error: torch.Tensor
    iterations: int


def extrapolate_potentials(history: Sequence[torch.Tensor], positions: Sequence[float], position: float) -> torch.Tensor | None:
    """
    Potentials of the next problem: linear in a coordinate such as log-SNR, through the last two that were solved.

    Along a diffusion extrapolate the potentials g of fixed references, in the unit of the cost, and start from ``(None, g)``:
    the particles then may move as they like.

    Args:
        history: potentials (m,) solved so far; the last one is returned if there is only one, ``None`` if there is none.
        positions: their coordinates.
        position: coordinate of the next problem.

    Raises:
        ValueError: for lengths that differ, or if the last two positions are equal.
    """
    if len(history) != len(positions):
        raise ValueError(f"history and positions must be of one length, got {len(history)} and {len(positions)}")
    if len(history) < 2:
        return history[-1] if history else None
    if positions[-1] == positions[-2]:
        raise ValueError(f"the last two positions must differ, both are {positions[-1]}")
    weight = (position - positions[-2]) / (positions[-1] - positions[-2])
    return torch.lerp(history[-2], history[-1], weight)
