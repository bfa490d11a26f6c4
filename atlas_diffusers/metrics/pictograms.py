"""Whether a pipeline draws the things and styles that it is asked for, and things in styles that it has not seen them in.

    python -m atlas_diffusers.metrics.pictograms
    python -m atlas_diffusers.metrics.pictograms --pipeline outputs/pictograms/pipeline --features features.safetensors
"""

import argparse
import json
import random
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ..pretrained import pretrained_path
from ..pretrained.pictogram_data import STYLES, load_pictograms, with_article
from .features import efficientnet_features
from .kid import kid
from .manifold import manifold_overlap
from .pictogram_card import card
from .script import measure_parser, quiet, run_measure

WORDINGS = ("{n}", "a {n}", "a {o}", "a picture of a {n}", "{n} emoji")  # n: a name, o: another name of the same thing
BATCH = 64
Draw = Callable[[list[str], int], Sequence[Image.Image]]


class PictogramBank:
    """
    Features of every real pictogram, in which generated ones are looked up.

    Args:
        cache: a safetensors file that keeps the features (two minutes on two cores); written where it is not there.
        features: maps PIL pictures to ``(n, d)``.
    """

    def __init__(self, cache: Path | None = None, features: Callable[..., torch.Tensor] = efficientnet_features):
        data = load_pictograms()
        self.of, self.names, self.styles = features, list(data["name"]), list(data["style"])
        self.splits, self.categories = list(data["split"]), list(data["category"])
        self.other_names = dict(zip(self.names, data["names"]))
        if cache is not None and cache.is_file():
            self.features = load_file(cache)["features"]
        else:
            self.features = torch.cat([features(data[i : i + BATCH]["image"]) for i in range(0, len(data), BATCH)])
            if cache is not None:
                save_file({"features": self.features}, cache)
        if len(self.features) != len(self.names):
            raise ValueError(f"{cache} has features of {len(self.features)} pictures; the pictograms are {len(self.names)}")

    def rows(self, split: str, style: str | None = None) -> list[int]:
        """Indices of the drawings of a split, and of one style."""
        return [i for i, s in enumerate(self.splits) if s == split and style in (None, self.styles[i])]

    def nearest(self, features: torch.Tensor, rows: Sequence[int] | None = None) -> tuple[torch.Tensor, list[int]]:
        """Distance to the nearest drawing among ``rows`` (all by default), and its index, for each of ``features``."""
        rows = range(len(self.names)) if rows is None else rows
        distances, index = torch.cdist(features, self.features[list(rows)]).min(1)
        return distances, [rows[i] for i in index.tolist()]

    def spread(self, style: str) -> float:
        """Median distance between the training drawings of different things in one style."""
        features = self.features[self.rows("train", style)]
        return torch.pdist(features[:: max(1, len(features) // 400)]).median().item()


@dataclass(frozen=True)
class Recognition:
    """
    Shares of generated pictures whose nearest real one is the thing, and is of the style, that was asked for.

    ``copied``: share whose nearest training drawing of that style is another thing closer than half the distance that is
    usual between things. ``nearest_training``, ``nearest_held_out``: median distance to the training drawings of the style, of
    the generated pictures and of real held-out ones.
    """

    prompts: int
    thing: float
    style: float
    copied: float
    nearest_training: float
    nearest_held_out: float


def measure_recognition(draw: Draw, bank: PictogramBank, split: str, prompts: int, seed: int = 0) -> Recognition:
    """
    Ask for ``prompts`` drawings of a split as "NAME, STYLE style".

    Args:
        draw: ``draw(prompts, seed)`` gives a PIL picture a prompt.
        bank: the real pictograms.
        split: `train`, `held_out_pairs` or `held_out_things`.
        prompts: most prompts; drawn without replacement.
        seed: of the choice and of the pictures.
    """
    rows = bank.rows(split)
    rows = sorted(random.Random(seed).sample(rows, min(prompts, len(rows))))
    features = bank.of(draw([f"{bank.names[i]}, {bank.styles[i]} style" for i in rows], seed))
    _, found = bank.nearest(features)
    spread = {style: bank.spread(style) for style in STYLES}
    training = {style: bank.rows("train", style) for style in STYLES}
    copied, distances, usual = 0, [], []
    for i, feature in zip(rows, features):
        style = bank.styles[i]
        distance, (near,) = bank.nearest(feature[None], training[style])
        copied += bank.names[near] != bank.names[i] and distance.item() < spread[style] / 2
        distances.append(distance.item())
    for i in bank.rows("held_out_pairs")[:: max(1, len(bank.rows("held_out_pairs")) // 200)]:
        usual.append(bank.nearest(bank.features[i][None], training[bank.styles[i]])[0].item())
    return Recognition(
        prompts=len(rows),
        thing=sum(bank.names[a] == bank.names[b] for a, b in zip(rows, found)) / len(rows),
        style=sum(bank.styles[a] == bank.styles[b] for a, b in zip(rows, found)) / len(rows),
        copied=copied / len(rows),
        nearest_training=torch.tensor(distances).median().item(),
        nearest_held_out=torch.tensor(usual).median().item(),
    )


def measure_wordings(draw: Draw, bank: PictogramBank, things: int = 100, seed: int = 0) -> dict[str, float]:
    """
    Ask for the same things in five ways, as ``WORDINGS`` has them.

    Returns:
        ``same``: share of pictures that are the thing that most of the five are; ``right``: the thing that was asked for.
    """
    trained = {bank.names[i] for i in bank.rows("train")}
    named = sorted(name for name in trained if bank.other_names[name])
    chosen = random.Random(seed).sample(named, min(things, len(named)))
    prompts = [
        with_article(wording.format(n=name, o=bank.other_names[name][0])) for name in chosen for wording in WORDINGS
    ]
    _, found = bank.nearest(bank.of(draw(prompts, seed)))
    same = right = 0
    for index, name in enumerate(chosen):
        answers = [bank.names[i] for i in found[index * len(WORDINGS) : (index + 1) * len(WORDINGS)]]
        same += Counter(answers).most_common(1)[0][1]
        right += answers.count(name)
    return {"same": same / len(prompts), "right": right / len(prompts)}


def measure_distribution(draw: Draw, bank: PictogramBank, prompts: int, seed: int = 0) -> dict[str, dict[str, float]]:
    """
    A style asked for by its held-out pairs, against their real drawings.

    Returns:
        For every style ``kid`` and ``coverage`` of the generated pictures, and ``kid_training``, that of training drawings.
    """
    result = {}
    for style in STYLES:
        held_out = bank.rows("held_out_pairs", style)
        rows = random.Random(seed).sample(held_out, min(prompts, len(held_out)))
        generated = bank.of(draw([f"{bank.names[i]}, {style} style" for i in rows], seed))
        real, training = bank.features[held_out], bank.features[bank.rows("train", style)]
        result[style] = {
            "kid": kid(generated, real).mean,
            "kid_training": kid(training, real).mean,
            "coverage": manifold_overlap(real, generated).coverage,
        }
    return result


def measure_balance(draw: Draw, bank: PictogramBank, pictures: int, seed: int = 0) -> float:
    """Total variation between the categories of pictures that nobody asked for (empty prompts) and those of training."""
    _, found = bank.nearest(bank.of(draw([""] * pictures, seed)))
    drawn, real = Counter(bank.categories[i] for i in found), Counter(bank.categories[i] for i in bank.rows("train"))
    return sum(abs(drawn[c] / pictures - real[c] / real.total()) for c in real) / 2


def drawing_by(pipeline: Any, **call: Any) -> Draw:
    """Pictures of a pipeline; picture i of a list of prompts has seed + i."""

    def draw(prompts: list[str], seed: int) -> list[Image.Image]:
        pictures = []
        for start in range(0, len(prompts), BATCH):
            part = prompts[start : start + BATCH]
            generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(part))]
            pictures += pipeline(part, generator=generators, **call).images
        return pictures

    return draw


def reconstructing_by(pipeline: Any) -> Draw:
    """The real drawings themselves, through the autoencoder alone: no network on its latents can be recognised more often."""
    data = load_pictograms()
    rows = {f"{name}, {style} style": i for i, (name, style) in enumerate(zip(data["name"], data["style"]))}

    def draw(prompts: list[str], seed: int) -> list[Image.Image]:
        pictures = []
        for start in range(0, len(prompts), BATCH):
            real = [data[rows[prompt]]["image"] for prompt in prompts[start : start + BATCH]]
            with torch.no_grad():
                decoded = pipeline.vae(pipeline.image_processor.preprocess(real)).sample
            pictures += pipeline.image_processor.postprocess(decoded)
        return pictures

    return draw


def measure(draw: Draw, bank: PictogramBank, prompts: int = 256, seed: int = 0) -> dict:
    """Every measure of this module; ``prompts`` a split, and half as many for styles and balance."""
    splits = dict.fromkeys(bank.splits)
    result: dict[str, Any] = {split: asdict(measure_recognition(draw, bank, split, prompts, seed)) for split in splits}
    result["wordings"] = measure_wordings(draw, bank, min(100, prompts), seed)
    result["styles"] = measure_distribution(draw, bank, max(8, prompts // 2), seed)
    result["balance"] = measure_balance(draw, bank, max(8, prompts // 2), seed)
    return result


def main() -> int:
    parser = measure_parser(__doc__)
    parser.add_argument("--pipeline", default="atlas-pictograms", help="embedded name or folder")
    parser.add_argument("--prompts", type=int, default=256, help="a split (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="sampling steps (default: the pipeline's)")
    parser.add_argument("--guidance", type=float, help="guidance scale (default: the pipeline's)")
    parser.add_argument("--card", type=Path, help="also write the figures as a model card, such as FOLDER/README.md")
    parser.add_argument("--features", type=Path, help="file that keeps the features of the real pictures")
    return run_measure("pictograms", parser, _measure)


def _measure(args: argparse.Namespace) -> None:
    from ..pipelines import AtlasPipeline

    pipeline = quiet(AtlasPipeline.from_pretrained(args.pipeline))
    draw = drawing_by(pipeline, num_inference_steps=args.steps, guidance_scale=args.guidance)
    bank = PictogramBank(args.features)
    figures = measure(draw, bank, args.prompts, args.seed)
    if pipeline.vae is not None:
        through = reconstructing_by(pipeline)
        figures["autoencoder"] = asdict(measure_recognition(through, bank, "train", args.prompts, args.seed))
    print(json.dumps(figures, indent=1))
    if args.card is not None:
        folder = pretrained_path(args.pipeline) or Path(args.pipeline)
        command = f"python -m atlas_diffusers.metrics.pictograms {shlex.join(sys.argv[1:])}"
        args.card.write_text(card(folder, figures, command.strip()), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
