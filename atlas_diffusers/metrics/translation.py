"""Whether a bridge between two styles of pictograms keeps the thing and changes the style, with real pairs as truth.

    python -m atlas_diffusers.metrics.translation --pipeline outputs/noto-to-fluent-pictograms/pipeline
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ..pretrained.pictogram_data import STYLES, load_pictograms
from .pictograms import BATCH, PictogramBank
from .script import measure_parser, quiet, run_measure

Translate = Callable[[list[Image.Image]], Sequence[Image.Image]]


@dataclass(frozen=True)
class Translation:
    """
    ``rms`` is the mean distance of translated pictures to the true drawings, of values in [0, 1]; ``thing`` the share whose
    nearest drawing of the target style is the thing, ``style`` that whose nearest drawing of all is of the target style.
    ``source_rms`` and ``source_thing``: the same of the pictures that were translated.
    """

    pictures: int
    rms: float
    thing: float
    style: float
    source_rms: float
    source_thing: float


def measure_translation(translate: Translate, bank: PictogramBank, source: str, target: str, limit: int = 128) -> Translation:
    """
    Translate drawings whose counterpart in the target style is held out of training.

    Args:
        translate: gives a PIL picture a picture.
        bank: the real pictograms.
        source, target: styles.
        limit: most pictures.

    Raises:
        ValueError: for two styles that are one, or unknown.
    """
    if source == target or not {source, target} <= set(STYLES):
        raise ValueError(f"source={source!r}, target={target!r}; expected two of {', '.join(STYLES)}")
    data = load_pictograms()
    places = {bank.names[i]: i for i, style in enumerate(bank.styles) if style == source}
    rows = [i for i in bank.rows("held_out_pairs", target) if bank.names[i] in places][:limit]
    sources, truths = ([data[i]["image"] for i in at] for at in ([places[bank.names[i]] for i in rows], rows))
    found = [picture for start in range(0, len(rows), BATCH) for picture in translate(sources[start : start + BATCH])]
    features, own = bank.of(found), [i for i, style in enumerate(bank.styles) if style == target]
    names = [bank.names[i] for i in rows]

    def share(index: list[int], values: list[str], wanted: list[str]) -> float:
        return sum(values[i] == name for i, name in zip(index, wanted)) / len(wanted)

    return Translation(
        pictures=len(rows),
        rms=_rms(found, truths),
        thing=share(bank.nearest(features, own)[1], bank.names, names),
        style=share(bank.nearest(features)[1], bank.styles, [target] * len(rows)),
        source_rms=_rms(sources, truths),
        source_thing=share(bank.nearest(bank.of(sources), own)[1], bank.names, names),
    )


def _rms(pictures: Sequence[Image.Image], truths: Sequence[Image.Image]) -> float:
    pairs = [(np.asarray(a.convert("RGB"), float), np.asarray(b.convert("RGB"), float)) for a, b in zip(pictures, truths)]
    return float(np.mean([np.sqrt(np.mean((a - b) ** 2)) / 255 for a, b in pairs]))


def main() -> int:
    parser = measure_parser(__doc__)
    parser.add_argument("--pipeline", required=True, help="folder of the bridge")
    parser.add_argument("--source", default="noto", help="style (default: %(default)s)")
    parser.add_argument("--target", default="fluent", help="style (default: %(default)s)")
    parser.add_argument("--pictures", type=int, default=128, help="most pictures (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="sampling steps (default: the pipeline's)")
    parser.add_argument("--features", type=Path, help="file that keeps the features of the real pictures")
    return run_measure("translation", parser, _measure)


def _measure(args: argparse.Namespace) -> None:
    from ..pipelines import AtlasBridgePipeline

    pipeline = quiet(AtlasBridgePipeline.from_pretrained(args.pipeline))

    def translate(pictures: list[Image.Image]) -> list[Image.Image]:
        return pipeline(pictures, num_inference_steps=args.steps, return_dict=False)[0]

    found = measure_translation(translate, PictogramBank(args.features), args.source, args.target, args.pictures)
    print(json.dumps(asdict(found), indent=1))


if __name__ == "__main__":
    sys.exit(main())
