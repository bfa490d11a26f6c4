"""The loss of one micro-batch: what the network is shown, and what it should have said."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.utils.torch_utils import randn_tensor

import atlas_diffusers

from ..config import TrainingConfig
from ..pipelines.latents import encode_latents, normalise_latents
from ..schedules import Flow
from .couplings import sinkhorn_pairs
from .family import Components
from .losses import denoising_loss, flow_times, loss_weighting, offset_noise, stratified_timesteps
from .sections import FLOW_SCHEDULERS, scheduler_from_dict
from .semidiscrete import coupled_noise


class Objective:
    """
    A loss of ``(batch, generator)``; ``loss`` of a subclass has the formula, ``build_scheduler`` the noise process of its
    pipeline, and ``pipeline`` the name of that pipeline's class.

    What belongs to a picture (its noise, its latents, whether its caption is dropped) is drawn from a generator of the
    picture's place in the run; timesteps, pairs and the resolution from ``generator``, the same in every process.

    Args:
        config: the recipe.
        accelerator: gives device and processes.
        components: autoencoder, tokenizer and scheduler.
        wrapped: the networks that may train, as the accelerator prepared them.
        embeddings: what the network is told of captions, instead of their encoder; see :class:`~.caching.CaptionCache`.
    """

    pipeline = "AtlasPipeline"
    step = 0
    """Of the run, set before its loss is asked for."""

    def __init__(
        self, config: TrainingConfig, accelerator: Accelerator, components: Components, wrapped: dict, embeddings: Any = None
    ):
        self.config, self.accelerator, self.wrapped = config, accelerator, wrapped
        self.family = components.family(components, wrapped, config)
        self.embeddings = embeddings or self.family.encode
        self.vae, self.tokenizer, self.scheduler = components.vae, components.tokenizer, components.scheduler
        self.no_class = components.unet.config.get("num_class_embeds")
        self.class_weight = 0.0 if config.class_images is None else config.class_images.weight

    @staticmethod
    def build_scheduler(config: TrainingConfig, start: dict):
        """The scheduler of the recipe, or made of the configuration ``start`` of the pipeline that training starts from."""
        if config.scheduler is None:
            scheduler = atlas_diffusers.AtlasDDIMScheduler.from_config({"clip_sample": False, **start})
        else:
            scheduler = scheduler_from_dict(config.scheduler)
        if isinstance(scheduler.process, Flow):
            raise ValueError("the scheduler samples a flow; objective: flow_matching trains for it")
        return scheduler

    def __call__(self, batch: dict, generator: torch.Generator) -> torch.Tensor:
        loss = self._of(batch, generator)
        if "class_picture" not in batch:
            return loss
        return loss + self.class_weight * self._of(batch["class_picture"], generator)

    def _of(self, batch: dict, generator: torch.Generator) -> torch.Tensor:
        own = [torch.Generator().manual_seed(draw) for draw in batch["draw"].tolist()]
        levels = self.config.num_resolutions
        halvings = int(torch.randint(levels, (1,), generator=generator)) if levels > 1 else 0
        data = self._halved(self._encoded(batch, "pixels", own), halvings)
        return self.loss(data, batch, own, generator, halvings)

    def loss(
        self, data: torch.Tensor, batch: dict, own: list[torch.Generator], generator: torch.Generator, halvings: int
    ) -> torch.Tensor:
        """Of clean ``data`` (batch, channels, height, width)."""
        raise NotImplementedError

    def _encoded(self, batch: dict, name: str, own: list[torch.Generator]) -> torch.Tensor:
        """Pixels, or latents where there is an autoencoder, on the device."""
        device = self.accelerator.device
        if "moments" in batch:
            moments = batch["moments"].to(device, non_blocking=True)
            latents = DiagonalGaussianDistribution(moments).sample(own)  # pyright: ignore[reportArgumentType]: one a picture
            return normalise_latents(self.vae, latents)
        if "latents" in batch:
            return normalise_latents(self.vae, batch["latents"].to(device, non_blocking=True))
        pixels = batch[name].to(device, non_blocking=True)
        if self.vae is None:
            return pixels
        with torch.no_grad():
            return encode_latents(self.vae, pixels, own)

    @staticmethod
    def _halved(data: torch.Tensor, times: int) -> torch.Tensor:
        return F.avg_pool2d(data, 2**times) if times else data

    def _timesteps(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """(count,) on the CPU: this process's share of the step's."""
        world, steps = self.accelerator.num_processes, self.scheduler.config.num_train_timesteps
        return self._share(stratified_timesteps(count * world, steps, generator, self.config.timestep_shift))

    def _share(self, everywhere: torch.Tensor) -> torch.Tensor:
        return everywhere.chunk(self.accelerator.num_processes)[self.accelerator.process_index]

    def prepare(self, dataset: Any) -> None:
        """Compute what takes all the data, before the first step; here nothing."""

    @property
    def begins_pass(self) -> bool:
        """Whether the weights are to be replaced by their averages before this step."""
        return False

    def _paired(self, source: torch.Tensor, data: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """What the data are paired with, of the micro-batches of all processes."""
        several = self.accelerator.num_processes > 1
        everywhere = cast(torch.Tensor, self.accelerator.gather(source)) if several else source
        pairs = sinkhorn_pairs(everywhere, data, self.config.coupling_epsilon, generator, relative=True, split=several)
        return everywhere[pairs]

    def _predict(self, sample: torch.Tensor, timesteps: torch.Tensor, batch: dict, own: list[torch.Generator]) -> torch.Tensor:
        """The network's output, some captions and labels dropped for guidance."""
        return self._output(self.family.network, sample, timesteps, self._conditions(batch, own))

    def _output(self, network: str, sample: torch.Tensor, timesteps: torch.Tensor, conditions: dict[str, Any]) -> torch.Tensor:
        timesteps = timesteps.to(self.accelerator.device, non_blocking=True)
        return self.family.predict(self.wrapped[network], sample, timesteps, conditions)

    def _conditions(self, batch: dict, own: list[torch.Generator]) -> dict[str, torch.Tensor]:
        """What the network is told of captions, labels and sizes; some captions and labels are dropped for guidance."""
        device = self.accelerator.device
        kept = torch.cat([torch.rand(1, generator=each) for each in own]) >= self.config.caption_dropout
        conditions = {}
        if "label" in batch:
            if (largest := int(batch["label"].max())) >= self.no_class:
                raise ValueError(f"label {largest} is not among 0 to {self.no_class - 1} of num_class_embeds={self.no_class}")
            conditions["class_labels"] = torch.where(kept, batch["label"], self.no_class)
        if self.family.tells_sizes:
            conditions["time_ids"] = batch["time_ids"]
        if self.tokenizer is not None:
            conditions |= self.embeddings([text if keep else "" for text, keep in zip(batch["text"], kept.tolist())])
        return {name: value.to(device, non_blocking=True) for name, value in conditions.items()}


class Denoising(Objective):
    """``E w(t) ‖m − m_θ(α x_0 + σ ε, t)‖²``, m the target of the scheduler's prediction type."""

    def __init__(self, config: TrainingConfig, *arguments: Any, **more: Any):
        super().__init__(config, *arguments, **more)
        self.weights = None if config.loss_weighting is None else loss_weighting(**config.loss_weighting)
        self.prediction_type = self.scheduler.config.get("prediction_type")

    def loss(
        self, data: torch.Tensor, batch: dict, own: list[torch.Generator], generator: torch.Generator, halvings: int
    ) -> torch.Tensor:
        c = self.config
        if c.coupling == "semidiscrete":
            noise = coupled_noise(batch["draw"].tolist(), data.shape[1:]).to(data)
        else:
            noise = randn_tensor(data.shape, own, data.device, data.dtype)
        if c.offset_noise:
            noise = offset_noise(noise, c.offset_noise, own)
        if c.coupling == "sinkhorn":
            noise = self._paired(noise, data, generator)
        timesteps, alphas, sigmas = self._levels(len(data), generator)
        alpha, sigma = (level.reshape(-1, 1, 1, 1).to(data, non_blocking=True) for level in (alphas, sigmas))
        output = self._predict(alpha * data + sigma * noise, timesteps, batch, own)
        weights = None if self.weights is None else self.weights(self.prediction_type, alphas, sigmas)
        return denoising_loss(output, data, noise, alphas, sigmas, self.prediction_type, weights)

    def _levels(self, count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Timesteps, α and σ, each (count,), on the CPU, where weights are read."""
        timesteps = self._timesteps(count, generator)
        return timesteps, *self.scheduler.levels_at(timesteps, like=torch.empty(0))


class FlowMatching(Denoising):
    """``E w(s) ‖ε − x_0 − v_θ((1 − s) x_0 + s ε, s T)‖²`` (Lipman et al. 2022, arXiv 2210.02747)."""

    def __init__(self, config: TrainingConfig, *arguments: Any, **more: Any):
        super().__init__(config, *arguments, **more)
        self.prediction_type = "flow_prediction"

    @staticmethod
    def build_scheduler(config: TrainingConfig, start: dict):
        """The recipe's, or Euler's method with the shift that the times of training have."""
        given = config.scheduler or {"use_flow_sigmas": True, "shift": config.timestep_shift}
        scheduler = scheduler_from_dict(given, default="AtlasEulerScheduler", foreign=FLOW_SCHEDULERS)
        if not isinstance(getattr(scheduler, "process", None), Flow | None):
            raise ValueError("objective: flow_matching needs the scheduler of a flow: give scheduler.use_flow_sigmas: true")
        return scheduler

    def _levels(self, count: int, generator: torch.Generator):
        c, steps = self.config, self.scheduler.config.num_train_timesteps
        spread = (c.logit_mean, c.logit_std) if c.time_distribution == "logit_normal" else None
        times = self._share(flow_times(count * self.accelerator.num_processes, generator, c.timestep_shift, spread))
        # half a step from either end, where weights are infinite
        times = times.clamp(0.5 / steps, 1 - 0.5 / steps)
        return times * steps, 1 - times, times
