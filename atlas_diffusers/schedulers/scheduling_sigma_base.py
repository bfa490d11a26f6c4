"""What the samplers in variance-exploding (VE) coordinates share: ``x̂ = x/α = x_0 + σ̂ ε`` with ``σ̂ = σ/α``."""

import math

import torch

from .conversion import extend_config
from .scheduling_base import BaseScheduler
from .time_grid import Request, TimeGrid, variance_exploding_grid


class SigmaScheduler(BaseScheduler):
    r"""
    Base of the samplers that follow the probability-flow ODE ``dx̂/dσ̂ = (x̂ − x_0(x̂, σ̂))/σ̂``.

    The network is called with ``x̂/√(1 + σ̂²)`` (``scale_model_input``), and the first sample is noise times
    ``init_noise_sigma``. Karras et al. 2022 (arXiv 2206.00364).

    Args:
        interpolation_type: σ̂ at a fractional timestep: `linear`, or `log_linear` for σ̂ evenly spaced in log σ̂ whatever
            the timesteps, as Diffusers has it.
        sigma_min, sigma_max: ends of a sigma grid; by default σ̂ at the last and the first spaced timestep.
        timestep_type: `discrete`, or `continuous` for networks with ``v_prediction`` that are given ¼ log σ̂.
        Others: see :class:`BaseScheduler`.
    """

    @extend_config
    def __init__(
        self,
        timestep_spacing: str = "linspace",
        interpolation_type: str = "linear",
        timestep_type: str = "discrete",
    ):
        pass

    def _check_config(self) -> None:
        super()._check_config()
        c = self.config
        for name, allowed in (
            ("interpolation_type", ("linear", "log_linear")),
            ("timestep_type", ("discrete", "continuous")),
        ):
            if c[name] not in allowed:
                raise ValueError(f"{name}={c[name]!r} is unknown; allowed are {allowed}")

    def _setup(self) -> None:
        super()._setup()
        self._table = self._finite_table
        self.timesteps = self.timesteps.float()
        self.sigmas = torch.cat([self._table.sigma_hats.flip(0), torch.zeros(1, dtype=torch.float64)]).float()

    def _build_grid(self, request: Request) -> TimeGrid:
        continuous = self.config.timestep_type == "continuous" and self.config.prediction_type == "v_prediction"
        if continuous and request.timesteps is not None:
            raise ValueError("timesteps cannot be set with timestep_type='continuous' and v_prediction; give sigmas")
        return variance_exploding_grid(self.config, self._table, request, self._final_level().sigma_hat)

    @property
    def init_noise_sigma(self) -> float:
        """Standard deviation of the first sample: σ̂ of the first step, with the data's unit variance for `leading`."""
        largest = self.sigmas[0].item() if self._grid is None else self._grid.source[0].sigma
        return largest if self.config.timestep_spacing in ("linspace", "trailing") else math.hypot(largest, 1)

    def scale_model_input(self, sample: torch.Tensor, timestep: torch.Tensor | float) -> torch.Tensor:
        """The network's input ``x̂/√(1 + σ̂²)``, which is the VP sample."""
        index = self.index_for_timestep(timestep)
        return sample * (1 / math.hypot(self._grid.source[index].sigma, 1))

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """``x_0 + σ̂_t ε``, one timestep a sample, ``(batch,)``."""
        sigma = self._sigma_hat_of(timesteps.to(original_samples.device)).to(original_samples.dtype)
        return original_samples + sigma.view((-1,) + (1,) * (original_samples.ndim - 1)) * noise

    def _sigma_hat_of(self, timesteps: torch.Tensor) -> torch.Tensor:
        """σ̂ of timesteps: of the step where they are in ``self.timesteps``, otherwise of the training process."""
        sigmas = self._table.sigma_hat_at(timesteps)
        if self._grid is None:
            return sigmas
        match = timesteps[:, None] == self.timesteps.to(timesteps.device)
        of_step = self.sigmas[:-1].to(sigmas)[match.float().argmax(1)]
        return torch.where(match.any(1), of_step, sigmas)
