"""Weights of the variable-step Adams-Bashforth rule."""

import functools
from collections.abc import Sequence

import numpy as np


def adams_bashforth(angles: Sequence[float], target: float) -> list[float]:
    """
    Weights ``w`` with ``∫ p = Σ w_j p(θ_j)`` from the last angle to ``target`` for polynomials p of degree below their number.

    Args:
        angles: θ of the last calls, oldest first.
        target: θ at the end of the step.
    """
    return list(_weights(tuple(angles), target))


@functools.lru_cache(maxsize=512)
def _weights(angles: tuple[float, ...], target: float) -> tuple[float, ...]:
    offsets, step = np.array(angles) - angles[-1], target - angles[-1]
    powers = np.arange(len(angles))
    return tuple(np.linalg.solve(np.vander(offsets, increasing=True).T, step ** (powers + 1) / (powers + 1)).tolist())
