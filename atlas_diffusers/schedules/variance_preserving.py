"""The processes of betas: variance preserving (VP), and the same in variance-exploding (VE) coordinates."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from .grids import sigma_grid
from .levels import NoiseLevel, NoiseTable
from .process import NoiseProcess
from .time_grid import (
    Request,
    TimeGrid,
    as_tensor,
    between_ends,
    checked_sigmas,
    checked_timesteps,
    grid_option,
    spaced_grid,
)


class VariancePreserving(NoiseProcess):
    """
    ``α_t² = ᾱ_t`` and ``σ_t² = 1 − ᾱ_t``; a level's sigma is ``σ̂ = σ/α``. Ho et al. 2020 (arXiv 2006.11239).

    Args:
        alphas_cumprod: ᾱ_t, ``(T,)``, decreasing.
        floor: smallest ᾱ where σ̂ must be finite: in sigma grids and between training timesteps.
        zero_signal: whether the level of a training timestep may have α = 0.
    """

    def __init__(self, alphas_cumprod: torch.Tensor, floor: float = 0.0, zero_signal: bool = True):
        super().__init__(len(alphas_cumprod))
        self.zero_signal = zero_signal
        self.finite = NoiseTable(alphas_cumprod, floor)
        self.exact = NoiseTable(alphas_cumprod) if zero_signal else self.finite

    @property
    def sigma_hats(self) -> torch.Tensor:
        """The finite σ̂ of the training timesteps, ``(T,)``, float64."""
        return self.finite.sigma_hats

    def from_sigma_hat(self, sigma_hat: float) -> NoiseLevel:
        return NoiseLevel.from_sigma_hat(sigma_hat)

    def level_at(self, timestep: int) -> NoiseLevel:
        return self.exact.level(timestep)

    def timesteps_of(self, levels: Sequence[NoiseLevel]) -> list[float]:
        sigma_hats = torch.tensor([level.sigma_hat for level in levels], dtype=torch.float64)
        return self.finite.timestep_at(sigma_hats).float().tolist()

    def levels_at(self, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if timesteps.is_floating_point():
            alpha_bar = 1 / (1 + self.finite.sigma_hat_at(timesteps, log=True) ** 2)
        else:
            alpha_bar = self.exact.alphas_cumprod.to(timesteps.device)[timesteps]
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    @property
    def ends(self) -> tuple[NoiseLevel, NoiseLevel]:
        low, high = self.sigma_hats[[0, -1]].tolist()
        return self.from_sigma_hat(high), self.from_sigma_hat(low)

    @property
    def middle(self) -> NoiseLevel:
        return self.level_at(len(self) // 2)

    def sigma(self, level: NoiseLevel) -> float:
        return level.sigma_hat

    def midpoint(self, here: NoiseLevel, there: NoiseLevel) -> NoiseLevel:
        return self.from_sigma_hat((here.sigma_hat + there.sigma_hat) / 2)

    def training_steps(self) -> tuple[torch.Tensor, torch.Tensor]:
        sigma_hats = torch.cat([self.sigma_hats.flip(0), torch.zeros(1, dtype=torch.float64)])
        return torch.arange(len(self) - 1, -1, -1), sigma_hats.float()

    def grid(self, config: Any, request: Request, final: NoiseLevel) -> TimeGrid:
        """Integer timesteps read their level from training; sigma grids are laid on the finite σ̂."""
        request.check(config)
        if request.sigmas is not None:
            return self.grid_through([self.from_sigma_hat(sigma) for sigma in checked_sigmas(request.sigmas)])
        if request.timesteps is not None:
            timesteps = checked_timesteps(request.timesteps, len(self))
            if any(t != int(t) for t in timesteps):
                raise ValueError(f"timesteps must be integers here, got {timesteps}; give sigmas for levels between them")
            return self._grid_at([int(t) for t in timesteps], final)
        spaced = spaced_grid(config, request.num_inference_steps, len(self))
        if option := grid_option(config):
            sigma_hats = between_ends(config, option, self.sigma_hats.flip(0), len(spaced)).tolist()
            return self.grid_through([*map(self.from_sigma_hat, sigma_hats), final])
        return replace(self._grid_at([round(t) for t in spaced], final), spaced=True)

    def _grid_at(self, timesteps: list[int], final: NoiseLevel) -> TimeGrid:
        source = [self.exact.levels[t] for t in timesteps]
        return TimeGrid(list(timesteps), source, [*source[1:], final], torch.int64)


class VarianceExploding(VariancePreserving):
    """
    The same process as ``x̂ = x/α = x_0 + σ̂ ε``: a level is ``(1, σ̂)``, always finite, and the network is given
    ``x̂/√(1 + σ̂²)``. Karras et al. 2022 (arXiv 2206.00364).
    """

    def from_sigma_hat(self, sigma_hat: float) -> NoiseLevel:
        return NoiseLevel(1.0, sigma_hat)

    def level_at(self, timestep: int) -> NoiseLevel:
        return self.from_sigma_hat(super().level_at(timestep).sigma_hat)

    def sample_levels_at(self, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        sigma_hats = self.finite.sigma_hat_at(timesteps)
        return torch.ones_like(sigma_hats), sigma_hats

    def training_steps(self) -> tuple[torch.Tensor, torch.Tensor]:
        timesteps, sigma_hats = super().training_steps()
        return timesteps.float(), sigma_hats

    def input_scale(self, level: NoiseLevel) -> float:
        return 1 / math.hypot(level.sigma, 1)

    def start_scale(self, level: NoiseLevel, with_data: bool) -> float:
        return math.hypot(level.sigma, 1) if with_data else level.sigma

    def grid(self, config: Any, request: Request, final: NoiseLevel) -> TimeGrid:
        """
        Fractional timesteps in float32, σ̂ interpolated between training timesteps, sigma grids between the first and the
        last spaced timestep.
        """
        request.check(config)
        continuous = config.timestep_type == "continuous" and config.prediction_type == "v_prediction"
        if continuous and request.timesteps is not None:
            raise ValueError("timesteps cannot be set with timestep_type='continuous' and v_prediction; give sigmas")
        if request.sigmas is not None:
            sigmas = checked_sigmas(request.sigmas)
            timesteps = self.finite.timestep_at(torch.tensor(sigmas[:-1], dtype=torch.float64))
        else:
            timesteps, sigmas = self._spaced(config, request, final)
        if continuous:
            timesteps = 0.25 * torch.tensor(sigmas[:-1], dtype=torch.float64).log()
        levels = [self.from_sigma_hat(sigma) for sigma in sigmas]
        return TimeGrid(timesteps.float().tolist(), levels[:-1], levels[1:], torch.float32)

    def _spaced(self, config: Any, request: Request, final: NoiseLevel) -> tuple[torch.Tensor, list[float]]:
        if request.timesteps is not None:
            timesteps = torch.tensor(checked_timesteps(request.timesteps, len(self)), dtype=torch.float32)
        else:
            timesteps = as_tensor(spaced_grid(config, request.num_inference_steps, len(self)), torch.float32)
        if config.interpolation_type == "log_linear":
            ends = self.sigma_hats[0].item(), self.sigma_hats[-1].item()
            sigmas = sigma_grid("exponential", *ends, len(timesteps) + 1)
        else:
            sigmas = self.finite.sigma_hat_at(timesteps)
        if option := grid_option(config):
            sigmas = between_ends(config, option, sigmas, len(timesteps))
            timesteps = self.finite.timestep_at(sigmas)
        return timesteps, [*sigmas.tolist(), final.sigma][: len(timesteps) + 1]
