"""Text-, class- or unconditional generation with any scheduler."""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput
from diffusers.utils.torch_utils import randn_tensor

from ..config import BridgeConfig
from ..denoising import (
    CoupledDenoiser,
    Denoiser,
    DiffusersGuidance,
    LangevinCorrector,
    SchedulerProcess,
    noised,
    plan_stages,
    sample,
    sample_coarse_to_fine,
    set_begin_index,
    set_stages,
)
from ..models.lora_scale import LoraScale
from ..schedulers import AtlasMultistepScheduler
from .base import AtlasPipelineBase, AtlasPipelineOutput, Generators
from .bridge_plan import BridgePlan, plan_bridge
from .callbacks import StepCallback
from .guiding import GuidanceInputs
from .inputs import (
    Steps,
    check_generators,
    check_network_batch_size,
    check_noise,
    check_output_type,
    checked_resolutions,
    checked_snr,
    checked_strength,
    checked_tiles,
)
from .prompts import Prompts
from .references import References

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL.Image import Image

    from ..bridges import ReferenceShards


class Start(NamedTuple):
    """What a call starts from: a picture noised for the last ``strength`` of the steps, noise of one's own, or neither."""

    image: PipelineImageInput | None
    strength: float
    latents: torch.Tensor | None
    batch: int
    height: int
    width: int
    generator: Generators


class Route(NamedTuple):
    """First sample, timesteps of the network calls, and the loop along them, called as ``follow(denoiser, x=x, ...)``."""

    x: torch.Tensor
    timesteps: list[float]
    follow: Callable[..., torch.Tensor]


class AtlasPipeline(AtlasPipelineBase):
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
        guidance_rescale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        guider: object = None,
        height: int | None = None,
        width: int | None = None,
        image: PipelineImageInput | None = None,
        strength: float | None = None,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        cross_attention_kwargs: dict | None = None,
        references: "torch.Tensor | list[Image] | Dataset | ReferenceShards | References | str | None" = None,
        reference_weights: torch.Tensor | None = None,
        bridge: BridgeConfig | dict | None = None,
        corrector_steps: int = 0,
        corrector_snr: float | None = None,
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
            timesteps, sigmas: explicit steps instead of a number, where the scheduler takes them.
            guidance_scale: w; 1 switches guidance off and halves the cost. Default: ``default_guidance_scale``.
            guidance_rescale: share of the guided prediction rescaled to the conditional one's standard deviation
                (Lin et al. 2023, arXiv 2305.08891).
            guidance_interval: lowest and highest σ̂ = σ/α with guidance (Kynkäänniemi et al. 2024, arXiv 2404.07724); steps
                outside cost half.
            guider: a guider of ``diffusers.guiders`` in place of guidance_scale, rescale and interval.
            height, width: size in pixels; by default that of training.
            image, strength: start from a picture noised for the last ``strength`` of the steps (0.8 by default; arXiv
                2108.01073).
            eta: weight of fresh noise, where the scheduler takes it.
            generator: one for the batch, or a list with one a picture, which makes pictures independent of the batch.
            latents: start noise of unit variance, ``(batch, channels, height / scale, width / scale)``.
            prompt_embeds, negative_prompt_embeds: text states instead of texts.
            cross_attention_kwargs: ``{"scale": s}`` scales LoRA layers.
            references: clean data that the batch is coupled with by a Schrödinger bridge: pictures in [-1, 1] or latents,
                ``(m, channels, height, width)``, a list of PIL pictures, a folder of them, a dataset with ``image`` and
                perhaps ``text``, a safetensors file, or :class:`~atlas_diffusers.bridges.ReferenceShards`. Samples of one
                prompt form a group whose references are weighted by the likeness of their captions to it.
            reference_weights: ``(m,)``, non-negative.
            bridge: fields of :class:`~atlas_diffusers.config.BridgeConfig`; alone, with the pipeline's own references. With
                ``steps``, these come first, and ``num_inference_steps`` are those of the network below the gate.
            corrector_steps, corrector_snr: Langevin steps after every step, with signal-to-noise ratio 0.16 by default, see
                :class:`~..denoising.LangevinCorrector`; each costs a network call.
            hierarchical: the noisy half of the steps at lower resolutions, see :func:`~..denoising.plan_stages`; for
                networks trained with ``num_resolutions`` and schedulers of this package.
            tile_size, tile_overlap: side, and least overlap (a quarter by default), of tiles that the network sees one by one,
                in pixels; for pictures larger than those of training. See :class:`~..denoising.Tiles`.
            network_batch_size: most pictures in one network call; couplings and results do not depend on it.
            output_type: `pil`, `np`, `pt` or `latent`.
            return_dict: return an output object instead of a tuple.
            callback_on_step_end: called as ``f(pipeline, index, timestep, tensors)``, returns the tensors to replace.
            callback_on_step_end_tensor_inputs: names of the tensors that it gets, `latents` (the default) and
                `prompt_embeds` (where guidance is on, negative states first).

        Raises:
            ValueError: for inputs that do not fit, or when the network returns NaN or infinity (with the step).
        """
        height, width = self.checked_size(height, width)
        prompts = Prompts(prompt, negative_prompt, class_labels, prompt_embeds, negative_prompt_embeds, num_images_per_prompt)
        prompts.check(self)
        callback = StepCallback.of(self, callback_on_step_end, callback_on_step_end_tensor_inputs)
        steps = Steps(self.defaults.default_num_inference_steps, num_inference_steps, timesteps, sigmas)
        start = Start(image, checked_strength(strength, image), latents, prompts.batch, height, width, generator)
        check_noise(self.scheduler, eta)
        snr = checked_snr(corrector_snr, corrector_steps)
        check_generators(generator, prompts.batch)
        check_network_batch_size(network_batch_size)
        check_output_type(output_type)
        is_parted = bool(tile_size or corrector_steps or (network_batch_size or prompts.batch) < prompts.batch)
        default_scale = self.defaults.default_guidance_scale
        guiding = GuidanceInputs(default_scale, guidance_scale, guidance_rescale, guidance_interval, guider)
        guiding.check_guider(prompts, is_parted)
        tiles, guidance = checked_tiles(self, tile_size, tile_overlap), guiding.classifier_free()
        options = dict(cross_attention_kwargs or {})
        lora = options.pop("scale", None)

        with self._running(guiding.effective_scale, prompts.are_given and guider is None):
            guided = self.do_classifier_free_guidance or guider is not None
            if not guided:
                guiding.warn_unused(prompts)
            conditions, unconditional = prompts.encode(self, guided, lora)
            plan = plan_bridge(self, references, reference_weights, bridge, prompts, height, width)
            scheduler = self._scheduler(steps, plan, start)
            route = self._coarse_route(scheduler, steps, plan, start) if hierarchical else self._route(scheduler, start)
            self._num_timesteps = len(route.timesteps)
            process = SchedulerProcess(scheduler)
            denoiser: Any = Denoiser(
                self.unet, process, conditions, unconditional,
                {"return_dict": False, **({"cross_attention_kwargs": options} if options else {})},
                guidance if guider is None else DiffusersGuidance(guider, self.unet, route.timesteps), tiles,
                network_batch_size, LoraScale(self.unet, 1.0 if lora is None else lora),
            )  # fmt: skip
            coupling = None if plan is None else plan.coupling(process, scheduler.timesteps)
            if coupling is not None:
                denoiser = CoupledDenoiser(denoiser, coupling)
            corrector = LangevinCorrector(scheduler, corrector_steps, snr, generator) if corrector_steps else None
            x = route.follow(
                denoiser, x=route.x, corrector=corrector, callback=callback, progress=self._bar, generator=generator, eta=eta
            )
            report = None if coupling is None else coupling.finish(x)
            images = self._decode(x, output_type, network_batch_size)
        self.maybe_free_model_hooks()
        return AtlasPipelineOutput(images=images, bridge=report) if return_dict else (images,)

    def _scheduler(self, steps: Steps, plan: BridgePlan | None, start: Start) -> Any:
        """A call's own copy of the scheduler, with its steps set; those of a bridge come first."""
        scheduler: Any = copy.deepcopy(self.scheduler)
        scale = self.guidance_scale if self.do_classifier_free_guidance else 1.0
        if isinstance(scheduler, AtlasMultistepScheduler):
            scheduler.set_guidance_scale(scale)
        if plan is not None and plan.config.steps is not None:
            if steps.are_explicit or start.image is not None:
                raise ValueError("bridge steps choose the timesteps; give no timesteps, sigmas or image with them")
            steps = replace(steps, number=None, timesteps=plan.choose_timesteps(scheduler, plan.config.steps, steps.count))
        steps.set(scheduler, self._execution_device)
        if isinstance(scheduler, AtlasMultistepScheduler):
            scheduler.check_guidance_scale(scale)
        return scheduler

    def _route(self, scheduler: Any, start: Start) -> Route:
        """From pure noise, or from a picture noised so that ``strength`` of the steps remain (image-to-image)."""
        image, strength, latents, batch, height, width, generator = start
        if image is None:
            x, begin = self.prepare_latents(batch, height, width, scheduler, generator, latents), 0
        else:
            clean = self._encode_image(image, height, width, generator)
            if batch % len(clean):
                raise ValueError(f"{len(clean)} pictures do not divide a batch of {batch} samples")
            clean = clean.repeat_interleave(batch // len(clean), dim=0)
            steps = -(-len(scheduler.timesteps) // scheduler.order)
            begin = (steps - max(1, min(int(steps * strength), steps))) * scheduler.order
            noise = randn_tensor(clean.shape, generator, clean.device, clean.dtype) if latents is None else latents
            set_begin_index(scheduler, begin)
            x = noised(scheduler, clean, noise, scheduler.timesteps[begin : begin + 1].repeat(batch))
        return Route(x, scheduler.timesteps[begin:].tolist(), partial(sample, scheduler=scheduler, begin=begin))

    def _coarse_route(self, scheduler: Any, steps: Steps, plan: BridgePlan | None, start: Start) -> Route:
        """From pure noise of the lowest of the network's resolutions, with a scheduler a resolution."""
        fixed = {
            "image": start.image, "latents": start.latents, "timesteps": steps.timesteps, "sigmas": steps.sigmas,
            "references": plan,
        }  # fmt: skip
        levels = checked_resolutions(self, scheduler, start.height, start.width, fixed)
        stages = plan_stages(scheduler, levels)
        schedulers = set_stages(self.scheduler, stages, self._execution_device)
        sides = start.height >> stages[0].halvings, start.width >> stages[0].halvings
        x = self.prepare_latents(start.batch, *sides, schedulers[0], start.generator)
        timesteps = [t for each in schedulers for t in each.timesteps.tolist()]
        return Route(x, timesteps, partial(sample_coarse_to_fine, schedulers=schedulers, stages=stages))
