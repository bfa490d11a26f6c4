"""The bridge-matching objective: a velocity field that carries one data set to another."""

import torch


def brownian_bridge(
    source: torch.Tensor, target: torch.Tensor, t: torch.Tensor, sigma: float, noise: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    A point of the Brownian bridge between paired samples, and the velocity of its probability flow:

        x_t = (1 − t) x_0 + t x_1 + σ √(t(1 − t)) z,    u = x_1 − x_0 + (1 − 2t)/(2 √(t(1 − t))) σ z

    A network that regresses u on (x_t, t) learns the flow of the mixture of bridges; with pairs of
    :func:`~atlas_diffusers.training.sinkhorn_pairs` at ε = 2σ² that mixture is the Schrödinger bridge. Tong et al. 2023
    (arXiv 2307.03672), Shi et al. 2023 (arXiv 2303.16852).

    Args:
        source, target: x_0 and x_1, (batch, ...).
        t: times in (0, 1), (batch,).
        sigma: σ, in the unit of the data; 0 is flow matching on straight lines.
        noise: z, like ``source``.

    Returns:
        x_t and u, like ``source``.
    """
    t = t.reshape(-1, *[1] * (source.ndim - 1))
    spread = (t * (1 - t)).sqrt()
    x = torch.lerp(source, target, t) + sigma * spread * noise
    return x, target - source + (0.5 - t) / spread * sigma * noise
