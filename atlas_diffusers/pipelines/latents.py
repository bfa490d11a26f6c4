"""Pictures and latents."""

from typing import Any

import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import retrieve_latents


def encode_latents(vae: Any, pixels: torch.Tensor, generator: Any = None, sample_mode: str = "sample") -> torch.Tensor:
    """
    ``scaling_factor · z``, z drawn from the encoder's Gaussian or, with ``sample_mode="argmax"``, its mean.

    Args:
        vae: ``AutoencoderKL`` or, without a Gaussian, ``AutoencoderTiny`` or ``AtlasAutoencoder``.
        pixels: (batch, channels, height, width) in [-1, 1].
        generator: a ``torch.Generator`` that draws z, or a list with one a picture.
        sample_mode: `sample` or `argmax`.
    """
    return retrieve_latents(vae.encode(pixels), generator, sample_mode) * vae.config.scaling_factor


def decode_latents(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Pictures around [-1, 1] of latents, the inverse of :func:`encode_latents`."""
    return vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0]
