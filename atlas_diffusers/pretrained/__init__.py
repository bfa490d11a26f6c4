"""The pipelines and pictures that ship inside the package."""

import hashlib
import json
from functools import cache
from pathlib import Path

from .pictogram_data import PICTOGRAM_SPLITS, load_pictograms

__all__ = [
    "PICTOGRAM_SPLITS",
    "embedded_pipelines",
    "is_held_out",
    "load_digits",
    "load_emoji",
    "load_pictograms",
    "pretrained_path",
]

FOLDER = Path(__file__).parent
SPLITS = ("train", "test", "all")
TILE = 32
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGIT_TILE = 8


def pretrained_path(name: str) -> Path | None:
    """Folder of the embedded pipeline called ``name``, or ``None`` if there is no such pipeline."""
    folder = FOLDER / name
    return folder if "/" not in name and (folder / "model_index.json").is_file() else None


def embedded_pipelines() -> list[str]:
    """Names that ``AtlasPipeline.from_pretrained`` finds without a folder or a hub."""
    return sorted(index.parent.name for index in FOLDER.glob("*/model_index.json"))


def is_held_out(name: str) -> bool:
    """Whether the emoji called ``name`` (its Unicode name) is in the test split: SHA-256 of the name, modulo 10, is 0."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 10 == 0


@cache
def _captions() -> list[dict]:
    return json.loads((FOLDER / "emoji" / "captions.json").read_text(encoding="utf-8"))


def load_emoji(split: str = "all", categories: list[str] | None = None):
    """
    The embedded emoji: 1,636 RGB pictures of 32x32 pixels on white (Noto, Apache-2.0; see ``emoji/NOTICE``).

    Args:
        split: `train` (about 90%), `test` (held out of the training of the embedded pipeline) or `all`.
        categories: keep only these categories; ``None`` keeps all eight.

    Returns:
        ``datasets.Dataset`` with columns ``image`` (PIL), ``text`` (caption), ``aliases`` (other captions), ``category``.

    Raises:
        ValueError: for an unknown split or category.
    """
    import datasets
    from PIL import Image

    if split not in SPLITS:
        raise ValueError(f"split={split!r}; allowed are {SPLITS}")
    known = {c["category"] for c in _captions()}
    if unknown := sorted(set(categories or ()) - known):
        raise ValueError(f"categories {unknown} are unknown; allowed are {sorted(known)}")
    with Image.open(FOLDER / "emoji" / "sheet.webp") as file:
        sheet = file.convert("RGB")
    columns = sheet.width // TILE
    rows = []
    for index, entry in enumerate(_captions()):
        if split != "all" and is_held_out(entry["name"]) != (split == "test"):
            continue
        if categories is not None and entry["category"] not in categories:
            continue
        y, x = (v * TILE for v in divmod(index, columns))
        image = sheet.crop((x, y, x + TILE, y + TILE))
        rows.append({"image": image} | {k: entry[k] for k in ("text", "aliases", "category")})
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "text": datasets.Value("string"),
            "aliases": datasets.List(datasets.Value("string")),
            "category": datasets.Value("string"),
        }
    )
    return datasets.Dataset.from_dict({name: [row[name] for row in rows] for name in features}, features=features)


def load_digits(split: str = "all", categories: list[str] | None = None):
    """
    1,797 handwritten digits, grey, 8x8 pixels of 17 levels (Alpaydin & Kaynak 1998, CC BY 4.0; see ``digits/NOTICE``).

    Args:
        split: `train`, `test` (every tenth digit) or `all`.
        categories: keep only these, of `zero` to `nine`.

    Returns:
        ``datasets.Dataset`` with columns ``image`` (PIL), ``text`` (`zero` to `nine`) and ``label`` (0 to 9).

    Raises:
        ValueError: for an unknown split or category.
    """
    import datasets
    from PIL import Image

    if split not in SPLITS:
        raise ValueError(f"split={split!r}; allowed are {SPLITS}")
    if unknown := sorted(set(categories or ()) - set(DIGITS)):
        raise ValueError(f"categories {unknown} are unknown; allowed are {list(DIGITS)}")
    with Image.open(FOLDER / "digits" / "sheet.png") as file:
        sheet = file.convert("L")
    labels = [int(label) for label in (FOLDER / "digits" / "labels.txt").read_text().strip()]
    columns = sheet.width // DIGIT_TILE
    chosen = [i for i in range(len(labels)) if split == "all" or (i % 10 == 0) == (split == "test")]
    chosen = [i for i in chosen if categories is None or DIGITS[labels[i]] in categories]
    corners = [(i % columns * DIGIT_TILE, i // columns * DIGIT_TILE) for i in chosen]
    images = [sheet.crop((x, y, x + DIGIT_TILE, y + DIGIT_TILE)) for x, y in corners]
    rows = {"image": images, "text": [DIGITS[labels[i]] for i in chosen], "label": [labels[i] for i in chosen]}
    features = {"image": datasets.Image(), "text": datasets.Value("string"), "label": datasets.Value("int64")}
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))
