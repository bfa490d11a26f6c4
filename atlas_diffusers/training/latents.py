"""Pictures as latents of a variational autoencoder."""

import torch
from diffusers.utils.torch_utils import randn_tensor


@torch.no_grad()
def encode_latents(vae, pixels: torch.Tensor, generator: torch.Generator | list[torch.Generator]) -> torch.Tensor:
    """
    ``scaling_factor · z`` with z drawn from the encoder's Gaussian.

    Args:
        vae: an ``AutoencoderKL``.
        pixels: (batch, channels, height, width) in [-1, 1].
        generator: draws z, on the CPU; a list has one a picture.
    """
    posterior = vae.encode(pixels).latent_dist
    latents = posterior.mean + posterior.std * randn_tensor(posterior.mean.shape, generator, pixels.device, pixels.dtype)
    return latents * vae.config.scaling_factor
