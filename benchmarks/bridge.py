"""
What the Schrödinger-bridge step is worth: ``python benchmarks/bridge.py [--parts digits emoji] [--seeds 0 1 2]``.

digits: the 8x8 digits of scikit-learn, an exact denoiser (one Gaussian a class) and the same with class weights off by up to
five times, 20 steps of DPM-Solver++(2M); half of the pictures make the network and, 450 of them, the references, the other
half is the truth.

emoji: 256 unprompted samples of the embedded pipeline, with the schedulers of Diffusers and with the bridge. Half of the
network's 418 training pictures are the references, the other half is the truth, so a copied reference earns nothing. All rows
start from the same noise. KID and coverage are those of EfficientNet-Lite0 features; category error is the total variation
between the categories of the nearest training pictures and those of the references; distances are root mean squares a pixel in
[0, 1], medians over samples. Everything is averaged over seeds.
"""

import argparse
import importlib.util
import math
import statistics
import sys
from pathlib import Path

import diffusers
import torch
from torch.nn.functional import avg_pool2d

from atlas_diffusers import AtlasPipeline, load_emoji
from atlas_diffusers.bridges import SchrodingerBridgeSolver
from atlas_diffusers.metrics import efficientnet_features, kid, manifold_overlap
from atlas_diffusers.pictures.plots_bridge import level

DIGITS_HEADER = "network | bridged steps | network calls | sliced W2 | class error (TV) | nearest reference / held-out"
EMOJI_HEADER = "sampler | bridge | network calls | KID | coverage | category error (TV) | nearest training | nearest reference"
CATEGORIES = ["Smileys & Emotion", "Animals & Nature", "Food & Drink"]
SCHEDULERS = ["DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"]
BRIDGED = "DPMSolverMultistepScheduler"


def print_header(header: str) -> None:
    print(f"| {header} |\n{'|---' * header.count('|')}|---|")


def run_digits() -> None:
    path = Path(__file__).parents[1] / "tests" / "solvers"
    sys.path[:0] = [str(path), str(path.parent)]
    specification = importlib.util.spec_from_file_location("bridge_digits", path / "test_bridge_digits.py")
    digits = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(digits)
    pictures, _, truth, *_ = digits.data()
    print_header(DIGITS_HEADER)
    for name, weights in (("exact", None), ("biased", digits.BIASED)):
        network = digits.ClassMixture(weights)
        for bridged in (0, 6, 10, 12, 14, 16, 18):
            x, calls = digits.sample(network, bridged)
            near, held_out = (torch.cdist(x, y).amin(1).mean().item() for y in (pictures[:450], truth[:450]))
            distance, error = digits.sliced_wasserstein(x, truth), digits.class_error(x)
            print(f"| {name} | {bridged} | {calls} | {distance:.3f} | {error:.3f} | {near:.2f} / {held_out:.2f} |")


class Emoji:
    """The pictures, split in references and truth, and the measures against them."""

    def __init__(self, size: int):
        data = load_emoji("train", CATEGORIES)
        self.pipeline = AtlasPipeline.from_pretrained("atlas-emoji")
        self.pipeline.set_progress_bar_config(disable=True)
        self.process = self.pipeline.scheduler.config
        pictures = [image.convert("RGB") for image in data["image"]]
        self.pictures = self.pipeline.image_processor.preprocess(pictures, 32, 32)
        self.categories = torch.tensor([CATEGORIES.index(name) for name in data["category"]])
        order = torch.randperm(len(self.pictures), generator=torch.Generator().manual_seed(0))
        self.of_references, of_truth = order.chunk(2)
        self.references, self.truth, self.size = self.pictures[self.of_references], self.pictures[of_truth], size
        self.truth_features = self.features(self.truth)

    def features(self, pictures: torch.Tensor) -> torch.Tensor:
        return efficientnet_features((pictures / 2 + 0.5).clamp(0, 1), size=self.size)

    def sample(self, scheduler: str, steps: int, noise: torch.Tensor, bridge: dict | None):
        self.pipeline.scheduler = getattr(diffusers, scheduler).from_config(self.process)
        options = {} if bridge is None else {"references": self.references, "bridge": bridge}
        options |= {"num_inference_steps": steps, "guidance_scale": 1.0, "network_batch_size": 32, "output_type": "pt"}
        output = self.pipeline([""] * len(noise), latents=noise.clone(), **options)
        return output.images * 2 - 1, output.bridge

    def measure(self, pictures: torch.Tensor) -> list[float]:
        """KID and its standard error, coverage, category error, distances to the nearest training picture and reference."""
        features = self.features(pictures)
        distance, overlap = kid(features, self.truth_features), manifold_overlap(self.truth_features, features)
        distances = torch.cdist(pictures.flatten(1), self.pictures.flatten(1)) / (2 * math.sqrt(pictures[0].numel()))
        nearest, of_references = distances.min(1), distances[:, self.of_references].amin(1)
        found, wanted = (
            torch.bincount(categories, minlength=len(CATEGORIES)) / len(categories)
            for categories in (self.categories[nearest.indices], self.categories[self.of_references])
        )
        error = (found - wanted).abs().sum().item() / 2
        medians = nearest.values.median().item(), of_references.median().item()
        return [distance.mean, distance.standard_error, overlap.coverage, error, *medians]


def row(measures: list[list[float]]) -> str:
    """Means over seeds."""
    kid_mean, kid_error, coverage, category, nearest, reference = map(statistics.fmean, zip(*measures))
    kid_error /= math.sqrt(len(measures))
    return f"{kid_mean:.3f} ± {kid_error:.3f} | {coverage:.3f} | {category:.3f} | {nearest:.4f} | {reference:.4f}"


def settings_of(calls: list[int]) -> list[tuple[str, int, dict | None]]:
    """Every scheduler at these network calls, then the bridge with a quarter fewer, then the network's own limit."""
    settings = [(scheduler, steps, None) for steps in calls for scheduler in SCHEDULERS]
    for steps in calls:
        fewer = math.floor(0.75 * steps)
        settings += [(BRIDGED, fewer, {"gate": gate, "steps": 4}) for gate in (10.0, 7.0, 5.0)]
        settings += [(BRIDGED, steps, {"gate": 3.0, "mode": "correct"})]
    return [*settings, ("UniPCMultistepScheduler", 50, None)]


def print_reach(emoji: Emoji) -> None:
    """Effective references of pictures that are averaged down, and the category error of 256 independent draws."""
    alpha, sigma = level(-1.86)
    for size in (32, 16, 8, 4):
        pooled = avg_pool2d(emoji.references, 32 // size) * (32 // size)
        reach = SchrodingerBridgeSolver(pooled).posterior_size(alpha, sigma)
        print(f"effective references at log(α/σ) = -1.86 in {size}x{size} pixels: {reach:.0f}")
    shares = torch.bincount(emoji.categories[emoji.of_references]) / len(emoji.of_references)
    draws = torch.distributions.Multinomial(256, shares)
    with torch.random.fork_rng():
        errors = (draws.sample((4000,)) / 256 - shares).abs().sum(1) / 2
    print(f"category error of 256 independent draws: {errors.mean():.3f}\n")


def run_emoji(count: int, seeds: list[int], size: int, calls: list[int]) -> None:
    emoji = Emoji(size)
    noises = [torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    print_reach(emoji)
    print_header(EMOJI_HEADER)
    print(f"| the references themselves | | | {row([emoji.measure(emoji.references)])} |")
    for scheduler, steps, bridge in settings_of(calls):
        measures, used = [], steps
        for noise in noises:
            pictures, report = emoji.sample(scheduler, steps, noise, bridge)
            measures.append(emoji.measure(pictures))
            used = steps if report is None else report.network_calls
        how = "" if bridge is None else ", ".join(f"{name} {value}" for name, value in bridge.items())
        print(f"| {scheduler.removesuffix('Scheduler')} | {how} | {used:g} | {row(measures)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="*", default=["digits", "emoji"], choices=["digits", "emoji"])
    parser.add_argument("--count", type=int, default=256, help="emoji: samples a row")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2], help="emoji: of the noise")
    parser.add_argument("--size", type=int, default=224, help="emoji: pixels that the features are computed at")
    parser.add_argument("--calls", type=int, nargs="*", default=[6, 10, 20], help="emoji: network calls without the bridge")
    arguments = parser.parse_args()
    diffusers.logging.set_verbosity_error()
    if "digits" in arguments.parts:
        run_digits()
    if "emoji" in arguments.parts:
        run_emoji(arguments.count, arguments.seeds, arguments.size, arguments.calls)


if __name__ == "__main__":
    main()
