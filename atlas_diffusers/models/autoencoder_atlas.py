"""An autoencoder that begins as the principal components of patches."""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTinyOutput
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d_blocks import AutoencoderTinyBlock
from torch import nn

FINE = 4  # the convolutions' finest side of a pixel


class AtlasAutoencoder(ModelMixin, ConfigMixin):
    """
    ``z = W x + E(x)`` and ``x = W⁺ z + D(z)``: a linear autoencoder of patches beside small convolutional networks.

    W is the principal components of training patches (:meth:`set_components`), E and D are zero at first, so a new autoencoder
    is as good as the best linear one, and training only adds to it. Called like Diffusers' ``AutoencoderTiny``.

    Args:
        in_channels: of pictures.
        latent_channels: of latents.
        block_out_channels: equal widths, one more than the number of times that pictures are halved; at least three times.
        encoder_blocks, decoder_blocks: residual blocks at a quarter of a picture's side, and at the latents'.
        scaling_factor: latents times this have unit variance.

    Raises:
        ValueError: for widths that differ or are too few.
    """

    config: Any  # of the constructor's arguments, by Diffusers

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        latent_channels: int = 16,
        block_out_channels: tuple[int, ...] = (96, 96, 96, 96),
        encoder_blocks: tuple[int, int] = (1, 2),
        decoder_blocks: tuple[int, int] = (3, 2),
        scaling_factor: float = 1.0,
    ):
        super().__init__()
        width, side = block_out_channels[0], 2 ** (len(block_out_channels) - 1)
        if len(set(block_out_channels)) > 1 or side <= FINE:
            raise ValueError(f"block_out_channels={block_out_channels}; expected at least four equal widths")
        coarse = side // FINE
        self.project = nn.Conv2d(in_channels, latent_channels, side, side)
        self.unproject = nn.ConvTranspose2d(latent_channels, in_channels, side, side)
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(FINE),
            nn.Conv2d(in_channels * FINE**2, width, 3, padding=1),
            *_blocks(encoder_blocks[0], width),
            nn.Conv2d(width, width, coarse, coarse),
            *_blocks(encoder_blocks[1], width),
            _silent_convolution(width, latent_channels),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(latent_channels, width, 3, padding=1),
            nn.ReLU(),
            *_blocks(decoder_blocks[1], width),
            nn.ConvTranspose2d(width, width, coarse, coarse),
            *_blocks(decoder_blocks[0], width),
            _silent_convolution(width, in_channels * FINE**2),
            nn.PixelShuffle(FINE),
        )

    @torch.no_grad()
    def set_components(self, pixels: torch.Tensor) -> None:
        r"""
        Make W the leading principal components of the patches of ``pixels``.

        A component of deviation s_k in the data has ``√(s_k / mean s)`` in the latents: half whitened, so that fine detail
        counts less than colour and shape, and the channels together have unit variance.

        Args:
            pixels: (batch, channels, height, width) in [-1, 1].
        """
        side = self.project.kernel_size[0]
        mean = pixels.mean((0, 2, 3), keepdim=True)
        patches = F.pixel_unshuffle((pixels - mean).contiguous(), side).flatten(2).transpose(1, 2).flatten(0, 1).double()
        values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
        count = self.config.latent_channels
        deviations, components = values[-count:].flip(0).sqrt(), vectors[:, -count:].flip(1).T
        scale = (deviations * deviations.mean()).rsqrt()[:, None]
        shape, weight = self.project.weight.shape, components * scale
        into, back = (weight.reshape(shape), (components / scale).reshape(shape))
        state = {"weight": into, "bias": -(into * mean).sum((1, 2, 3))}, {"weight": back, "bias": mean.flatten()}
        for layer, values in zip((self.project, self.unproject), state):
            layer.load_state_dict(values)

    def encode(self, x: torch.Tensor, return_dict: bool = True) -> AutoencoderTinyOutput | tuple[torch.Tensor]:
        """Latents (batch, latent_channels, height / side, width / side) of pictures in [-1, 1]."""
        latents = self.project(x) + self.encoder(x)
        return AutoencoderTinyOutput(latents=latents) if return_dict else (latents,)

    def decode(
        self, z: torch.Tensor, return_dict: bool = True, generator: object = None
    ) -> DecoderOutput | tuple[torch.Tensor]:
        """Pictures around [-1, 1] of latents; ``generator`` is there for Diffusers' pipelines, nothing is drawn."""
        pixels = self.unproject(z) + self.decoder(z)
        return DecoderOutput(sample=pixels) if return_dict else (pixels,)

    def forward(self, sample: torch.Tensor, return_dict: bool = True) -> DecoderOutput | tuple[torch.Tensor]:
        """Pictures, decoded from their latents."""
        return self.decode(*self.encode(sample, return_dict=False), return_dict=return_dict)


def _blocks(count: int, width: int) -> list[nn.Module]:
    return [AutoencoderTinyBlock(width, width, "relu") for _ in range(count)]


def _silent_convolution(inputs: int, outputs: int) -> nn.Conv2d:
    """Zero at first."""
    layer = nn.Conv2d(inputs, outputs, 3, padding=1)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(torch.as_tensor(layer.bias))
    return layer
