"""What our pipelines share: components, state of a running call, prompts, references, latents."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from diffusers.loaders.lora_pipeline import StableDiffusionLoraLoaderMixin
from diffusers.loaders.textual_inversion import TextualInversionLoaderMixin
from diffusers.models import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor
from transformers import CLIPTextModel, CLIPTokenizer

from ..conditioning import token_lists, tokenize_for
from ..conditioning.clip import TOKENIZING
from ..denoising import BridgeReport
from ..models import AtlasAutoencoder, AtlasTransformer2DModel, AtlasUNet2DModel
from ..models.lora_scale import LoraScale
from .call_state import PerThread, state_of
from .latents import decode_latents, encode_latents
from .loading import check_components, named_damage, resolve_pipeline
from .prompts import reads_text
from .references import FILE, References, read_references

logger = logging.get_logger(__name__)
Generators = torch.Generator | list[torch.Generator] | None


@dataclass
class AtlasPipelineOutput(ImagePipelineOutput):
    """``images``, and ``bridge``: the :class:`BridgeReport` of a call with references."""

    bridge: BridgeReport | None = None


class AtlasPipelineBase(DiffusionPipeline, TextualInversionLoaderMixin, StableDiffusionLoraLoaderMixin):
    """
    A network, a scheduler and what surrounds them; a subclass adds the call.

    Args:
        unet: network called as ``unet(sample, t, encoder_hidden_states=..., class_labels=...)``.
        scheduler: any Diffusers-compatible scheduler.
        vae: autoencoder of the latent space; ``None`` for pixels in [-1, 1].
        text_encoder, tokenizer: CLIP text model and tokenizer; ``None`` for a network without text.
        default_num_inference_steps, default_guidance_scale: used where a call does not say; saved with the pipeline.
    """

    config: Any  # of the constructor's arguments, by Diffusers
    unet: Any
    vae: Any
    text_encoder: Any
    tokenizer: Any
    model_cpu_offload_seq = "text_encoder->unet->vae"
    _optional_components = ["vae", "text_encoder", "tokenizer"]
    _callback_tensor_inputs = ["latents", "prompt_embeds"]

    _guidance_scale = PerThread(1.0)
    _is_guided = PerThread(False)
    _interrupt = PerThread(False)
    _num_timesteps = PerThread(0)

    references: References | None = None

    def __init__(
        self,
        unet: AtlasUNet2DModel | AtlasTransformer2DModel | UNet2DConditionModel,
        scheduler: SchedulerMixin,
        vae: AutoencoderKL | AutoencoderTiny | AtlasAutoencoder | None = None,
        text_encoder: CLIPTextModel | None = None,
        tokenizer: CLIPTokenizer | None = None,
        default_num_inference_steps: int = 50,
        default_guidance_scale: float = 7.5,
    ):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer)
        self.register_to_config(
            default_num_inference_steps=default_num_inference_steps, default_guidance_scale=default_guidance_scale
        )
        vae_config: Any = None if vae is None else vae.config
        self.vae_scale_factor = 1 if vae_config is None else 2 ** (len(vae_config.block_out_channels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    @property
    def defaults(self) -> Any:
        """``default_num_inference_steps`` and ``default_guidance_scale``, as they are saved."""
        return self.config

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: object):
        """
        Load a pipeline folder, a hub id, or an embedded pipeline by name (``"atlas-emoji"``).

        Raises:
            OSError: for an unknown name, a missing component, malformed values or damaged weights.
        """
        path = resolve_pipeline(str(pretrained_model_name_or_path), cls)
        with named_damage(f"{path} cannot be loaded"), torch.random.fork_rng():
            pipeline = super().from_pretrained(path, **kwargs)
        check_components({name: pipeline.components[name] for name in pipeline.components.keys() - kwargs.keys()}, path)
        if (Path(path) / FILE).is_file():
            pipeline.references = References.load(Path(path) / FILE)
        return pipeline

    def load_ip_adapter(self, *args: object, **kwargs: object) -> None:
        """Refused, as ``ValueError``: adapters that read pictures are made for networks of Diffusers."""
        raise ValueError(
            f"{type(self).__name__} takes no IP-adapter: its call has no picture to attend to; load the folder as Diffusers' "
            "StableDiffusionPipeline where its network is a UNet2DConditionModel"
        )

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As in Diffusers; references go into ``references.safetensors``."""
        super().save_pretrained(save_directory, *args, **kwargs)
        if self.references is not None:
            self.references.save(Path(save_directory) / FILE)

    def set_references(self, references: object, weights: torch.Tensor | None = None) -> None:
        """
        Keep references with the pipeline: used by calls with ``bridge=``, saved by ``save_pretrained``.

        Args:
            references: as in ``AtlasPipeline.__call__``; ``None`` removes them.
            weights: ``(m,)``, non-negative.
        """
        size = self.unet.config.sample_size * self.vae_scale_factor
        self.references = None if references is None else read_references(self, references, weights, size, size)

    # ------------------------------------------------------------------ state that callbacks may read and change

    @property
    def guidance_scale(self) -> float:
        """w of the running call; a callback may set ``_guidance_scale``."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the next network call has an unconditional half; false where a guider decides."""
        return self._is_guided and self._guidance_scale > 1

    @property
    def num_timesteps(self) -> int:
        """Network calls of the running (or last) call of this thread."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """A callback may set ``_interrupt`` to stop after the current step."""
        return self._interrupt

    @contextmanager
    def _running(self, guidance_scale: float, is_guided: bool) -> Iterator[None]:
        """The state of a call; what was there before comes back, but for the number of network calls."""
        state = state_of(self)
        before = dict(state)
        self._guidance_scale, self._is_guided, self._interrupt = guidance_scale, is_guided, False
        try:
            yield
        finally:
            count = self._num_timesteps
            state.clear()
            state.update(before, _num_timesteps=count)

    def _bar(self, steps: int) -> Any:
        """A progress bar of Diffusers, for some steps."""
        pipeline: Any = self
        return pipeline.progress_bar(total=steps)

    # ------------------------------------------------------------------ text

    @property
    def has_text(self) -> bool:
        """Whether the network attends to a prompt."""
        return reads_text(self.unet.config)

    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        device: torch.device | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        lora_scale: float | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Text states of prompts and negative prompts, ``(batch * num_images_per_prompt, tokens, width)`` each.

        Args:
            prompt, negative_prompt: texts; one negative prompt serves all prompts, ``None`` is the empty text.
            device: where the states are wanted.
            num_images_per_prompt: copies of each prompt, next to each other.
            do_classifier_free_guidance: without it the negative states are ``None``.
            prompt_embeds, negative_prompt_embeds: states made before; take the place of the texts.
            lora_scale: scale of the text encoder's LoRA layers.
        """
        device = device or self._execution_device

        def repeated(states: torch.Tensor) -> torch.Tensor:
            return states.to(device).expand(count, -1, -1).repeat_interleave(num_images_per_prompt, dim=0)

        if prompt_embeds is None:
            prompt_embeds = self._encode([prompt] if isinstance(prompt, str) else prompt or [""], device, lora_scale)
        count = len(prompt_embeds)
        if not do_classifier_free_guidance:
            return repeated(prompt_embeds), None
        if negative_prompt_embeds is None:
            negative = negative_prompt if isinstance(negative_prompt, list) else [negative_prompt or ""] * count
            negative_prompt_embeds = self._encode(negative, device, lora_scale)
        return repeated(prompt_embeds), repeated(negative_prompt_embeds)

    def _encode(self, texts: list[str], device: torch.device, lora_scale: float | None) -> torch.Tensor:
        with TOKENIZING:
            texts = cast(list[str], self.maybe_convert_prompt(texts, self.tokenizer))  # a list for a list
        limit = self.tokenizer.model_max_length
        ids = tokenize_for(self.text_encoder, self.tokenizer, texts).to(device)
        cut = [text for text, tokens in zip(texts, token_lists(self.tokenizer, texts)) if len(tokens) > limit]
        if cut:
            logger.warning(f"prompts longer than {limit} tokens are cut at the end: {cut}")
        with LoraScale(self.text_encoder, 1.0 if lora_scale is None else lora_scale)():
            return self.text_encoder(ids).last_hidden_state.to(self.unet.dtype)

    # ------------------------------------------------------------------ latents

    @property
    def size_multiple(self) -> int:
        """Pixels that the sides of a picture are multiples of."""
        return self.vae_scale_factor * getattr(self.unet, "size_multiple", 1)

    def checked_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Height and width in pixels, by default those of training; ``ValueError`` unless multiples of ``size_multiple``."""
        size = self.unet.config.sample_size * self.vae_scale_factor
        sides, multiple = (size if height is None else height, size if width is None else width), self.size_multiple
        if min(sides) < 1 or any(side % multiple for side in sides):
            raise ValueError(f"height={sides[0]} and width={sides[1]} must be positive multiples of {multiple}")
        return sides

    def prepare_latents(
        self,
        batch: int,
        height: int,
        width: int,
        scheduler: object,
        generator: Generators = None,
        latents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Start noise of the scheduler's first level, ``(batch, channels, height / scale, width / scale)``."""
        factor, device, dtype = self.vae_scale_factor, self._execution_device, self.unet.dtype
        shape = (batch, self.unet.config.in_channels, height // factor, width // factor)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"latents have shape {tuple(latents.shape)}; expected {shape}")
        # a flow starts from noise as it is
        return latents.to(device=device, dtype=dtype) * getattr(scheduler, "init_noise_sigma", 1.0)

    def _encode_image(
        self, image: PipelineImageInput, height: int, width: int, generator: Generators = None, sample_mode: str = "sample"
    ) -> torch.Tensor:
        """Clean latents of input pictures."""
        pixels = self.image_processor.preprocess(image, height=height, width=width)
        pixels = pixels.to(device=self._execution_device, dtype=self.unet.dtype)
        return pixels if self.vae is None else encode_latents(self.vae, pixels, generator, sample_mode)

    def _decode(self, latents: torch.Tensor, output_type: str, batch_size: int | None = None) -> Any:
        """Pictures as ``output_type`` says, from at most ``batch_size`` latents at a time."""
        if output_type == "latent":
            return latents
        if self.vae is not None:
            parts = latents.split(batch_size or len(latents))
            latents = torch.cat([decode_latents(self.vae, part) for part in parts])
        return self.image_processor.postprocess(latents, output_type=output_type)
