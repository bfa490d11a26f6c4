"""
Few steps on a real network: ``python benchmarks/few_step_emoji.py``.

The embedded emoji pipeline, prompted with captions it was not calibrated on, at 4, 5, 6, 8 and 10 network calls: the
distance to its own 100-step solution from the same noise (mean over samples of the RMS over values in [-1, 1]), for
Diffusers' multistep schedulers and DDIM on their useful grids and for the few-step solver, plain and calibrated, with
clipping off everywhere; and KID of EfficientNet-Lite0 features to all 418 training pictures, in brackets. ``--guidance-
scale`` measures the tables, which were made for 1, at another scale; ``--recalibrate`` makes new ones for it.
"""

import argparse
import random
import warnings

import diffusers
import torch

from atlas_diffusers import AtlasMultistepScheduler, AtlasPipeline, load_emoji
from atlas_diffusers.metrics import efficientnet_features, kid

CATEGORIES = ["Smileys & Emotion", "Animals & Nature", "Food & Drink"]
PEERS = {
    "DDIM": ("DDIMScheduler", {}),
    "UniPC": ("UniPCMultistepScheduler", {}),
    "UniPC, Karras": ("UniPCMultistepScheduler", {"use_karras_sigmas": True}),
    "UniPC, order 3": ("UniPCMultistepScheduler", {"solver_order": 3}),
    "DPM++(2M)": ("DPMSolverMultistepScheduler", {}),
    "DPM++(2M), Karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "DPM++(2M), log-SNR": ("DPMSolverMultistepScheduler", {"use_lu_lambdas": True}),
    "DPM++(3M)": ("DPMSolverMultistepScheduler", {"solver_order": 3}),
    "DEIS": ("DEISMultistepScheduler", {}),
}
OURS = ("plain", "calibrated")


def captions() -> tuple[list[str], list[str]]:
    """The 48 training captions that the embedded tables were made with, and all others."""
    texts = list(load_emoji("train", CATEGORIES)["text"])
    random.Random(0).shuffle(texts)
    return texts[:48], texts[48:]


class Run:
    """One prompt batch of the embedded pipeline, sampled by any scheduler."""

    def __init__(self, count: int, guidance_scale: float):
        self.pipeline = AtlasPipeline.from_pretrained("atlas-emoji")
        self.pipeline.set_progress_bar_config(disable=True)
        self.calibrated = self.pipeline.scheduler
        self.process = {**self.calibrated.config, "calibration": None}
        self.prompts, self.guidance_scale = captions()[1][:count], guidance_scale
        self.noise = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(777))

    def recalibrate(self) -> None:
        self.calibrated = AtlasMultistepScheduler.calibrate(
            self.pipeline, (4, 5, 6, 8, 10), config=self.process, prompts=captions()[0], guidance_scale=self.guidance_scale,
            generator=torch.Generator().manual_seed(0), batch_size=48,
        )  # fmt: skip
        print(f"calibrated for guidance {self.guidance_scale:g}: {self.calibrated.calibration_report}\n")

    def scheduler(self, name: str):
        if name in OURS:
            return self.calibrated if name == "calibrated" else AtlasMultistepScheduler.from_config(self.process)
        cls, options = PEERS[name]
        return getattr(diffusers, cls).from_config(self.process, **options)

    def __call__(self, name: str, steps: int) -> torch.Tensor:
        self.pipeline.scheduler = self.scheduler(name)
        options = {"num_inference_steps": steps, "guidance_scale": self.guidance_scale, "network_batch_size": 32}
        return self.pipeline(self.prompts, latents=self.noise.clone(), output_type="latent", **options).images


def features(samples: torch.Tensor) -> torch.Tensor:
    return efficientnet_features((samples / 2 + 0.5).clamp(0, 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=128)
    parser.add_argument("--calls", type=int, nargs="*", default=[4, 5, 6, 8, 10])
    parser.add_argument("--guidance-scale", type=float, default=1.0)
    parser.add_argument("--recalibrate", action="store_true")
    parser.add_argument("--no-kid", action="store_true")
    arguments = parser.parse_args()
    diffusers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", message=".*__array__.*")
    run = Run(arguments.count, arguments.guidance_scale)
    if arguments.recalibrate:
        run.recalibrate()
    process = run.pipeline.image_processor
    pictures = [image.convert("RGB") for image in load_emoji("train", CATEGORIES)["image"]]
    truth = None if arguments.no_kid else features(process.preprocess(pictures, 32, 32))
    fine = run("plain", 100)
    names, ratios = [*PEERS, *OURS], {name: [] for name in OURS}
    if truth is not None:
        print(f"KID of the 100-step solution: {kid(features(fine), truth).mean:.4f}\n")
    columns = ["calls", *names, *(f"{name} / best peer" for name in OURS)]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for steps in arguments.calls:
        samples = {name: run(name, steps) for name in names}
        errors = {name: (x - fine).flatten(1).square().mean(1).sqrt().mean().item() for name, x in samples.items()}
        for name, found in ratios.items():
            found.append(errors[name] / min(errors[peer] for peer in PEERS))
        cells = [f"{error:.4f}" for error in errors.values()]
        if truth is not None:
            cells = [f"{cell} ({kid(features(samples[name]), truth).mean:.4f})" for name, cell in zip(names, cells)]
        print(f"| {steps} | {' | '.join(cells)} | {' | '.join(f'{found[-1]:.2f}' for found in ratios.values())} |", flush=True)
    for name, found in ratios.items():
        print(f"{name} / best peer, geometric mean: {torch.tensor(found).log().mean().exp():.3f}")


if __name__ == "__main__":
    main()
