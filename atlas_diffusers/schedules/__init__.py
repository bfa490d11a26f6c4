"""Noise schedules as mathematics: betas, signal and noise levels, prediction types, timestep grids. torch only.

One convention: ``x_t = α_t x_0 + σ_t ε`` with ``α_t² + σ_t² = 1`` (variance preserving, VP); ``t = 0`` is clean and
``t = T`` is noise. Variance-exploding (VE) coordinates are ``x_t / α_t`` with ``σ̂_t = σ_t / α_t``; the log
signal-to-noise ratio is ``λ_t = log(α_t / σ_t)``.
"""

import importlib

from .betas import BETA_SCHEDULES, get_betas, register_beta_schedule, rescale_zero_terminal_snr
from .flow import Flow
from .grids import SIGMA_GRIDS, TIMESTEP_SPACINGS, sigma_grid, spaced_timesteps
from .levels import NoiseLevel, NoiseTable
from .predictions import PREDICTION_TYPES, combine, data_coefficients, noise_coefficients, output_coefficients
from .process import NoiseProcess
from .variance_preserving import VarianceExploding, VariancePreserving

__all__ = [
    "BETA_SCHEDULES",
    "Flow",
    "NoiseLevel",
    "NoiseProcess",
    "NoiseTable",
    "PREDICTION_TYPES",
    "SIGMA_GRIDS",
    "TIMESTEP_SPACINGS",
    "VarianceExploding",
    "VariancePreserving",
    "combine",
    "data_coefficients",
    "get_betas",
    "karras_noise_schedule",
    "noise_coefficients",
    "output_coefficients",
    "register_beta_schedule",
    "rescale_zero_terminal_snr",
    "sigma_grid",
    "spaced_timesteps",
]


def __getattr__(name: str):
    if name == "karras_noise_schedule":  # where users of the original toolkit look for it
        return getattr(importlib.import_module("..originals", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
