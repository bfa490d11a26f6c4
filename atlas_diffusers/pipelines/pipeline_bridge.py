"""Image-to-image along a learned bridge."""

import copy
import inspect
from typing import Any

import torch
from diffusers.image_processor import PipelineImageInput
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import retrieve_timesteps

from ..denoising import ClassifierFreeGuidance, Denoiser, SchedulerProcess, sample
from ..models.lora_scale import LoraScale
from .base import AtlasPipelineBase, AtlasPipelineOutput, Generators
from .inputs import check_generators, check_output_type
from .prompts import Prompts


class AtlasBridgePipeline(AtlasPipelineBase):
    r"""
    Carries pictures of one data set to another along the probability flow of a bridge:

        dx/ds = v_θ(x, s, caption),   from the picture at s = 1 to the result at s = 0.

    The network is trained by ``objective: bridge_matching`` (Tong et al. 2023, arXiv 2307.03672; Shi et al. 2023, arXiv
    2303.16852). Components as of :class:`AtlasPipeline`; the scheduler is any flow-matching one, such as
    ``FlowMatchEulerDiscreteScheduler``.
    """

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
        guidance_rescale: float = 0.0,
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
            num_inference_steps: network calls; by default the pipeline's. They move evenly from s = 1 to s = 0.
            sigmas: explicit values of s instead, decreasing from 1.
            guidance_scale, guidance_rescale: as of :class:`AtlasPipeline`.
            height, width: size in pixels; by default that of training.
            generator: for schedulers that draw noise; the flow itself is deterministic.
            output_type: `pil`, `np`, `pt` or `latent`.
            return_dict: return an output object instead of a tuple.

        Raises:
            ValueError: for inputs that do not fit, or when the network returns NaN or infinity (with the step).
        """
        height, width = self.checked_size(height, width)
        check_output_type(output_type)
        x = self._encode_image(image, height, width, sample_mode="argmax")
        prompts = self._prompts_of(len(x), prompt, negative_prompt, class_labels)
        check_generators(generator, len(x))
        scale = self.defaults.default_guidance_scale if guidance_scale is None else guidance_scale
        guidance = ClassifierFreeGuidance(max(scale, 1.0), guidance_rescale)
        with self._running(scale, prompts.are_given):
            conditions, unconditional = prompts.encode(self, self.do_classifier_free_guidance)
            scheduler = copy.deepcopy(self.scheduler)
            steps = num_inference_steps or self.defaults.default_num_inference_steps
            sigmas = even_sigmas(scheduler, steps) if sigmas is None else sigmas
            retrieve_timesteps(scheduler, steps if sigmas is None else None, self._execution_device, sigmas=sigmas)
            self._num_timesteps = len(scheduler.timesteps)
            denoiser = Denoiser(
                self.unet, SchedulerProcess(scheduler), conditions, unconditional, {"return_dict": False}, guidance,
                context=LoraScale(self.unet),
            )  # fmt: skip
            x = sample(denoiser, scheduler, x, progress=self._bar, generator=generator)
            images = self._decode(x, output_type)
        self.maybe_free_model_hooks()
        return AtlasPipelineOutput(images=images) if return_dict else (images,)

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
