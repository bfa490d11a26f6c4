"""The embedded pictograms: the same things drawn in six styles, with captions as people write them."""

import hashlib
import io
import json
import random
from functools import cache
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "pictograms"
TILE = 64
STYLES = {
    "noto": ("noto", "google"),
    "noto-v1": ("noto v1", "old noto", "blob"),
    "fluent": ("fluent", "3d", "shaded"),
    "flat": ("flat", "fluent flat"),
    "twemoji": ("twemoji", "twitter"),
    "fxemoji": ("fxemoji", "firefox"),
}
PICTOGRAM_SPLITS = ("train", "held_out_pairs", "held_out_things", "all")
PLAIN = ("{n}", "a {n}", "{n} emoji", "a picture of a {n}")
STYLED = ("{n}, {s} style", "a {n} in {s} style", "{s} {n}", "{n} {s}", "a {s} picture of a {n}")
COLOURED = ("{n} in {c}", "{n}, {c}")
COLOURS = (
    "red", "pink", "orange", "yellow", "green", "blue", "purple", "brown", "black", "grey", "white", "light blue",
)  # fmt: skip
CAPTIONS = 16


def _hash(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest(), 16)


@cache
def things() -> list[dict]:
    """Name, other names, keywords, category and styles of every thing, in the order of Unicode."""
    return json.loads((FOLDER / "things.json").read_text(encoding="utf-8"))


def pictogram_splits(name: str, styles: list[str]) -> dict[str, str]:
    """
    The split of each drawing of a thing.

    3% of the things (SHA-256 of the name) are held out in every style. Of the others 10% of the drawings (SHA-256 of name and
    style) are held out, as long as two other styles stay in the training split.
    """
    if _hash(name) % 100 < 3:
        return dict.fromkeys(styles, "held_out_things")
    found, left = dict.fromkeys(styles, "train"), len(styles)
    for style in sorted(styles, key=lambda style: _hash(f"{name}/{style}")):
        if _hash(f"{name}/{style}") % 10 == 0 and left > 2:
            found[style], left = "held_out_pairs", left - 1
    return found


def with_article(caption: str) -> str:
    """``"a owl in flat style"`` -> ``"an owl in flat style"``."""
    words = caption.split()
    spelled = [
        "an" if word == "a" and after[:1] in "aeiou" and not after.startswith(("uni", "eu", "one")) else word
        for word, after in zip(words, [*words[1:], "x"])
    ]
    return " ".join(spelled)


def coloured(name: str) -> list[str]:
    """``"red heart"`` -> ``["heart in red", "heart, red"]``; empty where the name does not begin with a colour."""
    found = [colour for colour in COLOURS if name.startswith(f"{colour} ")]
    return [wording.format(n=name.removeprefix(f"{c} "), c=c) for c in found for wording in COLOURED]


def pictogram_captions(thing: dict, style: str) -> list[str]:
    """
    Captions of a drawing, with and without article and style, in several wordings; one without a style means any style.

    Of 21 captions about 9 have the name of the thing (or its colour behind it), 8 one of its other names, 2 the last word of
    its name, and 2 are a pair of keywords. The draw belongs to the name and the style.
    """
    choice = random.Random(_hash(f"captions of {thing['name']}/{style}"))
    pools = [[thing["name"], *coloured(thing["name"])], thing["names"], thing["name"].split()[-1:]]
    captions = []
    for index in range(CAPTIONS):
        wording = choice.choice(STYLES[style])
        kind = choice.choices(range(4), (9, 8, 2, 2))[0]
        if kind == 3 and len(thing["keywords"]) > 1:
            pair = " ".join(choice.sample(thing["keywords"], 2))
            captions.append(f"{pair}, {wording} style" if index % 2 else pair)
            continue
        name = choice.choice(pools[kind % 3] or pools[0])
        captions.append(with_article(choice.choice(STYLED if index % 2 else PLAIN).format(n=name, s=wording)))
    return list(dict.fromkeys(captions))


def _png(picture: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=1)
    return file.getvalue()


def load_pictograms(split: str = "all", styles: list[str] | None = None, categories: list[str] | None = None):
    """
    The embedded pictograms: 7,976 RGB pictures of 64x64 pixels on white, 1,558 things in up to six styles.

    Args:
        split: `train`, `held_out_pairs` (drawings whose thing is in the training split in at least two other styles),
            `held_out_things` (things that are in the training split in no style) or `all`.
        styles: keep only these of ``noto``, ``noto-v1``, ``fluent``, ``flat``, ``twemoji`` and ``fxemoji``.
        categories: keep only these categories.

    Returns:
        ``datasets.Dataset`` with columns ``image`` (PIL), ``text`` (name and style), ``captions`` (further captions), ``name``,
        ``names``, ``keywords``, ``style``, ``category`` and ``split``. Licences: ``pictograms/NOTICE``.

    Raises:
        ValueError: for an unknown split, style or category.
    """
    import datasets
    from PIL import Image

    known = {"split": PICTOGRAM_SPLITS, "styles": tuple(STYLES), "categories": tuple(sorted({t["category"] for t in things()}))}
    asked = {"split": [split], "styles": styles or [], "categories": categories or []}
    for option, values in asked.items():
        if unknown := [value for value in values if value not in known[option]]:
            raise ValueError(f"{option}: {', '.join(map(repr, unknown))} unknown; allowed are {', '.join(known[option])}")
    sheets = {}
    for style in styles or STYLES:
        with Image.open(FOLDER / f"{style}.webp") as file:
            sheets[style] = file.convert("RGB")
    rows = []
    for thing in things():
        if categories and thing["category"] not in categories:
            continue
        splits = pictogram_splits(thing["name"], list(thing["at"]))
        for style, place in thing["at"].items():
            if style not in sheets or split not in (splits[style], "all"):
                continue
            y, x = (v * TILE for v in divmod(place, sheets[style].width // TILE))
            rows.append({
                "image": {"path": None, "bytes": _png(sheets[style].crop((x, y, x + TILE, y + TILE)))},
                "text": f"{thing['name']}, {style} style",
                "captions": pictogram_captions(thing, style),
                **{key: thing[key] for key in ("name", "names", "keywords", "category")},
                "style": style,
                "split": splits[style],
            })  # fmt: skip
    text, texts = datasets.Value("string"), datasets.List(datasets.Value("string"))
    features = datasets.Features({
        "image": datasets.Image(), "text": text, "captions": texts, "name": text, "names": texts, "keywords": texts,
        "category": text, "style": text, "split": text,
    })  # fmt: skip
    return datasets.Dataset.from_dict({name: [row[name] for row in rows] for name in features}, features=features)
