"""DDIM: the deterministic sampler of the VP process, with an optional stochastic part."""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from ..schedules import NoiseLevel, combine
from ..schedules.time_grid import TimeGrid
from .network_step import network_step
from .options import SchedulerOptions, Unpack, takes_options
from .scheduling_base import AtlasSchedulerOutput, BaseScheduler


class AtlasDDIMScheduler(BaseScheduler):
    r"""
    DDIM, from level ``(α, σ)`` to ``(α', σ')``:

        x' = α' x_0 + √(σ'² − s²) ε + s z,    s = η σ' √(1 − (σ'α/(σα'))²),    z ~ N(0, 1)

    Song et al. 2020, equation 12 (arXiv 2010.02502). Order 1; η = 1 is ancestral DDPM sampling.

    Args:
        set_alpha_to_one: end at clean data; otherwise at training timestep 0, as Stable Diffusion's configuration does.
        options: see :class:`BaseScheduler`.
    """

    renoises = True

    @takes_options
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        *,
        clip_sample: bool = True,
        set_alpha_to_one: bool = True,
        timestep_spacing: str = "leading",
        **options: Unpack[SchedulerOptions],
    ):
        self._setup()

    def _final_level(self) -> NoiseLevel:
        return super()._final_level() if self.config.set_alpha_to_one else self.process.level_at(0)

    def _network_calls(self, grid: TimeGrid, steps: int) -> TimeGrid:
        if grid.spaced:
            # as in Diffusers, an evenly spaced step always covers ⌊T/N⌋ training timesteps
            stride, final, level = self.config.num_train_timesteps // steps, self._final_level(), self.process.level_at
            return replace(grid, target=[level(t - stride) if t >= stride else final for t in grid.timesteps])
        return grid

    def _levels(self, timestep: torch.Tensor | int) -> tuple[NoiseLevel, NoiseLevel]:
        if isinstance(timestep, int) and (grid := self._grid).spaced:
            if timestep not in grid.timesteps and 0 <= timestep < len(self.process):
                end = timestep - self.config.num_train_timesteps // self.num_inference_steps
                return self.process.level_at(timestep), self.process.level_at(end) if end >= 0 else self._final_level()
        return super()._levels(timestep)

    def _get_variance(self, timestep: int, prev_timestep: int) -> torch.Tensor:
        """``s²`` for η = 1 between two training timesteps, the second below 0 at the end."""
        level = self.process.level_at(timestep)
        target = self.process.level_at(prev_timestep) if prev_timestep >= 0 else self._final_level()
        return torch.tensor((target.sigma / level.sigma) ** 2 * (1 - (level.alpha / target.alpha) ** 2))

    @network_step
    def step(
        self,
        model_output: torch.Tensor,
        timestep: torch.Tensor | int,
        sample: torch.Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: torch.Tensor | None = None,
        per_token_timesteps: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> AtlasSchedulerOutput | tuple[torch.Tensor, ...]:
        """
        One step of the formula above.

        Args:
            model_output: the network's prediction at ``timestep``, ``(batch, channels, height, width)``.
            timestep: an element of ``self.timesteps``; on an even spacing also any other training timestep, as an int.
            sample: ``x_t``, same shape; half precision is computed in float32.
            eta: weight η in [0, 1] of the fresh noise.
            use_clipped_model_output: derive ε again from the clipped data prediction.
            generator: source of ``z``; a list has one generator a sample.
            variance_noise: ``z`` itself.
            per_token_timesteps: timesteps of tokens at levels of their own (LTX), ``(batch, tokens)``; ``model_output`` then
                has its sign changed, as in Diffusers.
            return_dict: return an output object instead of ``(prev_sample, pred_original_sample)``; a flow has no second one.
        """
        if variance_noise is not None and generator is not None:
            raise ValueError("give generator or variance_noise, not both")
        if self.config.stochastic_sampling and (eta > 0 or variance_noise is not None):
            raise ValueError("stochastic_sampling=True draws all noise of a step anew: give no eta and no variance_noise")
        level, target = self._levels(timestep)
        x, output = self._to_working_dtype(sample), self._to_working_dtype(model_output)
        if eta == 0 and not (self._clips or self.config.stochastic_sampling):
            prev = self.process.step(self.config.prediction_type, output, x, level, target)
            return self._output(prev, partial(self.predict_data, output, x, level), sample.dtype, return_dict)
        data = self.predict_data(output, x, level)
        if self.config.stochastic_sampling:
            return self._output(self._renoised(data, target, sample, generator), data, sample.dtype, return_dict)
        if use_clipped_model_output:
            noise = combine(1 / level.sigma, x, -level.alpha / level.sigma, data)
        else:
            noise = self.predict_noise(output, x, level)

        alpha, sigma = target
        fresh = eta * sigma * math.sqrt(max(0.0, 1 - (sigma * level.alpha / (level.sigma * alpha)) ** 2))
        prev = combine(alpha, data, math.sqrt(max(0.0, sigma**2 - fresh**2)), noise)
        if eta > 0:
            z = self._noise_like(sample, generator) if variance_noise is None else variance_noise
            prev = torch.add(prev, z, alpha=fresh)
        return self._output(prev, data, sample.dtype, return_dict)
