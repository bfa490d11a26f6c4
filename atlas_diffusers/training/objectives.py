"""The loss of one micro-batch: what the network is shown, and what it should have said."""

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.utils.torch_utils import randn_tensor

from ..conditioning import tokenize
from ..config import TrainingConfig
from ..pipelines.latents import encode_latents
from .bridge_matching import brownian_bridge
from .couplings import sinkhorn_pairs
from .losses import denoising_loss, edm_weights, min_snr_weights, offset_noise, p2_weights, stratified_timesteps
from .networks import Networks


class Objective:
    """
    A loss of ``(batch, generator)``; ``loss`` of a subclass has the formula.

    What belongs to a picture (its noise, its latents, whether its caption is dropped) is drawn from a generator of the
    picture's place in the run; timesteps, pairs and the resolution from ``generator``, the same in every process.

    Args:
        config: the recipe.
        accelerator: gives device and processes.
        networks: autoencoder, tokenizer and scheduler.
        wrapped: `unet` and `text_encoder` as the accelerator prepared them.
        embeddings: cached states of captions by text, see :class:`~.caching.CaptionCache`.
    """

    def __init__(self, config: TrainingConfig, accelerator: Accelerator, networks: Networks, wrapped: dict, embeddings=None):
        self.config, self.accelerator, self.wrapped, self.embeddings = config, accelerator, wrapped, embeddings
        self.vae, self.tokenizer, self.scheduler = networks.vae, networks.tokenizer, networks.scheduler
        self.no_class = networks.unet.config.get("num_class_embeds")

    def __call__(self, batch: dict, generator: torch.Generator) -> torch.Tensor:
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
            moments = batch["moments"].to(device, memory_format=torch.channels_last, non_blocking=True)
            return DiagonalGaussianDistribution(moments).sample(own) * self.vae.config.scaling_factor
        pixels = batch[name].to(device, memory_format=torch.channels_last, non_blocking=True)
        if self.vae is None:
            return pixels
        with torch.no_grad():
            return encode_latents(self.vae, pixels, own)

    @staticmethod
    def _halved(data: torch.Tensor, times: int) -> torch.Tensor:
        return F.avg_pool2d(data, 2**times) if times else data

    def _timesteps(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """(count,) on the CPU: this process's share of the step's."""
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        everywhere = stratified_timesteps(
            count * world, self.scheduler.config.num_train_timesteps, generator, self.config.timestep_shift
        )
        return everywhere.chunk(world)[rank]

    def _predict(
        self, sample: torch.Tensor, timesteps: torch.Tensor, batch: dict, own: list[torch.Generator]
    ) -> torch.Tensor:
        """The network's output, some captions and labels dropped for guidance."""
        device = self.accelerator.device
        kept = torch.cat([torch.rand(1, generator=each) for each in own]) >= self.config.caption_dropout
        labels = context = None
        if "label" in batch:
            if (largest := int(batch["label"].max())) >= self.no_class:
                raise ValueError(f"label {largest} is not among 0 to {self.no_class - 1} of num_class_embeds={self.no_class}")
            labels = torch.where(kept, batch["label"], self.no_class).to(device, non_blocking=True)
        if self.tokenizer is not None:
            texts = [text if keep else "" for text, keep in zip(batch["text"], kept.tolist())]
            context = self._context(texts)
        return self.wrapped["unet"](sample, timesteps.to(device, non_blocking=True), context, class_labels=labels).sample

    def _context(self, texts: list[str]) -> torch.Tensor:
        device = self.accelerator.device
        if self.embeddings is not None:
            return self.embeddings(texts).to(device, non_blocking=True)
        return self.wrapped["text_encoder"](tokenize(self.tokenizer, texts).to(device)).last_hidden_state


class Denoising(Objective):
    """``E w(t) ‖m − m_θ(α x_0 + σ ε, t)‖²``, m the target of the scheduler's prediction type."""

    def loss(self, data, batch, own, generator, halvings):
        c = self.config
        noise = randn_tensor(data.shape, own, data.device, data.dtype)
        if c.offset_noise:
            noise = offset_noise(noise, c.offset_noise, own)
        if c.coupling == "sinkhorn":
            noise = noise[sinkhorn_pairs(noise, data, c.coupling_epsilon, generator, relative=True)]
        timesteps = self._timesteps(len(data), generator)
        # levels stay on the CPU: the weights are read there
        alpha, sigma = self.scheduler.levels_at(timesteps, like=torch.empty(0, 1, 1, 1))
        x = alpha.to(data, non_blocking=True) * data + sigma.to(data, non_blocking=True) * noise
        output = self._predict(x, timesteps, batch, own)
        prediction_type, levels = self.scheduler.config.prediction_type, (alpha.flatten(), sigma.flatten())
        return denoising_loss(output, data, noise, *levels, prediction_type, self._weights(prediction_type, *levels))

    def _weights(self, prediction_type: str, alpha: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor | None:
        c = self.config
        choices = ((min_snr_weights, c.min_snr_gamma), (p2_weights, c.p2_gamma), (edm_weights, c.edm_sigma_data))
        return next((weights(prediction_type, alpha, sigma, value) for weights, value in choices if value is not None), None)


class BridgeMatching(Objective):
    r"""
    ``E ‖v_θ(x_s, s) − dx_s/ds‖²`` on Brownian bridges from the data (s = 0) to the source (s = 1), the direction and the time
    ``s T`` of Diffusers' flow-matching schedulers.
    """

    def loss(self, data, batch, own, generator, halvings):
        c, steps = self.config, self.scheduler.config.num_train_timesteps
        source = self._halved(self._encoded(batch, "source", own), halvings)
        if c.coupling == "sinkhorn":
            source = source[sinkhorn_pairs(source, data, c.coupling_epsilon, generator, relative=True)]
        # half a step from either end, where the velocity of a Brownian bridge is infinite
        s = (self._timesteps(len(data), generator) + 0.5) / steps
        noise = randn_tensor(data.shape, own, data.device, data.dtype)
        x, velocity = brownian_bridge(source, data, 1 - s.to(data), c.bridge_sigma, noise)
        return (self._predict(x, s * steps, batch, own) + velocity).square().mean()


OBJECTIVES = {"denoising": Denoising, "bridge_matching": BridgeMatching}
