"""How often a prompt yields its own picture, and how near the training pictures the results are.

    python -m atlas_diffusers.metrics.retrieval
    python -m atlas_diffusers.metrics.retrieval --pipeline outputs/atlas-emoji/pipeline --prompts 128 --seed 1
"""

import argparse
import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..pretrained import load_emoji, pretrained_path
from .nearest import nearest_neighbours
from .script import measure_parser, run_measure


@dataclass(frozen=True)
class Retrieval:
    """``hits`` of ``prompts`` pictures are nearest to their own training picture; distances are RMS in [0, 1]."""

    prompts: int
    hits: int
    generated_distances: torch.Tensor
    held_out_distances: torch.Tensor

    @property
    def accuracy(self) -> float:
        """Share of prompts whose picture is nearest."""
        return self.hits / self.prompts


def to_tensor(images: Any) -> torch.Tensor:
    """PIL pictures as ``(n, 3, height, width)`` in [0, 1]."""
    return torch.stack([torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) for image in images]) / 255


def training_categories(folder: Path) -> list[str] | None:
    """Emoji categories that the pipeline in ``folder`` was trained on, from its recipe."""
    recipe = folder / "recipe.json"
    if not recipe.is_file():
        raise OSError(f"{folder} has no recipe.json, so its training pictures are unknown")
    return json.loads(recipe.read_text())["dataset"]["categories"]


def measure_retrieval(pipeline: Any, categories: list[str] | None, prompts: int = 64, seed: int = 0, **call: Any) -> Retrieval:
    """
    Generate ``prompts`` training captions, drawn without replacement, and find each result's nearest training picture.

    Args:
        pipeline: an ``AtlasPipeline`` trained on the embedded emoji of ``categories``.
        prompts: number of captions.
        seed: of the choice of captions; picture i uses seed + i.
        call: further arguments of the pipeline call.
    """
    train, test = load_emoji("train", categories), load_emoji("test", categories)
    if not 1 <= prompts <= len(train):
        raise ValueError(f"prompts={prompts}; expected 1 to {len(train)}, the number of training pictures")
    chosen = sorted(random.Random(seed).sample(range(len(train)), prompts))
    texts = [train[i]["text"] for i in chosen]
    generators = [torch.Generator().manual_seed(seed + i) for i in range(prompts)]
    images = pipeline(texts, generator=generators, **call).images
    references = to_tensor(train["image"])
    distances, nearest = nearest_neighbours(to_tensor(images), references)
    held_out, _ = nearest_neighbours(to_tensor(test["image"]), references)
    hits = sum(index == i for index, i in zip(nearest.tolist(), chosen))
    return Retrieval(prompts, hits, distances, held_out)


def main() -> int:
    parser = measure_parser(__doc__)
    parser.add_argument("--pipeline", default="atlas-emoji", help="embedded name or folder")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--guidance", type=float, help="guidance scale (default: the pipeline's)")
    return run_measure("retrieval", parser, _measure)


def _measure(args: argparse.Namespace) -> None:
    from ..pipelines import AtlasPipeline

    pipeline = AtlasPipeline.from_pretrained(args.pipeline)
    folder = pretrained_path(args.pipeline) or Path(args.pipeline)
    categories = training_categories(folder)
    result = measure_retrieval(pipeline, categories, args.prompts, args.seed, guidance_scale=args.guidance)
    print(f"nearest training picture is the prompted one: {result.hits} of {result.prompts} ({result.accuracy:.1%})")
    for name, values in (("generated", result.generated_distances), ("held-out", result.held_out_distances)):
        low, middle, high = values.quantile(torch.tensor([0.1, 0.5, 0.9]).double()).tolist()
        print(f"RMS distance to the nearest training picture, {name}: median {middle:.3f} (10% {low:.3f}, 90% {high:.3f})")


if __name__ == "__main__":
    sys.exit(main())
