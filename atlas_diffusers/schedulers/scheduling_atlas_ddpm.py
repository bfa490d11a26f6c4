"""DDPM: ancestral sampling from the posterior of the forward process."""

import math

import torch

from ..schedules import combine
from .conversion import extend_config
from .network_step import network_step
from .scheduling_base import AtlasSchedulerOutput, BaseScheduler

VARIANCE_TYPES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range")


class AtlasDDPMScheduler(BaseScheduler):
    r"""
    DDPM, from level ``(α, σ)`` to ``(α', σ')`` with ``r = α/α'`` and ``β = σ² − r²σ'²``, in betas ``1 − r²``:

        x' = (α' β/σ²) x_0 + (r σ'²/σ²) x + s z,    z ~ N(0, 1)

    Ho et al. 2020, equation 7 (arXiv 2006.11239). ``s²`` is `fixed_small` β̃ = β σ'²/σ², `fixed_large` β, `learned`
    the network's second half of channels v, or `learned_range` exp(w log β + (1 − w) log β̃) with w = (v + 1)/2
    (Nichol & Dhariwal 2021, arXiv 2102.09672); the `_log` names are the same variances under Diffusers' names.

    Args:
        variance_type: the choice of ``s``.
        Others: see :class:`BaseScheduler`.
    """

    @extend_config
    def __init__(self, variance_type: str = "fixed_small"):
        pass

    def _check_config(self) -> None:
        super()._check_config()
        if self.config.variance_type is None:  # files of DPM-Solver; Diffusers' DDPM then has the posterior's variance
            self.register_to_config(variance_type="fixed_small")
        if self.config.variance_type not in VARIANCE_TYPES:
            raise ValueError(f"variance_type={self.config.variance_type!r} is unknown; allowed are {VARIANCE_TYPES}")

    @network_step
    def step(
        self,
        model_output: torch.Tensor,
        timestep: torch.Tensor | int,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        per_token_timesteps: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> AtlasSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """
        One step of the formula above; no noise is added at timestep 0.

        Args:
            model_output: the network's prediction at ``timestep``, ``(batch, channels, height, width)``; twice the
                channels where the variance is learned.
            timestep: an element of ``self.timesteps``.
            sample: ``x_t``, ``(batch, channels, height, width)``; half precision is computed in float32.
            generator: source of ``z``; a list has one generator a sample.
            per_token_timesteps: timesteps of tokens at levels of their own (LTX), ``(batch, tokens)``; ``model_output`` then
                has its sign changed, as in Diffusers.
            return_dict: return an output object instead of ``(prev_sample, pred_original_sample)``.
        """
        index = self._advance(timestep)
        level, target = self._grid.source[index], self._grid.target[index]
        x, output = self._to_working_dtype(sample), self._to_working_dtype(model_output)
        learned = None
        if self.config.variance_type.startswith("learned"):
            output, learned = self._split_learned(output, x)
        data = self.predict_data(output, x, level)

        ratio = level.alpha / target.alpha
        beta = level.sigma**2 - (ratio * target.sigma) ** 2
        prev = combine(target.alpha * beta / level.sigma**2, data, ratio * target.sigma**2 / level.sigma**2, x)
        if self._grid.timesteps[index] > 0:
            small = max(beta * target.sigma**2 / level.sigma**2, 1e-20)
            noise = self._to_working_dtype(self._noise_like(sample, generator))
            deviation = self._standard_deviation(small, beta, learned)
            prev = torch.add(prev, noise, alpha=deviation) if learned is None else torch.addcmul(prev, deviation, noise)
        return self._output(prev, data, sample.dtype, return_dict)

    def _split_learned(self, output: torch.Tensor, sample: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if output.shape[1] != 2 * sample.shape[1]:
            raise ValueError(
                f"variance_type={self.config.variance_type!r} needs model_output with {2 * sample.shape[1]} channels, "
                f"got {output.shape[1]}"
            )
        return output.split(sample.shape[1], dim=1)

    def _standard_deviation(self, small: float, large: float, learned: torch.Tensor | None) -> torch.Tensor | float:
        match self.config.variance_type:
            case "fixed_small" | "fixed_small_log":
                return math.sqrt(small)
            case "fixed_large" | "fixed_large_log":
                return math.sqrt(large)
            case "learned":
                return learned.sqrt()
        log_small, log_large = math.log(small), math.log(large)
        return torch.exp(0.25 * ((learned + 1) * log_large + (1 - learned) * log_small))
