"""The first recipe for somebody's own pictures."""

import statistics
from pathlib import Path
from typing import Any

import torch
import yaml

from ..config import DatasetConfig, TrainingConfig
from ..config.dataset import Captions
from ..image_files import decode
from .data import PictureDataset
from .deriving import derive_model
from .sources import load_training_data

SIDES = (32, 64, 128, 256)
LARGEST_ON_CPU = 32
LOOKED_AT, PROMPTS = 100, 4
BATCH, PASSES, FEWEST_STEPS, MOST_STEPS = 32, 300, 2000, 100_000

TEMPLATE = """\
# {told}
output_dir: {output_dir}
seed: 0

dataset:
  root: {root}
  captions: {captions}
  resolution: {resolution}  # pixels; {sides}
  random_flip: {flip}  # true doubles the pictures where left and right do not matter

# the network, derived from {count} pictures of {resolution} pixels{and_captions}
model: {model}
{text_encoder}
objective: flow_matching
timestep_shift: {shift}

batch_size: {batch}
max_steps: {steps}  # {passes} passes over the data
learning_rate: 1.0e-3
warmup_steps: 200
weight_decay: 0.0
checkpoint_interval: 500

sample_interval: 500
sample_prompts: {prompts}
sample_steps: 25
guidance_scale: {guidance}
"""


def write_recipe(folder: str, file: Path, captions: Captions = "auto", resolution: int | None = None) -> str:
    """
    Look at a folder and write a recipe that trains on it.

    Returns:
        What was found.

    Raises:
        ValueError: for a folder without pictures, or captions that cannot be read; ``OSError`` for one that is not there.
    """
    dataset = DatasetConfig(root=folder, captions=captions)
    data = load_training_data(dataset)
    sides = _sides(data)
    dataset.resolution = resolution or _resolution(sides)
    pictures = PictureDataset(data, dataset)
    texts = list(dict.fromkeys(text for text in pictures.captions() if text))
    config = TrainingConfig(dataset=dataset)
    model = derive_model(config, pictures, config.text_encoder if texts else None)
    steps = min(max(FEWEST_STEPS, PASSES * len(pictures) // BATCH), MOST_STEPS)
    chosen = [texts[i * len(texts) // PROMPTS] for i in range(min(PROMPTS, len(texts)))]
    fields = {
        "told": data.info.description, "output_dir": _yaml(f"outputs/{Path(folder).resolve().name}"), "root": _yaml(folder),
        "captions": captions, "resolution": dataset.resolution, "flip": "false", "count": len(pictures),
        "sides": f"short sides of the pictures: {min(sides)} to {max(sides)}",
        "and_captions": " with captions" if texts else "",
        "model": _yaml(model), "text_encoder": "" if texts else "text_encoder: null  # there are no captions\n",
        "shift": max(1.0, dataset.resolution / 32 * 1.5), "batch": BATCH, "steps": steps,
        "passes": f"{steps * BATCH / len(pictures):.3g}", "prompts": _yaml(chosen), "guidance": 2.0 if texts else 1.0,
    }  # fmt: skip
    file.write_text(TEMPLATE.format(**fields), encoding="utf-8")
    hint = "" if texts else "; names are captions by --captions names, or folders"
    return data.info.description + hint


def _sides(data: Any) -> list[int]:
    """Short sides of some of the pictures."""
    stride = max(1, len(data) // LOOKED_AT)
    return [min(decode(picture, place).size) for place, picture in enumerate(data[::stride]["image"])]


def _resolution(sides: list[int]) -> int:
    most = statistics.median(sides)
    fitting = [side for side in SIDES if side <= most and (side <= LARGEST_ON_CPU or torch.cuda.is_available())]
    return max(fitting, default=SIDES[0])


def _yaml(value: Any) -> str:
    """In one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=float("inf"), allow_unicode=True).removesuffix("...\n").strip()
