"""Noise schedules of continuous time, from t = 1 (noise) to t = 0 (clean)."""

import torch


def karras_noise_schedule(
    t: float | torch.Tensor, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> float | torch.Tensor:
    r"""
    ``ᾱ(t) = 1/(1 + σ̂²)``,  ``σ̂(t) = (σ_min^{1/ρ} + t (σ_max^{1/ρ} − σ_min^{1/ρ}))^ρ``. Karras et al. 2022 (arXiv 2206.00364).

    Args:
        t: time in [0, 1]; 1 is noise, 0 clean.
        sigma_min, sigma_max: ends of σ̂ = √((1 − ᾱ)/ᾱ).
        rho: ρ; the larger, the more time is spent at low noise.

    Returns:
        ᾱ like ``t``.

    Raises:
        ValueError: unless 0 < sigma_min < sigma_max and rho > 0, and for t outside [0, 1].
    """
    if not 0 < sigma_min < sigma_max or not rho > 0:
        raise ValueError(f"expected 0 < sigma_min < sigma_max and rho > 0, got {sigma_min}, {sigma_max} and {rho}")
    low, high = (t.min().item(), t.max().item()) if torch.is_tensor(t) else (t, t)
    if not 0 <= low <= high <= 1:
        raise ValueError(f"t must be in [0, 1], got values from {low} to {high}")
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return 1 / (1 + (low + t * (high - low)) ** (2 * rho))
