"""Train a small autoencoder on the embedded pictograms, for the latents of a recipe's `vae`.

    python training/train_autoencoder.py outputs/pictograms-vae
    python training/train_autoencoder.py outputs/pictograms-vae-2 --start outputs/pictograms-vae --freeze-encoder

Pictures of 64x64 become 8x8 latents, at first the principal components of patches. With `--freeze-encoder` only the decoder
learns, so that a network trained on the latents stays valid.
"""

import argparse
import math
import sys
from pathlib import Path

import numpy as np
import torch

from atlas_diffusers import AtlasAutoencoder
from atlas_diffusers.pretrained import load_pictograms

COMPONENTS_OF = 2000


def autoencoder_loss(
    vae: AtlasAutoencoder, pixels: torch.Tensor, deviations: torch.Tensor, latent_noise: float, generator: torch.Generator
) -> torch.Tensor:
    """
    ``|r| + 2 r² + mean_c (mean_c² + (deviation_c − d_c)²)/10`` with r = x − D(z + s ε) and z = E(x): the last term keeps the
    moments of the latents, the noise makes pictures bear small errors of the network that draws them.

    Args:
        pixels: (batch, 3, 64, 64) in [-1, 1].
        deviations: d, of the latents' channels at the start.
        latent_noise: s.
    """
    latents = vae.encode(pixels).latents.float()
    noise = torch.randn(latents.shape, generator=generator)
    error = vae.decode(latents + latent_noise * noise).sample.float() - pixels
    moments = latents.mean((0, 2, 3)).square() + (latents.std((0, 2, 3)) - deviations).square()
    return error.abs().mean() + 2 * error.square().mean() + moments.mean() / 10


def psnr(vae: AtlasAutoencoder, pixels: torch.Tensor) -> float:
    """Peak signal-to-noise ratio of reconstructions, in dB."""
    with torch.no_grad():
        decoded = torch.cat([vae.decode(vae.encode(part).latents).sample for part in pixels.split(64)])
    return -10 * math.log10((decoded.clamp(-1, 1) - pixels).square().mean().item() / 4)


def pictures(split: str, limit: int | None = None) -> torch.Tensor:
    """(count, 3, 64, 64) bytes."""
    data = load_pictograms(split)
    chosen = range(len(data)) if limit is None else range(0, len(data), max(1, len(data) // limit))
    return torch.stack([torch.from_numpy(np.array(data[i]["image"])).permute(2, 0, 1) for i in chosen])


def to_pixels(images: torch.Tensor) -> torch.Tensor:
    """Bytes as numbers in [-1, 1], channels last."""
    return (images.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def train(args: argparse.Namespace) -> None:
    """Run ``args.steps`` steps of AdamW, printing the quality on held-out things, and save the autoencoder."""
    torch.manual_seed(args.seed)
    vae = AtlasAutoencoder.from_pretrained(args.start) if args.start else AtlasAutoencoder(latent_channels=args.channels)
    images, held_out = pictures("train"), to_pixels(pictures("held_out_things"))
    sample = to_pixels(images[:: len(images) // COMPONENTS_OF])
    if not args.start:
        vae.set_components(sample)
    with torch.no_grad():
        deviations = vae.encode(sample).latents.std((0, 2, 3))
    for part in (vae.project, vae.encoder):
        part.requires_grad_(not args.freeze_encoder)
    print(f"start: held-out PSNR {psnr(vae, held_out):.2f} dB", flush=True)
    if not args.steps:
        return
    generator = torch.Generator().manual_seed(args.seed)
    optimizer = torch.optim.AdamW([p for p in vae.parameters() if p.requires_grad], lr=args.learning_rate, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, args.steps, pct_start=0.05)
    running = []
    for step in range(1, args.steps + 1):
        chosen = torch.randint(len(images), (args.batch_size,), generator=generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            loss = autoencoder_loss(vae, to_pixels(images[chosen]), deviations, args.latent_noise, generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        running.append(loss.item())
        if step % args.log_interval == 0 or step == args.steps:
            loss, quality = sum(running) / len(running), psnr(vae, held_out)
            print(f"step {step}: loss {loss:.4f}, held-out PSNR {quality:.2f} dB", flush=True)
            running.clear()
            vae.save_pretrained(args.output)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder of the autoencoder")
    parser.add_argument("--start", type=Path, help="autoencoder to go on from")
    parser.add_argument("--freeze-encoder", action="store_true", help="train the decoder only")
    parser.add_argument("--channels", type=int, default=16, help="of the latents (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=5000, help="0 only measures (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--latent-noise", type=float, default=0.1, help="of unit deviation (default: %(default)s)")
    parser.add_argument("--bf16", action="store_true", help="convolutions in bfloat16")
    parser.add_argument("--log-interval", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.freeze_encoder and args.start is None:
        parser.error("--freeze-encoder needs --start, the autoencoder whose encoder stays")
    train(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
