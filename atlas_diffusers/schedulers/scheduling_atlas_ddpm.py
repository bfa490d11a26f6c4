"""DDPM: ancestral sampling from the posterior of the forward process."""

import math
import warnings
from collections.abc import Sequence

import numpy as np
import torch

from ..schedules import NoiseLevel, combine
from .network_step import network_step
from .options import SchedulerOptions, Unpack, takes_options
from .scheduling_base import AtlasSchedulerOutput, BaseScheduler

VARIANCE_TYPES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range")


def _variances(level: NoiseLevel, target: NoiseLevel, rounded: bool) -> tuple[float, float]:
    """β̃, at least 1e-20, and β of a step; ``rounded`` as Diffusers' quotients of float32 ᾱ are."""
    kept = (level.alpha / target.alpha) ** 2
    beta = 1 - float(np.float32(kept)) if rounded else level.sigma**2 - kept * target.sigma**2
    return max(beta * target.sigma**2 / level.sigma**2, 1e-20), beta


class AtlasDDPMScheduler(BaseScheduler):
    r"""
    DDPM, from level ``(α, σ)`` to ``(α', σ')`` with ``r = α/α'`` and ``β = σ² − r²σ'²``, in betas ``1 − r²``:

        x' = (α' β/σ²) x_0 + (r σ'²/σ²) x + s z,    z ~ N(0, 1)

    Ho et al. 2020, equation 7 (arXiv 2006.11239). ``s²`` is `fixed_small` β̃ = β σ'²/σ², `fixed_large` β, `learned`
    the network's second half of channels v, or `learned_range` exp(w log β + (1 − w) log β̃) with w = (v + 1)/2
    (Nichol & Dhariwal 2021, arXiv 2102.09672); the `_log` names are the same variances under Diffusers' names.

    Args:
        variance_type: the choice of ``s``.
        options: see :class:`BaseScheduler`.
    """

    steps_unasked = True

    @takes_options
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        *,
        variance_type: str = "fixed_small",
        clip_sample: bool = True,
        timestep_spacing: str = "leading",
        **options: Unpack[SchedulerOptions],
    ):
        self._setup()

    def _check_config(self) -> None:
        super()._check_config()
        if self.config.variance_type is None:  # files of DPM-Solver; Diffusers' DDPM then has the posterior's variance
            self.register_to_config(variance_type="fixed_small")
        if self.config.variance_type not in VARIANCE_TYPES:  # an error where it is used; Diffusers takes any name
            warnings.warn(self._unknown_variance_type(), stacklevel=6)

    def _unknown_variance_type(self) -> str:
        return f"variance_type={self.config.variance_type!r} is unknown; allowed are {VARIANCE_TYPES}"

    @property
    def custom_timesteps(self) -> bool:
        """Whether ``set_timesteps`` was given the timesteps themselves."""
        return self.num_inference_steps is not None and self._grid.dtype == torch.int64 and not self._grid.spaced

    def previous_timestep(self, timestep: torch.Tensor | int) -> torch.Tensor:
        """Where the step from ``timestep`` ends, -1 for the last."""
        return torch.tensor([*self._grid.timesteps[1:], -1][self._run.index_of(timestep)])

    def _get_variance(
        self, t: torch.Tensor | int, predicted_variance: torch.Tensor | None = None, variance_type: str | None = None
    ) -> torch.Tensor:
        """As in Diffusers ``s²``, but ``s`` for `fixed_small_log`, and ``log s²`` for `fixed_large_log` and `learned_range`."""
        index, grid = self._run.index_of(t), self._grid
        small, large = map(torch.tensor, _variances(grid.source[index], grid.target[index], grid.dtype == torch.int64))
        kind = variance_type or self.config.variance_type
        if kind.startswith("learned"):
            if predicted_variance is None:
                raise ValueError(f"variance_type={kind!r} needs predicted_variance")
            if kind == "learned":
                return predicted_variance
            return torch.lerp(small.log(), large.log(), (predicted_variance + 1) / 2)
        match kind:
            case "fixed_large_log":
                return large.log()
            case "fixed_large":
                return large
            case "fixed_small_log":
                return small.sqrt()
        return small

    @network_step
    def step(
        self,
        model_output: torch.Tensor,
        timestep: torch.Tensor | int,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        per_token_timesteps: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> AtlasSchedulerOutput | tuple[torch.Tensor, ...]:
        """
        One step of the formula above; no noise is added at timestep 0 of betas.

        Args:
            model_output: the network's prediction at ``timestep``, ``(batch, channels, height, width)``; twice the
                channels where the variance is learned.
            timestep: an element of ``self.timesteps``.
            sample: ``x_t``, ``(batch, channels, height, width)``; half precision is computed in float32.
            generator: source of ``z``; a list has one generator a sample.
            per_token_timesteps: timesteps of tokens at levels of their own (LTX), ``(batch, tokens)``; ``model_output`` then
                has its sign changed, as in Diffusers.
            return_dict: return an output object instead of ``(prev_sample, pred_original_sample)``; a flow has no second one.
        """
        run, index = self._advance(timestep)
        grid = run.planned()
        level, target = grid.source[index], grid.target[index]
        x, output = self._to_working_dtype(sample), self._to_working_dtype(model_output)
        learned = None
        if self.config.variance_type.startswith("learned"):
            output, learned = self._split_learned(output, x)
        data = self.predict_data(output, x, level)

        ratio = level.alpha / target.alpha
        small, beta = _variances(level, target, grid.dtype == torch.int64 and x.dtype != torch.float64)
        prev = combine(target.alpha * beta / level.sigma**2, data, ratio * target.sigma**2 / level.sigma**2, x)
        if grid.timesteps[index] > 0 or level.alpha == 0:  # an inverted flow counts from pure noise
            noise = self._to_working_dtype(self._noise_like(sample, generator))
            if learned is None:
                prev = torch.add(prev, noise, alpha=self._fixed_deviation(small, beta))
            else:
                prev = torch.addcmul(prev, self._learned_deviation(small, beta, learned), noise)
        return self._output(prev, data, sample.dtype, return_dict)

    def _split_learned(self, output: torch.Tensor, sample: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if output.shape[1] != 2 * sample.shape[1]:
            raise ValueError(
                f"variance_type={self.config.variance_type!r} needs model_output with {2 * sample.shape[1]} channels, "
                f"got {output.shape[1]}"
            )
        mean, variance = output.split(sample.shape[1], dim=1)
        return mean, variance

    def _fixed_deviation(self, small: float, large: float) -> float:
        match self.config.variance_type:
            case "fixed_small" | "fixed_small_log":
                return math.sqrt(small)
            case "fixed_large" | "fixed_large_log":
                return math.sqrt(large)
        raise ValueError(self._unknown_variance_type())

    def _learned_deviation(self, small: float, large: float, learned: torch.Tensor) -> torch.Tensor:
        match self.config.variance_type:
            case "learned":
                return learned.sqrt()
            case "learned_range":
                log_small, log_large = math.log(small), math.log(large)
                return torch.exp(0.25 * ((learned + 1) * log_large + (1 - learned) * log_small))
        raise ValueError(self._unknown_variance_type())
