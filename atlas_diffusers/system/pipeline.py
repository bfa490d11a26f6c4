"""Noise schedulers, samplers and pipelines by configuration."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import nn
from tqdm.auto import tqdm

import atlas_diffusers

from .._registration import NOISE_SCHEDULERS, SAMPLERS
from ..config import NoiseSchedulerConfig, SamplingMethod
from ..denoising import ClassifierFreeGuidance, Denoiser, SamplingState, SchedulerProcess, sample
from ..schedulers import BaseNoiseScheduler
from ..schedulers import BaseScheduler as BaseSampler
from ..schedules import output_coefficients


def _options(cls: type) -> set[str]:
    return set(inspect.signature(cls.__init__).parameters) - {"self"}


class NoiseSchedulerFactory:
    """Noise schedulers by configuration."""

    @staticmethod
    def create_scheduler(config: NoiseSchedulerConfig) -> BaseNoiseScheduler:
        """The noise scheduler of ``config.beta_schedule``; its ``step`` is the DDPM posterior."""
        cls = getattr(atlas_diffusers, NOISE_SCHEDULERS[config.beta_schedule.value])
        return cls(**config.scheduler_options(_options(cls)))


class SamplerFactory:
    """Samplers by name."""

    @staticmethod
    def create_sampler(method: SamplingMethod, scheduler: BaseNoiseScheduler, **options: Any) -> BaseSampler:
        """
        A sampler of the noise process of ``scheduler``.

        Args:
            method: which.
            scheduler: gives the betas and every option that the sampler shares.
            options: of the sampler, instead of the scheduler's.

        Raises:
            ValueError: for an option that the sampler does not have.
        """
        cls = getattr(atlas_diffusers, SAMPLERS[SamplingMethod(method).value])
        known = _options(cls)
        if unknown := sorted(set(options) - known):
            raise ValueError(f"{cls.__name__} has no options {unknown}; allowed are {sorted(known)}")
        shared = {name: value for name, value in scheduler.config.items() if name in known}
        return cls(**{**shared, **options})


class DiffusionPipeline:
    """A noise scheduler and a sampler that draw from any network."""

    def __init__(self, config: NoiseSchedulerConfig, sampling_method: SamplingMethod | str = "ddpm"):
        self.config, self.sampling_method = config, SamplingMethod(sampling_method)
        self.scheduler = NoiseSchedulerFactory.create_scheduler(config)
        self.sampler = SamplerFactory.create_sampler(self.sampling_method, self.scheduler)

    @torch.no_grad()
    def sample(
        self,
        model: nn.Module | Callable,
        shape: tuple[int, ...],
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        classifier_free_guidance: bool = True,
        callback: Callable[[int, torch.Tensor, torch.Tensor], None] | None = None,
        *,
        encoder_hidden_states: torch.Tensor | None = None,
        negative_encoder_hidden_states: torch.Tensor | None = None,
        early_stop: Callable[[int, torch.Tensor, torch.Tensor], bool] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        device: str | torch.device | None = None,
        progress: bool = False,
        **model_kwargs: object,
    ) -> torch.Tensor:
        """
        Draw samples.

        Args:
            model: called as ``model(x, t, **kwargs)``; gives the prediction as a tensor, a tuple, or an output with ``sample``,
                as Diffusers' networks do.
            shape: of the samples, batch first.
            num_inference_steps: steps.
            guidance_scale, classifier_free_guidance: guidance with ``encoder_hidden_states`` (arXiv 2207.12598), both halves
                in one call; off at scale 1 and without states.
            callback: called after each step with its index, the timestep and the sample.
            encoder_hidden_states: passed to the model, (batch or 1, tokens, width).
            negative_encoder_hidden_states: of the unconditional half; zeros by default.
            early_stop: called like ``callback``; where it is true the sample of that step is returned.
            generator: draws all noise; a list has one a sample.
            latents: start noise of unit variance instead, of ``shape``.
            device: by default the model's.
            progress: show a bar.
            model_kwargs: further arguments of the model, the same at every step.

        Raises:
            ValueError: for a shape without batch, and a prediction of another shape than the sample.
        """
        if len(shape) < 2 or min(shape) < 1:
            raise ValueError(f"shape={tuple(shape)}; expected (batch, ...) of positive numbers")
        # a sampler of its own for each call
        sampler = type(self.sampler).from_config(self.sampler.config)
        device = torch.device(device or device_of(model))
        sampler.set_timesteps(num_inference_steps, device=device)
        x = randn_tensor(tuple(shape), generator, device, torch.float32) if latents is None else latents.to(device)
        x = x * sampler.init_noise_sigma
        conditions, unconditional = {}, None
        if encoder_hidden_states is not None:
            negative = negative_encoder_hidden_states
            states = encoder_hidden_states.to(device).expand(len(x), *encoder_hidden_states.shape[1:])
            conditions = {"encoder_hidden_states": states}
            without = torch.zeros_like(states) if negative is None else negative.to(device).expand_as(states)
            unconditional = {"encoder_hidden_states": without}
        denoiser = Denoiser(
            model, SchedulerProcess(sampler), conditions, unconditional, model_kwargs,
            ClassifierFreeGuidance(guidance_scale if classifier_free_guidance else 1.0),
        )  # fmt: skip

        def watch(state: SamplingState) -> None:
            seen = state.index, state.timestep, state.sample
            if callback is not None:
                callback(*seen)
            state.stopped = early_stop is not None and early_stop(*seen)

        return sample(
            denoiser, sampler, x, callback=watch, progress=lambda steps: tqdm(total=steps, disable=not progress),
            generator=generator, use_clipped_model_output=self.config.use_clipped_model_output,
        )  # fmt: skip

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """``α_t x_0 + σ_t ε``, one timestep a sample."""
        return self.scheduler.add_noise(original_samples, noise, timesteps)

    def get_velocity(self, sample: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """``α_t ε − σ_t x_0`` (arXiv 2202.00512), one timestep a sample."""
        return self.scheduler.get_velocity(sample, noise, timesteps)


def device_of(model: Any) -> torch.device:
    """Where a model's weights are; the CPU for one without any."""
    weights = model.parameters() if isinstance(model, nn.Module) else ()
    return next((p.device for p in weights), torch.device("cpu"))


class GaussianModel(nn.Module):
    """The exact prediction for data N(mean, std²) under a pipeline's noise process: a network that needs no training."""

    def __init__(self, pipeline: DiffusionPipeline, mean: float = 0.0, std: float = 0.5):
        super().__init__()
        self.scheduler, self.mean, self.std = pipeline.scheduler, mean, std

    def forward(self, x: torch.Tensor, t: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """``x`` (batch, ...) at timestep t, a number or (batch,)."""
        alpha, sigma = self.scheduler.levels_at(t.reshape(-1), like=x)
        data = self.mean + alpha * self.std**2 / (alpha**2 * self.std**2 + sigma**2) * (x - alpha * self.mean)
        noise = (x - alpha * data) / sigma
        on_noise, on_data = output_coefficients(self.scheduler.config.prediction_type, alpha, sigma)
        return on_noise * noise + on_data * data
