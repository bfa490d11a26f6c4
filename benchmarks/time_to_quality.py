"""
CPU seconds of training to one quality, by network, optimiser and objective: ``python benchmarks/time_to_quality.py``.

All learn the embedded digits (8x8, no labels, batch 64) on one thread: a UNet and a transformer whose steps cost about as much,
AdamW and Muon, epsilon, v and flow, each at the best of a few constant learning rates. Objectives have losses of their own, so
quality is one number for all: on the held-out digits and by averaged weights, the mean square of the error of the data
prediction, weighted by min(SNR, 5) (arXiv 2303.09556), over noise angles arctan(σ/α) evenly spaced in (0, π/2). The goal is
what AdamW on epsilon with the UNet, today's recipes, comes to in the end. Evaluations are not in the seconds.
"""

import argparse
import itertools
import math
import tempfile
import time

import torch

from atlas_diffusers.config import TrainingConfig
from atlas_diffusers.pretrained import load_digits
from atlas_diffusers.training import Trainer

NETWORKS = {
    "UNet": {
        "_class_name": "AtlasUNet2DModel", "base_channels": 32, "channel_mult": [1, 2], "num_res_blocks": 1,
        "attention_levels": [1], "num_heads": 4, "norm_num_groups": 8,
    },
    "transformer": {"_class_name": "AtlasTransformer2DModel", "width": 96, "num_layers": 4, "num_heads": 4, "patch_size": 2},
}  # fmt: skip
OBJECTIVES = {
    "epsilon": {"objective": "denoising"},
    "v": {"objective": "denoising", "scheduler": {"_class_name": "AtlasDDIMScheduler", "prediction_type": "v_prediction"}},
    "flow": {"objective": "flow_matching"},
}
OPTIMIZERS, RATES, ANGLES, LARGEST_SNR = ("adamw", "muon"), (1e-3, 3e-3), 8, 5.0
BASE = ("UNet", "adamw", "epsilon")


def held_out() -> torch.Tensor:
    pixels = [torch.tensor(list(image.tobytes())).view(1, 8, 8) for image in load_digits("test")["image"]]
    return torch.stack(pixels) / 127.5 - 1


@torch.no_grad()
def held_out_error(run: Trainer, data: torch.Tensor) -> float:
    """Weighted mean square over pixels, digits and noise angles."""
    generator, scheduler, total = torch.Generator().manual_seed(0), run.objective.scheduler, 0.0
    with run.averaged() as networks:
        for k in range(ANGLES):
            sigma_hat = math.tan((k + 0.5) / ANGLES * math.pi / 2)
            level = scheduler.process.from_sigma_hat(sigma_hat)
            x = level.alpha * data + level.sigma * torch.randn(data.shape, generator=generator)
            timesteps = torch.full((len(data),), float(scheduler.process.timesteps_of([level])[0]))
            found = scheduler.predict_data(networks["unet"](x, timesteps).sample, x, level)
            total += (found - data).square().mean().item() * min(sigma_hat**-2, LARGEST_SNR)
    return total / ANGLES


def curve(network: str, optimizer: str, objective: str, rate: float, steps: int, every: int) -> list[tuple[float, float]]:
    """CPU seconds and held-out error, every so many steps."""
    data, seconds, found = held_out(), 0.0, []
    with tempfile.TemporaryDirectory() as folder:
        run = Trainer(TrainingConfig(
            output_dir=folder, max_steps=steps, batch_size=64, optimizer=optimizer, learning_rate=rate, warmup_steps=50,
            lr_scheduler="constant_with_warmup", ema_decay=0.99, text_encoder=None, model=NETWORKS[network],
            dataset={"name": "embedded:digits", "split": "train", "channels": 1, "resolution": 8, "caption_column": None},
            **OBJECTIVES[objective],
        ), cpu=True)  # fmt: skip
        batches = iter(run._loader())
        while run.step < steps:
            start = time.process_time()
            for _ in range(every):
                run._optimizer_step(batches)
                run.step += 1
            seconds += time.process_time() - start
            found.append((seconds, held_out_error(run, data)))
    return found


def seconds_to(goal: float, points: list[tuple[float, float]]) -> float:
    """Where a curve first comes to an error, between its points; infinity where it does not."""
    for (before, above), (after, below) in itertools.pairwise(points):
        if below <= goal:
            return before + (after - before) * (above - goal) / (above - below) if above > goal else before
    return math.inf


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--every", type=int, default=25, help="steps between evaluations")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    args = parser.parse_args()
    torch.set_num_threads(1)
    goal = base = math.nan
    for cell in itertools.product(NETWORKS, OPTIMIZERS, OBJECTIVES):
        curves = {rate: curve(*cell, rate, args.steps, args.every) for rate in args.rates}
        if cell == BASE:
            goal = min(points[-1][1] for points in curves.values())
            print(f"| network | optimiser | objective | learning rate | s to {goal:.4f} | ratio | error at the end | s |")
            print("|---" * 8 + "|")
        seconds = {rate: seconds_to(goal, points) for rate, points in curves.items()}
        rate = min(seconds, key=lambda r: (seconds[r], curves[r][-1][1]))  # noqa: B023
        base = seconds[rate] if cell == BASE else base
        reached = f"{seconds[rate]:.1f} | {base / seconds[rate]:.2f}" if math.isfinite(seconds[rate]) else " | "
        last, error = curves[rate][-1]
        print(f"| {' | '.join(cell)} | {rate:g} | {reached} | {error:.4f} | {last:.1f} |", flush=True)


if __name__ == "__main__":
    main()
