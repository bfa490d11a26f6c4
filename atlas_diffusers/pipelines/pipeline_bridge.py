"""Image-to-image along a learned bridge."""

import copy
import inspect
from dataclasses import replace
from typing import Any

import torch
from diffusers.image_processor import PipelineImageInput
from diffusers.models import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from transformers import CLIPTextModel, CLIPTokenizer

from ..bridges.brownian import times_left
from ..denoising import BridgeFlow, BridgeSteps, Denoiser, SchedulerProcess, sample
from ..models import AtlasAutoencoder, AtlasTransformer2DModel, AtlasUNet2DModel
from ..models.lora_scale import LoraScale
from .base import AtlasPipelineBase, AtlasPipelineOutput, Generators
from .guiding import GuidanceInputs
from .inputs import Steps, check_generators, check_output_type
from .prompts import Prompts


class AtlasBridgePipeline(AtlasPipelineBase):
    r"""
    Carries pictures of one data set to another along a bridge, from the picture at s = 1 to the result at s = 0:

        dx/ds = v_θ(x, s, caption)                      the probability flow, or
        dX = d_θ(X, s, caption)/√s dt + σ dW, t = 1 − s     the diffusion, of a pipeline that has learned one

    The network is trained by ``objective: bridge_matching`` (Tong et al. 2023, arXiv 2307.03672; Shi et al. 2023, arXiv
    2303.16852), with ``bridge_passes`` a diffusion. Components as of :class:`AtlasPipeline`; the scheduler of the flow is any
    flow-matching one, such as ``FlowMatchEulerDiscreteScheduler``.

    Args:
        backward_unet: network of the diffusion in the other direction, which the flow of a diffusion needs.
        bridge_sigma: σ of the diffusion; ``None`` for a network that has learned a flow.

    Raises:
        ValueError: for a network backward without σ.
    """

    model_cpu_offload_seq = "text_encoder->unet->backward_unet->vae"
    _optional_components = [*AtlasPipelineBase._optional_components, "backward_unet"]

    def __init__(
        self,
        unet: AtlasUNet2DModel | AtlasTransformer2DModel | UNet2DConditionModel,
        scheduler: SchedulerMixin,
        vae: AutoencoderKL | AutoencoderTiny | AtlasAutoencoder | None = None,
        text_encoder: CLIPTextModel | None = None,
        tokenizer: CLIPTokenizer | None = None,
        backward_unet: AtlasUNet2DModel | AtlasTransformer2DModel | UNet2DConditionModel | None = None,
        bridge_sigma: float | None = None,
        default_num_inference_steps: int = 50,
        default_guidance_scale: float = 7.5,
    ):
        super().__init__(unet, scheduler, vae, text_encoder, tokenizer, default_num_inference_steps, default_guidance_scale)
        if backward_unet is not None and bridge_sigma is None:
            raise ValueError("backward_unet is of a diffusion, whose bridge_sigma is missing")
        self.register_modules(backward_unet=backward_unet)
        self.register_to_config(bridge_sigma=bridge_sigma)

    @torch.no_grad()
    def __call__(
        self,
        image: PipelineImageInput,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        class_labels: int | list[int] | torch.Tensor | None = None,
        num_inference_steps: int | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float | None = None,
        guidance_rescale: float | None = None,
        stochastic: bool | None = None,
        height: int | None = None,
        width: int | None = None,
        generator: Generators = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> AtlasPipelineOutput | tuple:
        """
        Carry pictures over.

        Args:
            image: one picture or a list, or a tensor in [0, 1], ``(batch, channels, height, width)``.
            prompt, negative_prompt: one text for all pictures, or one each, where the network takes any.
            class_labels: the same for labels.
            num_inference_steps: N, by default the pipeline's. The flow takes N network calls, evenly from s = 1 to s = 0, or
                what its scheduler does with them; the diffusion 2N − 1, at s = (k/N)².
            sigmas: explicit values of s instead, decreasing from 1.
            guidance_scale, guidance_rescale: as of :class:`AtlasPipeline`.
            stochastic: follow the diffusion with its noise, or its flow; by default the diffusion of a pipeline that has one.
            height, width: size in pixels; by default that of training.
            generator: of the diffusion's noise, and for schedulers that draw some; the flow itself is deterministic.
            output_type: `pil`, `np`, `pt` or `latent`.
            return_dict: return an output object instead of a tuple.

        Raises:
            ValueError: for inputs that do not fit, or when the network returns NaN or infinity (with the step).
        """
        height, width = self.checked_size(height, width)
        check_output_type(output_type)
        steps = Steps(self.defaults.default_num_inference_steps, num_inference_steps, sigmas=sigmas)
        x = self._encode_image(image, height, width, sample_mode="argmax")
        prompts = self._prompts_of(len(x), prompt, negative_prompt, class_labels)
        check_generators(generator, len(x))
        guiding = GuidanceInputs(self.defaults.default_guidance_scale, guidance_scale, guidance_rescale)
        guidance = guiding.classifier_free()
        with self._running(guiding.effective_scale, prompts.are_given):
            if not self.do_classifier_free_guidance:
                guiding.warn_unused(prompts)
            conditions, unconditional = prompts.encode(self, self.do_classifier_free_guidance)
            shared = (conditions, unconditional, {"return_dict": False}, guidance)
            denoiser, scheduler = self._process(self._stochastic(stochastic), steps, shared)
            self._num_timesteps = len(scheduler.timesteps)
            x = sample(denoiser, scheduler, x, progress=self._bar, generator=generator)
            images = self._decode(x, output_type)
        self.maybe_free_model_hooks()
        return AtlasPipelineOutput(images=images) if return_dict else (images,)

    def _stochastic(self, asked: bool | None) -> bool:
        """Whether a call follows the diffusion."""
        learned = self.config.bridge_sigma is not None
        if asked and not learned:
            raise ValueError("stochastic=True, but the network has learned a flow: train a diffusion by bridge_passes")
        if asked is False and learned and self.backward_unet is None:
            raise ValueError("stochastic=False, but the flow of a diffusion needs backward_unet, which this pipeline lacks")
        return learned if asked is None else asked

    def _process(self, stochastic: bool, steps: Steps, shared: tuple) -> tuple[Any, Any]:
        """What predicts, and a scheduler whose steps are set."""
        scheduler, device = copy.deepcopy(self.scheduler), self._execution_device
        horizon = scheduler.config.num_train_timesteps
        if stochastic:
            times = times_left(steps.count) if steps.sigmas is None else [*steps.sigmas, 0.0]
            scheduler = BridgeSteps(self.config.bridge_sigma, times, horizon, device)
        else:
            even = None if steps.are_explicit else even_sigmas(scheduler, steps.count)
            (steps if even is None else replace(steps, number=None, sigmas=even)).set(scheduler, device)
        denoiser = Denoiser(self.unet, SchedulerProcess(scheduler), *shared, context=LoraScale(self.unet))
        if stochastic or self.config.bridge_sigma is None:
            return denoiser, scheduler
        backward = replace(denoiser, network=self.backward_unet, context=LoraScale(self.backward_unet))
        return BridgeFlow(denoiser, backward, horizon, 0.5 / len(scheduler.timesteps)), scheduler

    def _prompts_of(self, batch: int, prompt: Any, negative_prompt: Any, class_labels: Any) -> Prompts:
        """One prompt or label a picture, from one for all or one each."""
        prompt = [prompt] * batch if isinstance(prompt, str) else prompt
        class_labels = [class_labels] * batch if isinstance(class_labels, int) else class_labels
        copies = batch if prompt is None and class_labels is None else 1
        prompts = Prompts(prompt, negative_prompt, class_labels, copies=copies)
        prompts.check(self)
        if prompts.batch != batch:
            raise ValueError(f"{prompts.batch} prompts or labels for {batch} pictures; expected one each")
        return prompts


def even_sigmas(scheduler: Any, count: int) -> list[float] | None:
    """
    ``1, 1 − 1/N, …, 1/N``: N calls that move like N steps, where a scheduler's own spacing leaves the last call next to
    nothing; ``None`` for a scheduler that takes no sigmas.
    """
    if "sigmas" not in inspect.signature(scheduler.set_timesteps).parameters:
        return None
    return [1 - step / count for step in range(count)]
