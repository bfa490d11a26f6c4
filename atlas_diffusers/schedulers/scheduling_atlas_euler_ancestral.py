"""Euler ancestral: each step ends below its level and is brought back up by fresh noise."""

import math

import torch

from ..schedules import combine
from .network_step import network_step
from .scheduling_base import AtlasSchedulerOutput
from .scheduling_sigma_base import SigmaScheduler


class AtlasEulerAncestralScheduler(SigmaScheduler):
    r"""
    Euler ancestral, from level ``(α, σ)`` to ``(α', σ')`` in VE coordinates (where α is 1) or on a flow:

        x' = α' x_0 + σ_down ε + σ_up z,    σ_down = σ'ρ,    σ_up² = σ'² − σ_down²,    ρ = σ'α/(σα'),    z ~ N(0, 1)

    which is DDPM's posterior with `fixed_small` variance (Ho et al. 2020, arXiv 2006.11239) and keeps the marginals of the
    process.

    Args:
        See :class:`SigmaScheduler`.
    """

    renoises = True

    @network_step
    def step(
        self,
        model_output: torch.Tensor,
        timestep: torch.Tensor | float,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        per_token_timesteps: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> AtlasSchedulerOutput | tuple[torch.Tensor, ...]:
        """
        One step of the formula above.

        Args:
            model_output: the network's prediction at ``timestep``, ``(batch, channels, height, width)``.
            timestep: an element of ``self.timesteps``.
            sample: ``x̂``, same shape; half precision is computed in float32.
            generator: source of ``z``; a list has one generator a sample.
            per_token_timesteps: timesteps of tokens at levels of their own (LTX), ``(batch, tokens)``; ``model_output`` then
                has its sign changed, as in Diffusers.
            return_dict: return an output object instead of ``(prev_sample, pred_original_sample)``; a flow has no second one.
        """
        level, target = self._levels(timestep)
        x, output = self._to_working_dtype(sample), self._to_working_dtype(model_output)
        data = self.predict_data(output, x, level)
        if self.config.stochastic_sampling:
            return self._output(self._renoised(data, target, sample, generator), data, sample.dtype, return_dict)
        down = target.sigma**2 * level.alpha / (level.sigma * target.alpha)
        prev = combine(target.alpha - level.alpha * down / level.sigma, data, down / level.sigma, x)
        if target.sigma > 0:
            z = self._to_working_dtype(self._noise_like(sample, generator))
            prev = torch.add(prev, z, alpha=math.sqrt(max(0.0, target.sigma**2 - down**2)))
        return self._output(prev, data, sample.dtype, return_dict)
