"""Text-, class- or unconditional generation with any scheduler."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import retrieve_timesteps
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from safetensors import SafetensorError
from transformers import CLIPTextModel, CLIPTokenizer

from ..config import BridgeConfig
from ..models import AtlasUNet2DModel
from ..schedulers import AtlasMultistepScheduler
from .bridging import AtlasPipelineOutput
from .call_state import PerThread
from .coarse_to_fine import CoarseToFineMixin
from .conditioned import ConditioningMixin
from .correcting import LangevinCorrector
from .denoising import DenoisingMixin, DenoisingRun, step_arguments
from .inputs import batch_size_of, check_call_inputs
from .latents import LatentsMixin
from .loading import resolve_pipeline
from .references import FILE, References, ReferencesMixin

if TYPE_CHECKING:
    from datasets import Dataset


class AtlasPipeline(
    ReferencesMixin, ConditioningMixin, CoarseToFineMixin, DenoisingMixin, LatentsMixin, DiffusionPipeline,
    StableDiffusionLoraLoaderMixin,
):  # fmt: skip
    r"""
    Generates pictures with a UNet and any scheduler, in pixels or in the latent space of a VAE.

    Guidance is classifier-free: ``m = m_∅ + w (m_c − m_∅)`` (Ho & Salimans 2022, arXiv 2207.12598), both terms in one
    batched network call. A call works on its own copy of the scheduler, so threads may share a pipeline.

    Args:
        unet: network called as ``unet(sample, t, encoder_hidden_states=..., class_labels=...)``.
        scheduler: any Diffusers-compatible scheduler.
        vae: autoencoder of the latent space; ``None`` for pixels in [-1, 1].
        text_encoder, tokenizer: CLIP text model and tokenizer; ``None`` for a network without text.
        default_num_inference_steps, default_guidance_scale: used where a call does not say; saved with the pipeline.
    """

    model_cpu_offload_seq = "text_encoder->unet->vae"
    _optional_components = ["vae", "text_encoder", "tokenizer"]
    _callback_tensor_inputs = ["latents", "prompt_embeds"]

    _guidance_scale = PerThread(7.5)
    _guidance_rescale = PerThread(0.0)
    _num_timesteps = PerThread(0)
    _network_batch_size = PerThread(1)
    _guided = PerThread(False)
    _has_guider = PerThread(False)

    def __init__(
        self,
        unet: AtlasUNet2DModel | UNet2DConditionModel,
        scheduler: SchedulerMixin,
        vae: AutoencoderKL | None = None,
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
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1) if vae is not None else 1
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        self._interrupt = False

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """
        Load a pipeline folder, a hub id, or an embedded pipeline by name (``"atlas-emoji"``).

        Raises:
            OSError: for an unknown name, a missing component or damaged weights.
        """
        path = resolve_pipeline(str(pretrained_model_name_or_path))
        try:
            with torch.random.fork_rng():
                pipeline = super().from_pretrained(path, **kwargs)
        except SafetensorError as error:
            raise OSError(f"{path}: weights are damaged: {error}") from error
        if (Path(path) / FILE).is_file():
            pipeline.references = References.load(Path(path) / FILE)
        return pipeline

    # ------------------------------------------------------------------ state that callbacks may read and change

    @property
    def guidance_scale(self) -> float:
        """w of the running call; a callback may set ``_guidance_scale``."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the next network call has an unconditional half."""
        return (self._guidance_scale > 1 or self._has_guider) and self._guided

    @property
    def num_timesteps(self) -> int:
        """Network calls of the running (or last) call of this thread."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Set ``_interrupt`` to stop after the current step."""
        return self._interrupt

    # ------------------------------------------------------------------ the call

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        class_labels: int | list[int] | torch.Tensor | None = None,
        num_images_per_prompt: int = 1,
        num_inference_steps: int | None = None,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float | None = None,
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] | None = None,
        guider=None,
        height: int | None = None,
        width: int | None = None,
        image: PipelineImageInput | None = None,
        strength: float = 0.8,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        cross_attention_kwargs: dict | None = None,
        references: "torch.Tensor | Dataset | References | str | None" = None,
        reference_weights: torch.Tensor | None = None,
        bridge: BridgeConfig | dict | None = None,
        corrector_steps: int = 0,
        corrector_snr: float = 0.16,
        hierarchical: bool = False,
        tile_size: int | None = None,
        tile_overlap: int | None = None,
        network_batch_size: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
    ) -> AtlasPipelineOutput | tuple:
        """
        Generate pictures.

        Args:
            prompt, negative_prompt: texts; without a prompt the network runs unconditionally.
            class_labels: integer labels, one a picture (before ``num_images_per_prompt``).
            num_images_per_prompt: pictures a prompt or label.
            num_inference_steps: steps; by default the pipeline's ``default_num_inference_steps``.
            timesteps, sigmas: explicit steps instead, where the scheduler takes them.
            guidance_scale: w; 1 switches guidance off and halves the cost. Default: ``default_guidance_scale``.
            guidance_rescale: share of the guided prediction rescaled to the conditional one's standard deviation
                (Lin et al. 2023, arXiv 2305.08891).
            guidance_interval: lowest and highest σ̂ = σ/α with guidance (Kynkäänniemi et al. 2024, arXiv 2404.07724); steps
                outside cost half.
            guider: a guider of ``diffusers.guiders`` in place of guidance_scale, rescale and interval.
            height, width: size in pixels; by default that of training.
            image, strength: start from a picture noised for the last ``strength`` of the steps (arXiv 2108.01073).
            eta: weight of fresh noise, where the scheduler takes it.
            generator: one for the batch, or a list with one a picture, which makes pictures independent of the batch.
            latents: start noise of unit variance, ``(batch, channels, height / scale, width / scale)``.
            prompt_embeds, negative_prompt_embeds: text states instead of texts.
            cross_attention_kwargs: ``{"scale": s}`` scales LoRA layers.
            references: clean data that the batch is coupled with by a Schrödinger bridge: pictures in [-1, 1] or latents,
                ``(m, channels, height, width)``, a dataset with ``image`` and ``text``, or a safetensors file. Samples of
                one prompt form a group whose references are weighted by the likeness of their captions to it.
            reference_weights: ``(m,)``, non-negative.
            bridge: fields of :class:`~atlas_diffusers.config.BridgeConfig`; alone, with the pipeline's own references. With
                ``steps``, these come first, and ``num_inference_steps`` are those of the network below the gate.
            corrector_steps, corrector_snr: Langevin steps after every step, see :class:`~.correcting.LangevinCorrector`; each
                costs a network call.
            hierarchical: the noisy half of the steps at lower resolutions, see :func:`~.coarse_to_fine.plan_stages`; for
                networks trained with ``num_resolutions`` and schedulers of this package.
            tile_size, tile_overlap: side, and least overlap (a quarter by default), of tiles that the network sees one by one,
                in pixels; for pictures larger than those of training. See :class:`~.tiling.Tiles`.
            network_batch_size: most pictures in one network call; couplings and results do not depend on it.
            output_type: `pil`, `np`, `pt` or `latent`.
            return_dict: return an output object instead of a tuple.
            callback_on_step_end: called as ``f(pipeline, index, timestep, tensors)``, returns the tensors to replace.
            callback_on_step_end_tensor_inputs: names of the tensors that it gets, `latents` (the default) and
                `prompt_embeds` (where guidance is on, negative states first).

        Raises:
            ValueError: for inputs that do not fit, or when the network returns NaN or infinity (with the step).
        """
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        tensor_inputs = ["latents"] if callback_on_step_end_tensor_inputs is None else callback_on_step_end_tensor_inputs
        size = self.unet.config.sample_size * self.vae_scale_factor
        height, width = height or size, width or size
        check_call_inputs(
            self, prompt, negative_prompt, class_labels, prompt_embeds, negative_prompt_embeds,
            num_images_per_prompt, height, width, strength, generator, output_type, tensor_inputs,
        )  # fmt: skip
        self._guidance_scale = self.config.default_guidance_scale if guidance_scale is None else guidance_scale
        self._guidance_rescale, self._interrupt, self._has_guider = guidance_rescale, False, guider is not None
        self._guided = any(value is not None for value in (prompt, class_labels, prompt_embeds))
        if timesteps is None and sigmas is None and num_inference_steps is None:
            num_inference_steps = self.config.default_num_inference_steps

        batch = batch_size_of(prompt, class_labels, prompt_embeds) * num_images_per_prompt
        scheduler, device = copy.deepcopy(self.scheduler), self._execution_device
        prompt_embeds, labels = self._conditions(
            prompt, negative_prompt, class_labels, prompt_embeds, negative_prompt_embeds,
            num_images_per_prompt, (cross_attention_kwargs or {}).get("scale"), device,
        )  # fmt: skip
        bridge = self._bridge(references, reference_weights, bridge, prompt, batch, height, width, scheduler)
        if bridge is not None and bridge.config.steps is not None:
            if timesteps is not None or sigmas is not None or image is not None:
                raise ValueError("bridge steps choose the timesteps; give no timesteps, sigmas or image with them")
            timesteps = bridge.timesteps(num_inference_steps)
        explicit = timesteps is not None or sigmas is not None
        retrieve_timesteps(scheduler, None if explicit else num_inference_steps, device, timesteps, sigmas)
        if isinstance(scheduler, AtlasMultistepScheduler):
            scheduler.check_guidance_scale(self.guidance_scale if self.do_classifier_free_guidance else 1.0)
        self._network_batch_size = network_batch_size or batch
        run = DenoisingRun(
            scheduler, prompt_embeds, labels, cross_attention_kwargs, step_arguments(scheduler, generator=generator, eta=eta),
            callback_on_step_end, tensor_inputs, bridge, self._checked_interval(guidance_interval),
            self._own_guider(guider, bool(tile_size or corrector_steps or self._network_batch_size < batch)),
            LangevinCorrector(scheduler, corrector_steps, corrector_snr, generator) if corrector_steps else None,
            self._tiles(tile_size, tile_overlap),
        )  # fmt: skip
        if hierarchical:
            fixed = {"image": image, "latents": latents, "timesteps": timesteps, "sigmas": sigmas, "references": bridge}
            latents = self._coarse_to_fine(run, batch, height, width, generator, fixed)
        else:
            latents, begin = self._start(scheduler, batch, height, width, image, strength, generator, latents)
            latents = self._denoise(run, latents, begin)
        report = None if bridge is None else bridge.finish(latents)
        images = self._decode(latents, output_type)
        self.maybe_free_model_hooks()
        return AtlasPipelineOutput(images=images, bridge=report) if return_dict else (images,)
