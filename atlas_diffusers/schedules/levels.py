"""Noise levels: signal α, noise σ and log-SNR λ of every training timestep, and between them."""

import math
from functools import cached_property
from typing import NamedTuple

import torch


class NoiseLevel(NamedTuple):
    """A point of the forward process, ``x = alpha · x_0 + sigma · ε``: ``alpha² + sigma² = 1`` in VP, ``alpha = 1`` in VE."""

    alpha: float
    sigma: float

    @classmethod
    def from_sigma_hat(cls, sigma_hat: float) -> "NoiseLevel":
        """The VP level whose VE noise is ``σ̂ = σ/α``."""
        scale = math.sqrt(1 + sigma_hat * sigma_hat)
        return cls(1 / scale, sigma_hat / scale)

    @property
    def sigma_hat(self) -> float:
        """VE noise ``σ/α``; +inf at zero signal."""
        return self.sigma / self.alpha if self.alpha else math.inf

    @property
    def log_snr(self) -> float:
        """``λ = log(α/σ)``; +inf for clean data, -inf at zero signal."""
        return -math.log(self.sigma_hat) if self.sigma else math.inf


CLEAN = NoiseLevel(1.0, 0.0)


class NoiseTable:
    """
    The levels of the training timesteps 0..T-1, and their interpolation.

    ᾱ is the float32 product that a network was trained with; everything derived from it is computed in float64.

    Args:
        alphas_cumprod: ᾱ_t, ``(T,)``, decreasing.
        floor: smallest ᾱ; 2⁻²⁴ keeps σ̂ finite where ᾱ_T is zero, as Diffusers' Euler does.
    """

    def __init__(self, alphas_cumprod: torch.Tensor, floor: float = 0.0):
        self.alphas_cumprod = alphas_cumprod.to(torch.float64).clamp(min=floor)
        self.sigma_hats = ((1 - self.alphas_cumprod) / self.alphas_cumprod).sqrt()
        self.log_sigma_hats = self.sigma_hats.log()

    def __len__(self) -> int:
        return len(self.alphas_cumprod)

    def __deepcopy__(self, memo: dict[int, object]) -> "NoiseTable":
        return self  # nothing changes a table

    @cached_property
    def levels(self) -> list[NoiseLevel]:
        """The VP levels of the training timesteps."""
        alphas, sigmas = self.alphas_cumprod.sqrt(), (1 - self.alphas_cumprod).sqrt()
        return list(map(NoiseLevel, alphas.tolist(), sigmas.tolist()))

    def level(self, timestep: int) -> NoiseLevel:
        """The level of a training timestep; negative timesteps are clean data."""
        return self.levels[timestep] if timestep >= 0 else CLEAN

    def sigma_hat_at(self, timesteps: torch.Tensor, log: bool = False) -> torch.Tensor:
        """σ̂ at fractional timesteps, linear in σ̂ (or in log σ̂) between training timesteps."""
        table = (self.log_sigma_hats if log else self.sigma_hats).to(timesteps.device)
        position = timesteps.to(torch.float64).clamp(0, len(self) - 1)
        low = position.long()
        values = torch.lerp(table[low], table[position.ceil().long()], position - low)
        return values.exp() if log else values

    def timestep_at(self, sigma_hats: torch.Tensor) -> torch.Tensor:
        """Fractional timesteps of the given σ̂, linear in log σ̂, clipped to ``[0, T−1]``: inverse of ``sigma_hat_at``."""
        log = sigma_hats.to(torch.float64).clamp(min=1e-10).log()
        low = (torch.searchsorted(self.log_sigma_hats, log, right=True) - 1).clamp(0, len(self) - 2)
        left, right = self.log_sigma_hats[low], self.log_sigma_hats[low + 1]
        return low + torch.where(right > left, (log - left) / (right - left), 1.0).clamp(0, 1)
