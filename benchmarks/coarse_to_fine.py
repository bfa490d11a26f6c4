"""Coarse-to-fine sampling beside plain sampling: python benchmarks/coarse_to_fine.py FOLDER

FOLDER is a pipeline whose network was trained with `num_resolutions: 2`, such as that of training/recipes/emoji-two-sizes.yaml.
For each seed both make pictures of the same captions of the embedded emoji, in turns, with the same number of steps; KID (of
EfficientNet-Lite0 features) is to the pictures of the data.
"""

import argparse
import statistics
import time

import torch

from atlas_diffusers import AtlasPipeline
from atlas_diffusers.config import DatasetConfig
from atlas_diffusers.metrics import efficientnet_features, kid
from atlas_diffusers.training import PictureDataset, load_training_data

CATEGORIES = ["Smileys & Emotion", "Animals & Nature", "Food & Drink"]


class Clock:
    """Seconds inside the network."""

    def __init__(self, unet):
        self.seconds, self.forward = 0.0, unet.forward
        unet.forward = self

    def __call__(self, *args, **kwargs):
        start = time.perf_counter()
        result = self.forward(*args, **kwargs)
        self.seconds += time.perf_counter() - start
        return result


def generate(pipeline, texts, steps, guidance, seed, batch, hierarchical):
    pictures = []
    for first in range(0, len(texts), batch):
        part = texts[first : first + batch]
        generators = [torch.Generator().manual_seed(100_000 * seed + first + i) for i in range(len(part))]
        pictures.append(pipeline(
            part, num_inference_steps=steps, guidance_scale=guidance, generator=generators, hierarchical=hierarchical,
            output_type="pt",
        ).images)  # fmt: skip
    return torch.cat(pictures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--count", type=int, default=192)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance-scale", type=float, default=1.0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=32)
    args = parser.parse_args()
    torch.set_num_threads(1)
    config = DatasetConfig(categories=CATEGORIES)
    data = PictureDataset(load_training_data(config), config)
    items = [data[i, 0] for i in range(len(data))]
    real = efficientnet_features(torch.stack([item["pixels"] for item in items]) / 2 + 0.5)
    pipeline = AtlasPipeline.from_pretrained(args.folder)
    pipeline.set_progress_bar_config(disable=True)
    clock, found = Clock(pipeline.unet), {False: [], True: []}
    for seed in range(args.seeds):
        order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed))[: args.count].tolist()
        texts = [items[i]["text"] for i in order]
        for hierarchical in (False, True):
            clock.seconds = 0.0
            pictures = generate(pipeline, texts, args.steps, args.guidance_scale, seed, args.batch, hierarchical)
            found[hierarchical].append((clock.seconds, kid(efficientnet_features(pictures), real).mean))
    print("| sampling | network seconds (median) | KID of each seed |\n|---|---|---|")
    for hierarchical, rows in found.items():
        seconds = statistics.median(row[0] for row in rows)
        print(f"| {'coarse to fine' if hierarchical else 'plain'} | {seconds:.1f} | {', '.join(f'{k:.4f}' for _, k in rows)} |")
    ratio = statistics.median(b[0] / a[0] for a, b in zip(found[False], found[True]))
    print(f"network time saved: {100 * (1 - ratio):.0f}%")


if __name__ == "__main__":
    main()
