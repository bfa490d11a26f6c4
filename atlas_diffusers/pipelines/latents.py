"""Pictures and latents."""

from typing import Any

import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import retrieve_latents


def encode_latents(vae: Any, pixels: torch.Tensor, generator: Any = None, sample_mode: str = "sample") -> torch.Tensor:
    """
    ``(z − shift_factor) · scaling_factor``, z drawn from the encoder's Gaussian or, with ``sample_mode="argmax"``, its mean.

    Args:
        vae: an autoencoder of Diffusers or ``AtlasAutoencoder``; those without a Gaussian have one z.
        pixels: (batch, channels, height, width) in [-1, 1].
        generator: a ``torch.Generator`` that draws z, or a list with one a picture.
        sample_mode: `sample` or `argmax`.
    """
    encoded = vae.encode(pixels)
    latents = encoded.latent if hasattr(encoded, "latent") else retrieve_latents(encoded, generator, sample_mode)
    return normalise_latents(vae, latents)


def normalise_latents(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Of z what diffusion works on, by the autoencoder's factors."""
    return (latents - (vae.config.get("shift_factor") or 0)) * vae.config.scaling_factor


def decode_latents(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Pictures around [-1, 1] of latents, the inverse of :func:`encode_latents`."""
    shift = vae.config.get("shift_factor") or 0
    return vae.decode(latents / vae.config.scaling_factor + shift, return_dict=False)[0]
