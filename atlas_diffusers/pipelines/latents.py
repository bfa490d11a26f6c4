"""Start noise, input pictures and decoding."""

import torch
from diffusers.image_processor import PipelineImageInput
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import retrieve_latents
from diffusers.utils.torch_utils import randn_tensor


def set_begin_index(scheduler, index: int) -> None:
    """Tell the scheduler where sampling starts; Diffusers' PNDM cannot be told and need not be."""
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(index)


def encode_latents(
    vae, pixels: torch.Tensor, generator: torch.Generator | list[torch.Generator] | None = None, sample_mode: str = "sample"
) -> torch.Tensor:
    """
    ``scaling_factor · z``, z drawn from the encoder's Gaussian or, with ``sample_mode="argmax"``, its mean.

    Args:
        vae: an ``AutoencoderKL``.
        pixels: (batch, channels, height, width) in [-1, 1].
        generator: draws z; a list has one a picture.
        sample_mode: `sample` or `argmax`.
    """
    return retrieve_latents(vae.encode(pixels), generator, sample_mode) * vae.config.scaling_factor


class LatentsMixin:
    """Latents of a pipeline with ``unet``, ``vae`` and ``image_processor``."""

    def prepare_latents(
        self, batch: int, height: int, width: int, dtype: torch.dtype, device: torch.device, generator, latents, scheduler
    ) -> torch.Tensor:
        """Start noise of the scheduler's first level, ``(batch, channels, height / scale, width / scale)``."""
        factor = self.vae_scale_factor
        shape = (batch, self.unet.config.in_channels, height // factor, width // factor)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"latents have shape {tuple(latents.shape)}; expected {shape}")
        return latents.to(device=device, dtype=dtype) * scheduler.init_noise_sigma

    def _encode_image(self, image: PipelineImageInput, height: int, width: int, batch: int, generator) -> torch.Tensor:
        """Clean latents of an input picture, repeated to the batch."""
        pixels = self.image_processor.preprocess(image, height=height, width=width)
        pixels = pixels.to(device=self._execution_device, dtype=self.unet.dtype)
        if self.vae is not None:
            pixels = encode_latents(self.vae, pixels, generator)
        if batch % len(pixels):
            raise ValueError(f"{len(pixels)} pictures do not divide a batch of {batch} samples")
        return pixels.repeat_interleave(batch // len(pixels), dim=0)

    def _start(
        self, scheduler, batch: int, height: int, width: int, image, strength: float, generator, latents
    ) -> tuple[torch.Tensor, int]:
        """
        First latents and the index of their timestep: pure noise, or a picture noised so that ``strength`` of the steps
        remain (image-to-image).
        """
        device, dtype = self._execution_device, self.unet.dtype
        if image is None:
            set_begin_index(scheduler, 0)
            return self.prepare_latents(batch, height, width, dtype, device, generator, latents, scheduler), 0
        clean = self._encode_image(image, height, width, batch, generator)
        steps = -(-len(scheduler.timesteps) // scheduler.order)
        begin = (steps - max(1, min(int(steps * strength), steps))) * scheduler.order
        noise = randn_tensor(clean.shape, generator, clean.device, clean.dtype) if latents is None else latents
        set_begin_index(scheduler, begin)
        return scheduler.add_noise(clean, noise, scheduler.timesteps[begin : begin + 1].repeat(len(clean))), begin

    def _decode(self, latents: torch.Tensor, output_type: str):
        if output_type == "latent":
            return latents
        if self.vae is not None:
            latents = self.vae.decode(latents / self.vae.config.scaling_factor, return_dict=False)[0]
        return self.image_processor.postprocess(latents, output_type=output_type)
