"""Euler ancestral: each step ends below its level and is brought back up by fresh noise."""

import math

import torch

from .scheduling_base import AtlasSchedulerOutput
from .scheduling_sigma_base import SigmaScheduler


class AtlasEulerAncestralScheduler(SigmaScheduler):
    r"""
    Euler ancestral, from ``σ̂`` to ``σ̂'``:

        x̂' = x_0 + (σ_down/σ̂)(x̂ − x_0) + σ_up z,    σ_down = σ̂'²/σ̂,    σ_up² = σ̂'² − σ_down²,    z ~ N(0, 1)

    which is DDPM's posterior with `fixed_small` variance in VE coordinates (Ho et al. 2020, arXiv 2006.11239).

    Args:
        See :class:`SigmaScheduler`.
    """

    def step(
        self,
        model_output: torch.Tensor,
        timestep: torch.Tensor | float,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> AtlasSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """
        One step of the formula above.

        Args:
            model_output: the network's prediction at ``timestep``, ``(batch, channels, height, width)``.
            timestep: an element of ``self.timesteps``.
            sample: ``x̂``, same shape; half precision is computed in float32.
            generator: source of ``z``; a list has one generator a sample.
            return_dict: return an output object instead of ``(prev_sample, pred_original_sample)``.
        """
        level, target = self._levels(timestep)
        x, output = self._to_working_dtype(sample), self._to_working_dtype(model_output)
        data = self.predict_data(output, x, level)
        down = target.sigma**2 / level.sigma
        prev = torch.lerp(data, x, down / level.sigma)
        if target.sigma > 0:
            z = self._to_working_dtype(self._noise_like(sample, generator))
            prev.add_(z, alpha=math.sqrt(max(0.0, target.sigma**2 - down**2)))
        return self._output(prev, data, sample.dtype, return_dict)
