"""Image-to-image along a learned bridge."""

import copy

import torch
from diffusers.image_processor import PipelineImageInput
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import retrieve_timesteps

from .bridging import AtlasPipelineOutput
from .denoising import DenoisingRun, step_arguments
from .inputs import batch_size_of, check_call_inputs
from .latents import encode_latents, set_begin_index
from .pipeline_atlas import AtlasPipeline


class AtlasBridgePipeline(AtlasPipeline):
    r"""
    Carries pictures of one data set to another along the probability flow of a bridge:

        dx/ds = v_θ(x, s, caption),   from the picture at s = 1 to the result at s = 0.

    The network is trained by ``objective: bridge_matching`` (Tong et al. 2023, arXiv 2307.03672; Shi et al. 2023, arXiv
    2303.16852). Components as of :class:`AtlasPipeline`; the scheduler is any of Diffusers' flow-matching ones, such as
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
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> AtlasPipelineOutput | tuple:
        """
        Args:
            image: one picture or a list, or a tensor in [0, 1], ``(batch, channels, height, width)``.
            prompt, negative_prompt: one text for all pictures, or one each, where the network takes any.
            class_labels: the same for labels.
            num_inference_steps: network calls; by default the pipeline's.
            sigmas: explicit values of s instead, decreasing from 1.
            guidance_scale, guidance_rescale: as of :class:`AtlasPipeline`.
            height, width: size in pixels; by default that of training.
            generator: for schedulers that draw noise; the flow itself is deterministic.
            output_type: `pil`, `np`, `pt` or `latent`.
            return_dict: return an output object instead of a tuple.

        Raises:
            ValueError: for inputs that do not fit, or when the network returns NaN or infinity (with the step).
        """
        size = self.unet.config.sample_size * self.vae_scale_factor
        height, width = height or size, width or size
        latents = self.image_processor.preprocess(image, height=height, width=width)
        latents = latents.to(device=self._execution_device, dtype=self.unet.dtype)
        batch = len(latents)
        prompt = [prompt] * batch if isinstance(prompt, str) else prompt
        class_labels = [class_labels] * batch if isinstance(class_labels, int) else class_labels
        conditioned = prompt is not None or class_labels is not None
        repeats = 1 if conditioned else batch
        check_call_inputs(
            self, prompt, negative_prompt, class_labels, None, None, repeats, height, width, 1.0, generator, output_type, []
        )
        if (count := batch_size_of(prompt, class_labels, None) * repeats) != batch:
            raise ValueError(f"{count} prompts or labels for {batch} pictures; expected one each")
        self._guidance_scale = self.config.default_guidance_scale if guidance_scale is None else guidance_scale
        self._guidance_rescale, self._interrupt, self._has_guider = guidance_rescale, False, False
        self._guided, self._network_batch_size = conditioned, batch
        scheduler, device = copy.deepcopy(self.scheduler), self._execution_device
        states, labels = self._conditions(prompt, negative_prompt, class_labels, None, None, repeats, None, device)
        if self.vae is not None:
            latents = encode_latents(self.vae, latents, sample_mode="argmax")
        steps = None if sigmas is not None else num_inference_steps or self.config.default_num_inference_steps
        retrieve_timesteps(scheduler, steps, device, sigmas=sigmas)
        set_begin_index(scheduler, 0)
        run = DenoisingRun(scheduler, states, labels, None, step_arguments(scheduler, generator=generator))
        latents = self._denoise(run, latents)
        images = self._decode(latents, output_type)
        self.maybe_free_model_hooks()
        return AtlasPipelineOutput(images=images, bridge=None) if return_dict else (images,)
