"""Langevin correctors: python benchmarks/correctors.py

Energy distance of 4,000 samples to a mixture of three Gaussians in the plane, with its exact noise prediction, at equal numbers
of predictor steps; every corrector step costs a network call. The distance of two sets of data is the floor.
"""

import argparse

import torch

import atlas_diffusers
from atlas_diffusers import AtlasPipeline, AtlasUNet2DModel
from atlas_diffusers.metrics import energy_distance

MEANS, WIDTH, COUNT = torch.tensor([[-0.8, 0.3], [0.5, 0.7], [0.6, -0.6]]), 0.12, 4000
SAMPLERS = ("DDIM", "DDPM", "EulerAncestral", "Heun", "Multistep")


def data(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return MEANS[torch.randint(3, (COUNT,), generator=generator)] + WIDTH * torch.randn(COUNT, 2, generator=generator)


def pipeline_of(scheduler) -> AtlasPipeline:
    """Its network is the exact noise prediction."""
    small = {"base_channels": 8, "channel_mult": (1,), "attention_levels": (), "num_heads": 2, "norm_num_groups": 4}
    unet = AtlasUNet2DModel(sample_size=1, in_channels=2, out_channels=2, **small)
    process = type(scheduler).from_config(scheduler.config)

    def predict(x, t, **kwargs):
        alpha, sigma = (level.item() for level in process.levels_at(t.reshape(1), x.double()))
        variance = alpha**2 * WIDTH**2 + sigma**2
        offset = x.flatten(1).double()[:, None] - alpha * MEANS.double()
        weights = torch.softmax(-offset.square().sum(-1) / (2 * variance), 1)
        return ((sigma / variance * (weights[..., None] * offset).sum(1)).to(x).reshape(x.shape),)

    unet.forward = predict
    pipeline = AtlasPipeline(unet, scheduler, default_guidance_scale=1.0)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--corrector-steps", type=int, nargs="*", default=[0, 1, 3])
    parser.add_argument("--snr", type=float, default=0.16)
    args = parser.parse_args()
    target = data(1)
    print(f"two sets of data: {energy_distance(data(2), target):.4f}\n")
    print("| sampler | " + " | ".join(f"{n} corrector steps" for n in args.corrector_steps) + " |")
    print("|---" * (1 + len(args.corrector_steps)) + "|")
    for name in SAMPLERS:
        found = []
        for corrector_steps in args.corrector_steps:
            pipeline = pipeline_of(getattr(atlas_diffusers, f"Atlas{name}Scheduler")(timestep_spacing="trailing"))
            samples = pipeline(
                num_images_per_prompt=COUNT, num_inference_steps=args.steps, corrector_steps=corrector_steps,
                corrector_snr=args.snr, generator=torch.Generator().manual_seed(0), output_type="latent",
            ).images.flatten(1)  # fmt: skip
            found.append(f"{energy_distance(samples, target):.4f}")
        print(f"| {name} | " + " | ".join(found) + " |")


if __name__ == "__main__":
    main()
