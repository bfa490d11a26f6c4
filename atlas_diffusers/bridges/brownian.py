"""A diffusion along the displacements that a network predicts, and the Brownian bridges that it learns them from."""

from collections.abc import Callable

import torch

Predict = Callable[[torch.Tensor, float], torch.Tensor]


def bridge_displacement(
    start: torch.Tensor, end: torch.Tensor, left: torch.Tensor, sigma: float, noise: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    A point of the Brownian bridge between a pair, with the share r of its time left, and how far the end is from there in
    units of √r:

        x = (1 − r) x_end + r x_start + σ √(r(1 − r)) z,    d = (x_end − x)/√r

    A network that regresses d on (x, r) learns ``√r u`` with u the drift of the diffusion ``dX = u dt + σ dW`` that has the
    mixture of bridges' laws at every time (its Markovian projection; Shi et al. 2023, arXiv 2303.16852). d stays bounded where
    drifts and velocities do not.

    Args:
        start, end: (batch, ...).
        left: r in (0, 1], (batch,).
        sigma: σ, in the unit of the data.
        noise: z, like ``start``.

    Returns:
        x and d, like ``start``.
    """
    r = left.reshape(-1, *[1] * (start.ndim - 1))
    spread = sigma * (1 - r).sqrt() * noise
    x = torch.lerp(end, start, r) + r.sqrt() * spread
    return x, r.sqrt() * (end - start) - spread


def times_left(steps: int) -> list[float]:
    """``(1 − k/N)²``, k = 0, ..., N: shorter steps towards the end, where details appear, the last to 0."""
    return [(1 - k / steps) ** 2 for k in range(steps + 1)]


def follow(
    predict: Predict, x: torch.Tensor, sigma: float, steps: int, noise: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    r"""
    Where the diffusion takes points, by Heun's method, of weak order 2 for its constant noise; the last step goes to the
    predicted end. With ``u(x, r) = d/√r``, h a step and r' what it leaves:

        x̃ = x + h u(x, r) + σ √h z,    x' = x̃ + h/2 (u(x̃, r') − u(x, r))

    Args:
        predict: gives d for ``(x, r)``, see :func:`bridge_displacement`.
        x: (batch, ...), where it starts.
        sigma: σ.
        steps: N, which take 2N − 1 calls of ``predict``.
        noise: draws standard normal numbers like its argument.
    """
    times = times_left(steps)
    for left, after in zip(times, times[1:]):
        step, drift = left - after, predict(x, left) / left**0.5
        x = x + step * drift
        if after:
            x = x + sigma * step**0.5 * noise(x)
            x = x + step / 2 * (predict(x, after) / after**0.5 - drift)
    return x
