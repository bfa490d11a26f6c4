"""Weights of the variable-step Adams-Bashforth rule."""

import numpy as np


def adams_bashforth(angles: list[float], target: float) -> list[float]:
    """
    Weights ``w`` with ``∫ p = Σ w_j p(θ_j)`` from the last angle to ``target`` for polynomials p of degree below their number.

    Args:
        angles: θ of the last calls, oldest first.
        target: θ at the end of the step.
    """
    offsets, step = np.array(angles) - angles[-1], target - angles[-1]
    powers = np.arange(len(angles))
    return np.linalg.solve(np.vander(offsets, increasing=True).T, step ** (powers + 1) / (powers + 1)).tolist()
