"""Euler: the probability-flow ODE in coordinates where it is straight for known data, with optional churn."""

import math
from functools import partial

import torch

from ..schedules import combine
from .network_step import network_step
from .scheduling_base import AtlasSchedulerOutput
from .scheduling_sigma_base import SigmaScheduler


class AtlasEulerScheduler(SigmaScheduler):
    r"""
    Euler, from ``σ`` to ``σ'`` in VE coordinates (where it is σ̂) or on a flow:

        x' = x + (σ' − σ) (x − x_0)/σ = x_0 + (σ'/σ)(x − x_0)      (= α' x_0 + σ' ε)

    after a rise to the level of ``(1 + γ)σ/α`` by fresh noise where ``s_churn`` asks for it. Karras et al. 2022, algorithm 2
    without its correction (arXiv 2206.00364). Order 1; the same points as DDIM where the grids agree.

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
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = math.inf,
        s_noise: float = 1.0,
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
            s_churn: γ = min(s_churn/N, √2 − 1) over N steps.
            s_tmin, s_tmax: range of σ with churn.
            s_noise: standard deviation of the fresh noise.
            generator: its source; a list has one generator a sample.
            per_token_timesteps: timesteps of tokens at levels of their own (LTX), ``(batch, tokens)``; ``model_output`` then
                has its sign changed, as in Diffusers.
            return_dict: return an output object instead of ``(prev_sample, pred_original_sample)``; a flow has no second one.
        """
        level, target = self._levels(timestep)
        x, output = self._to_working_dtype(sample), self._to_working_dtype(model_output)
        churned = s_churn > 0 and s_tmin <= level.sigma <= s_tmax and level.alpha > 0
        if not (churned or self._clips or self.config.stochastic_sampling):
            prev = self.process.step(self.config.prediction_type, output, x, level, target)
            return self._output(prev, partial(self.predict_data, output, x, level), sample.dtype, return_dict)
        risen = level
        if churned:
            gamma = min(s_churn / len(self._grid.source), math.sqrt(2) - 1)
            risen = self.process.from_sigma_hat(level.sigma_hat * (1 + gamma))
            kept = risen.alpha / level.alpha
            z = self._to_working_dtype(self._noise_like(sample, generator))
            x = combine(kept, x, s_noise * math.sqrt(risen.sigma**2 - (kept * level.sigma) ** 2), z)
        # the network saw the sample before the churn; as in Diffusers, only v is read at the level that it saw
        data = self.predict_data(output, x, level if self.config.prediction_type == "v_prediction" else risen)
        if self.config.stochastic_sampling:
            prev = self._renoised(data, target, sample, generator)
        else:
            prev = torch.lerp(data, x, target.sigma / risen.sigma)
        return self._output(prev, data, sample.dtype, return_dict)
