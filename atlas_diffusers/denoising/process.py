"""The noise process that a scheduler samples, as a denoiser must know it."""

import copy
import math
from typing import Any

import torch

from ..schedulers import BaseScheduler
from ..schedules import NoiseLevel, data_coefficients, output_coefficients
from ..schedules.predictions import check_prediction_type


def noised(scheduler: Any, data: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """``α x_0 + σ ε`` of a scheduler, one timestep a sample; Diffusers' flow-matching schedulers call it ``scale_noise``."""
    if hasattr(scheduler, "add_noise"):
        return scheduler.add_noise(data, noise, timesteps)
    if scheduler.config.get("invert_sigmas"):  # whose sigmas count the data
        data, noise = noise, data
    return scheduler.scale_noise(data, timesteps, noise)


def noise_level(scheduler: Any, timestep: torch.Tensor) -> NoiseLevel:
    """
    α and σ of a scheduler's sample ``x = α x_0 + σ ε`` at one of its timesteps, in its own coordinates.

    Read from the noise that it adds, the one thing that all schedulers agree on.
    """
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64, device=timestep.device)
    zero, at = torch.zeros_like(one), timestep.reshape(1)
    values = []
    for data, noise in ((one, zero), (zero, one)):
        reader: Any = copy.copy(scheduler)
        if not isinstance(scheduler, BaseScheduler):
            # Diffusers' schedulers answer by their step, not by the timestep, once they have begun
            vars(reader).update(_step_index=None, _begin_index=None)
        values.append(noised(reader, data, noise, at).item())
    return NoiseLevel(*values)


def is_flow(scheduler: Any) -> bool:
    """Whether the levels of a scheduler whose steps are set are those of a flow, ``α + σ = 1``."""
    return math.isclose(sum(noise_level(scheduler, scheduler.timesteps[len(scheduler.timesteps) // 2])), 1, abs_tol=1e-4)


class SchedulerProcess:
    """
    The noise process of a scheduler, ours or Diffusers': levels, the network's view of a sample, the meaning of predictions.

    Args:
        scheduler: one whose steps are set.
    """

    def __init__(self, scheduler: Any):
        self.scheduler = scheduler

    @property
    def prediction_type(self) -> str:
        """What the network predicts; ``ValueError`` for what is none of ours."""
        flow = not hasattr(self.scheduler, "add_noise")
        name = self.scheduler.config.get("prediction_type", "flow_prediction" if flow else "epsilon")
        check_prediction_type(name)
        return name

    @property
    def output_sign(self) -> float:
        """-1 for a network of an inverted flow (Mochi), which predicts ``x_0 − ε``."""
        return -1.0 if self.scheduler.config.get("invert_sigmas") else 1.0

    @property
    def predicts_variance(self) -> bool:
        """Whether the network's output has the variance of a step as further channels."""
        return self.scheduler.config.get("variance_type") in ("learned", "learned_range")

    def level(self, timestep: torch.Tensor) -> NoiseLevel:
        """α and σ at a timestep."""
        return noise_level(self.scheduler, timestep)

    def network_input(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """What the network is given for the scheduler's sample ``x``; the same where the scheduler has no scaling."""
        scale = getattr(self.scheduler, "scale_model_input", None)
        return x if scale is None else scale(x, timestep)

    def data(self, prediction: torch.Tensor, x: torch.Tensor, level: NoiseLevel) -> torch.Tensor:
        """The data prediction x_0 that a network's prediction for ``x`` stands for."""
        on_sample, on_prediction = data_coefficients(self.prediction_type, *level)
        return on_sample * x + self.output_sign * on_prediction * prediction

    def prediction(self, data: torch.Tensor, x: torch.Tensor, level: NoiseLevel) -> torch.Tensor:
        """The network's prediction that stands for the data prediction ``data`` for ``x``."""
        on_noise, on_data = output_coefficients(self.prediction_type, *level)
        return self.output_sign * (on_noise * ((x - level.alpha * data) / level.sigma) + on_data * data)
