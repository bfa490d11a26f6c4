"""The families of pipelines that training starts from."""

import inspect
from typing import Any

import diffusers
import torch

import atlas_diffusers

from ..conditioning import tokenize
from ..config import TrainingConfig
from ..pipelines.loading import class_of
from .family import Components, Family
from .sections import pixels_of_latent


class Own(Family):
    """Pipelines of this package, and what they load: one UNet, and at most one CLIP text encoder."""

    def __init__(self, components: Components, wrapped: dict[str, Any], config: TrainingConfig):
        self.components, self.wrapped, self.config = components, wrapped, config

    @classmethod
    def load(cls, config: TrainingConfig) -> Components:
        """The components of ``init_from``, in float32."""
        if config.lora is not None and config.lora.quantize is not None:
            raise ValueError("lora.quantize is for pipelines of Diffusers")
        start = atlas_diffusers.AtlasPipeline.from_pretrained(str(config.init_from), dtype=torch.float32)
        return Components(start.unet, start.text_encoder, start.tokenizer, start.vae, start.scheduler, cls)

    @classmethod
    def networks(cls, components: Components) -> dict[str, torch.nn.Module]:
        """``unet`` and, where they are, ``backward_unet`` and ``text_encoder``."""
        modules = {name: getattr(components, name) for name in ("unet", "backward_unet", "text_encoder")}
        return {name: module for name, module in modules.items() if module is not None}

    @classmethod
    def side_multiple(cls, components: Components) -> int:
        """What must divide the sides of pictures, at one resolution."""
        return pixels_of_latent(components.vae) * getattr(components.unet, "size_multiple", 1)

    def encode(self, texts: list[str]) -> dict[str, torch.Tensor]:
        """The last hidden states of the text encoder."""
        ids = tokenize(self.components.tokenizer, texts).to(self.device)
        return {"encoder_hidden_states": self.wrapped["text_encoder"](ids).last_hidden_state}

    def predict(self, network: Any, sample: torch.Tensor, timesteps: torch.Tensor, conditions: dict[str, Any]) -> torch.Tensor:
        """Also without captions."""
        states, labels = conditions.get("encoder_hidden_states"), conditions.get("class_labels")
        return network(sample, timesteps, states, class_labels=labels).sample


class StableDiffusionXL(Family):
    """Two CLIP towers; pooled states, and sizes and crops of pictures, are added to the time (arXiv 2307.01952)."""

    conditions = {"encoder_hidden_states": (0, 1), "text_embeds": (2, 3)}
    tells_sizes = True

    def predict(self, network: Any, sample: torch.Tensor, timesteps: torch.Tensor, conditions: dict[str, Any]) -> torch.Tensor:
        """With ``time_ids`` (batch, 6)."""
        states = conditions["encoder_hidden_states"]
        added = {"text_embeds": conditions["text_embeds"], "time_ids": conditions["time_ids"].to(states)}
        return network(sample, timesteps, states, added_cond_kwargs=added).sample


class StableDiffusion3(Family):
    """A transformer over patches with two CLIP towers and T5, of a flow (arXiv 2403.03206)."""

    network, objective = "transformer", "flow_matching"
    conditions = {"encoder_hidden_states": (0, 1), "pooled_projections": (2, 3)}
    asked = {"prompt_2": None, "prompt_3": None}

    def predict(self, network: Any, sample: torch.Tensor, timesteps: torch.Tensor, conditions: dict[str, Any]) -> torch.Tensor:
        """The velocity."""
        return network(sample, timestep=timesteps, **conditions).sample


class Flux(Family):
    """A transformer over packed 2x2 patches with one CLIP tower and T5, of a flow; guidance may be an input."""

    network, objective = "transformer", "flow_matching"
    conditions = {"encoder_hidden_states": (0, 0), "pooled_projections": (1, 1)}
    asked = {"prompt_2": None}
    is_guided = False

    @classmethod
    def side_multiple(cls, components: Components) -> int:
        """Two latents are a patch."""
        return 2 * components.pipeline.vae_scale_factor

    def predict(self, network: Any, sample: torch.Tensor, timesteps: torch.Tensor, conditions: dict[str, Any]) -> torch.Tensor:
        """The velocity; a network that takes guidance is told the recipe's ``guidance_scale``."""
        pipeline, (batch, channels, height, width) = diffusers.FluxPipeline, sample.shape
        states, guidance = conditions["encoder_hidden_states"], None
        if self.components.unet.config.guidance_embeds:
            guidance = torch.full((batch,), self.config.guidance_scale, device=sample.device)
        output = network(
            pipeline._pack_latents(sample, batch, channels, height, width),
            timestep=timesteps / 1000,
            guidance=guidance,
            img_ids=pipeline._prepare_latent_image_ids(batch, height // 2, width // 2, sample.device, states.dtype),
            txt_ids=torch.zeros(states.shape[1], 3).to(states),
            **conditions,
        ).sample
        return pipeline._unpack_latents(output, height, width, vae_scale_factor=1)


class PixArt(Family):
    """A transformer over patches with T5 (arXiv 2310.00426); of its output the half that is the prediction."""

    network = "transformer"
    conditions = {"encoder_hidden_states": (0, 2), "encoder_attention_mask": (1, 3)}

    def predict(self, network: Any, sample: torch.Tensor, timesteps: torch.Tensor, conditions: dict[str, Any]) -> torch.Tensor:
        """Networks of 1,024 pixels are told the size of pictures."""
        batch, _, height, width = sample.shape
        added = {"resolution": None, "aspect_ratio": None}
        if self.components.unet.config.sample_size == 128:
            factor, states = self.components.pipeline.vae_scale_factor, conditions["encoder_hidden_states"]
            sizes = {"resolution": [height * factor, width * factor], "aspect_ratio": [height / width]}
            added = {name: torch.tensor(value).repeat(batch, 1).to(states) for name, value in sizes.items()}
        output = network(sample, timestep=timesteps, added_cond_kwargs=added, **conditions).sample
        return output[:, : sample.shape[1]]


class Sana(Family):
    """A linear transformer with Gemma on latents of 32 pixels, of a flow (arXiv 2410.10629)."""

    network, objective = "transformer", "flow_matching"
    conditions = {"encoder_hidden_states": (0, 2), "encoder_attention_mask": (1, 3)}
    # what a call puts before every caption
    asked = {
        "complex_human_instruction": inspect.signature(diffusers.SanaPipeline.__call__)
        .parameters["complex_human_instruction"]
        .default
    }

    def predict(self, network: Any, sample: torch.Tensor, timesteps: torch.Tensor, conditions: dict[str, Any]) -> torch.Tensor:
        """The velocity."""
        scaled = timesteps * self.components.unet.config.timestep_scale
        return network(sample, timestep=scaled, **conditions).sample


FAMILIES: dict[str, type[Family]] = {
    "StableDiffusionPipeline": Family,
    "StableDiffusionXLPipeline": StableDiffusionXL,
    "StableDiffusion3Pipeline": StableDiffusion3,
    "FluxPipeline": Flux,
    "PixArtAlphaPipeline": PixArt,
    "PixArtSigmaPipeline": PixArt,
    "SanaPipeline": Sana,
}


def family_of(config: TrainingConfig) -> type[Family]:
    """
    How ``init_from`` is trained; bridges and several resolutions are those of this package's pipelines.

    Raises:
        ValueError: for a pipeline around a transformer that is none of ``FAMILIES``.
    """
    if config.init_from is None or config.objective == "bridge_matching" or config.num_resolutions > 1:
        return Own
    name = class_of(config.init_from) or ""
    cls = getattr(diffusers, name, None)
    if name not in FAMILIES and cls is not None and "transformer" in inspect.signature(cls).parameters:
        known = ", ".join(FAMILIES)
        raise ValueError(f"init_from={config.init_from!r} is a {name}; trained are {known} and pipelines of a UNet")
    return FAMILIES.get(name, Own)
