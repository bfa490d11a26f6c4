"""How near a pipeline's pictures are to those of a data set."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..metrics import efficientnet_features, energy_distance, kid, manifold_overlap, nearest_neighbours
from ..pictures.sheets import labelled_grid, to_pictures
from .data import BridgePairs, PictureDataset
from .processes import in_shares

SHOWN, FEWEST = 16, 8
LARGEST_BATCH = 32


class Evaluator:
    """
    Distances between generated pictures, one for each of some captions of the data, and all pictures of the data; of several
    processes, which must all ask for them, each generates its share.

    Args:
        dataset: pictures at a pipeline's resolution, with captions if it takes prompts, and for a bridge with what it starts
            from; read once.

    Raises:
        ValueError: for fewer than 8 pictures; ``ImportError`` without the extra `eval`.
    """

    def __init__(self, dataset: PictureDataset | BridgePairs):
        if len(dataset) < FEWEST:
            raise ValueError(f"evaluation needs at least {FEWEST} pictures of the data, got {len(dataset)}")
        self.items = [dataset[index, 0] for index in range(len(dataset))]
        self.pictures = torch.stack([item["pixels"] for item in self.items])
        self.paired = isinstance(dataset, BridgePairs) and dataset.partners is not None
        self.features = in_shares(len(self.pictures), lambda places: _features(self.pictures[places.start : places.stop]))

    def __call__(
        self,
        pipeline: Any,
        count: int = 256,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        seed: int = 0,
    ) -> tuple[dict, Image.Image]:
        """
        Numbers and a sheet of pictures.

        Args:
            pipeline: an ``AtlasPipeline``.
            count: pictures to generate, at least 8; captions are taken in a shuffled order, in turn.
            num_inference_steps, guidance_scale: of the call; by default the pipeline's.
            seed: picture i starts from noise of ``seed + i``.

        Returns:
            Numbers by name: ``kid`` (of EfficientNet-Lite0 features, see :func:`~atlas_diffusers.metrics.kid`) and its standard
            error, ``energy_distance``, ``precision``, ``recall``, ``density`` and ``coverage`` on the same features, the
            median over generated pictures of the RMS distance to the nearest picture of the data, in units of [-1, 1], and
            ``kid_of_real_halves`` (see :meth:`kid_of_halves`); for a
            bridge between pairs also ``paired_rms`` and ``source_rms``, the mean RMS distances of what it makes, and of what it
            starts from, to the other of the pair; and a sheet of generated pictures, each above the nearest of the data.

        Raises:
            ValueError: for fewer than 8 pictures, or a pipeline that makes them of another shape.
        """
        if count < FEWEST:
            raise ValueError(f"evaluation needs at least {FEWEST} generated pictures, got count={count}")
        order = torch.randperm(len(self.items), generator=torch.Generator().manual_seed(seed)).tolist()
        chosen = [self.items[order[k % len(order)]] for k in range(count)]
        call = num_inference_steps, guidance_scale
        found = in_shares(count, lambda own: _generate(pipeline, [chosen[k] for k in own], *call, seed + own[0]))
        shapes = [tuple(pictures.shape[1:]) for pictures in (found, self.pictures)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"the pipeline makes pictures of {shapes[0]}, the data have {shapes[1]}")
        features = in_shares(count, lambda places: _features(found[places.start : places.stop]))
        distance, overlap = kid(features, self.features), manifold_overlap(self.features, features)
        nearest, which = nearest_neighbours(found, self.pictures)
        numbers = {
            "features": "EfficientNet-Lite0", "generated": count, "real": len(self.pictures), "kid": distance.mean,
            "kid_standard_error": distance.standard_error, "energy_distance": energy_distance(features, self.features),
            **overlap._asdict(), "nearest_median": nearest.median().item(), "kid_of_real_halves": self.kid_of_halves(seed),
        }  # fmt: skip
        if self.paired:
            sources, targets = (torch.stack([item[name] for item in chosen]) for name in ("source", "pixels"))
            numbers |= {"paired_rms": _rms(found, targets), "source_rms": _rms(sources, targets)}
        return numbers, _sheet(found, self.pictures[which], [item["text"] for item in chosen])


    def kid_of_halves(self, seed: int = 0) -> float:
        """KID between two random halves of the data: what pictures get that are as good as real ones."""
        order = torch.randperm(len(self.features), generator=torch.Generator().manual_seed(seed))
        return kid(self.features[order[::2]], self.features[order[1::2]]).mean

    def kid_of(self, dataset: PictureDataset) -> float:
        """KID of other real pictures to the data, such as those that a pipeline was trained on."""
        return kid(_features(torch.stack([dataset[index, 0]["pixels"] for index in range(len(dataset))])), self.features).mean


def _rms(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).square().flatten(1).mean(1).sqrt().mean().item()


def _features(pictures: torch.Tensor) -> torch.Tensor:
    """(n, 1280) of pictures in [-1, 1]."""
    return efficientnet_features((pictures / 2 + 0.5).clamp(0, 1).expand(-1, 3, -1, -1))


def call_inputs(pipeline: Any, items: list[dict]) -> dict:
    """What a pipeline is called with for a picture like each of some items: source, caption and label, where it takes them."""
    inputs = {}
    if pipeline.has_text:
        inputs["prompt"] = [item["text"] for item in items]
    if "label" in items[0]:
        inputs["class_labels"] = [item["label"] for item in items]
    if "source" in items[0]:
        return inputs | {"image": torch.stack([item["source"] for item in items]) / 2 + 0.5}
    return inputs or {"num_images_per_prompt": len(items)}


def _generate(pipeline: Any, items: list[dict], steps: Any, guidance_scale: float | None, seed: int) -> torch.Tensor:
    """(count, channels, height, width) in [-1, 1]."""
    parts = []
    for start in range(0, len(items), LARGEST_BATCH):
        part = items[start : start + LARGEST_BATCH]
        generators = [torch.Generator().manual_seed(seed + start + k) for k in range(len(part))]
        images = pipeline(
            **call_inputs(pipeline, part), num_inference_steps=steps, guidance_scale=guidance_scale, generator=generators,
            output_type="pt",
        ).images  # fmt: skip
        parts.append(images.float().cpu() * 2 - 1)
    return torch.cat(parts)


def _sheet(found: torch.Tensor, nearest: torch.Tensor, prompts: list[str]) -> Image.Image:
    """Rows of eight generated pictures, and under each row the nearest of the data."""
    images, labels = [], []
    for start in range(0, min(SHOWN, len(found)), 8):
        row = slice(start, min(start + 8, len(found)))
        for pictures, names in ((found[row], prompts[row]), (nearest[row], ["nearest"] * 8)):
            images += to_pictures(pictures)
            labels += names[: len(pictures)]
    return labelled_grid(images, labels, columns=min(8, math.ceil(len(images) / 2)), tile=96)


def write_evaluation(numbers: dict, sheet: Image.Image, file: Path) -> None:
    """Write ``file`` (JSON) and, beside it, the sheet as PNG."""
    file.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    sheet.save(file.with_suffix(".png"))
