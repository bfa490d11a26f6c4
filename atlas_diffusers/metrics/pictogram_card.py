"""The model card of a pipeline that draws pictograms: what it is, how it was trained, what was measured, goals beside it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

GOALS: tuple[tuple[str, tuple[str, ...], str, float], ...] = (
    ("trained pairs: the thing is right", ("train", "thing"), "at least", 0.85),
    ("trained pairs: the style is right", ("train", "style"), "at least", 0.95),
    ("held-out pairs: the thing is right", ("held_out_pairs", "thing"), "at least", 0.5),
    ("held-out pairs: the style is right", ("held_out_pairs", "style"), "at least", 0.85),
    ("held-out pairs: copies of another thing", ("held_out_pairs", "copied"), "at most", 0.0),
    ("held-out things: the thing is right", ("held_out_things", "thing"), "", 0.0),
    ("held-out things: the style is right", ("held_out_things", "style"), "", 0.0),
    ("trained pairs through the autoencoder alone: the thing is right", ("autoencoder", "thing"), "", 0.0),
    ("trained pairs through the autoencoder alone: the style is right", ("autoencoder", "style"), "", 0.0),
    ("five wordings draw the same thing", ("wordings", "same"), "at least", 0.9),
    ("five wordings draw the right thing", ("wordings", "right"), "", 0.0),
    ("empty prompts: distance of their categories from training's", ("balance",), "", 0.0),
)
RECIPE = ("objective", "time_distribution", "batch_size", "optimizer", "learning_rate", "ema_decay", "caption_dropout",
          "mixed_precision")  # fmt: skip
HEAD = """---
library_name: diffusers
license: cc-by-4.0
tags: [text-to-image, pictograms, atlas-diffusers]
---

# {name}

Draws {things} things in six styles at 64x64 pixels: "car", "a car, noto style", "a fluent picture of a car". Trained from
scratch on the pictograms that ship inside `atlas_diffusers`; `pretrained/pictograms/NOTICE` has their licences (Twemoji's is
CC BY 4.0).
"""


def card(folder: Path, figures: Mapping[str, Any], command: str) -> str:
    """
    Markdown of a pipeline folder.

    Args:
        folder: of the pipeline, with ``recipe.json`` and, of a checkpoint on the way, ``state.json``.
        figures: what :func:`~.pictograms.measure` returns.
        command: that prints them.
    """
    from ..pretrained.pictogram_data import things

    head = HEAD.format(name=folder.name, things=f"{len(things()):,}")
    return "\n".join([head, _parts(folder), _training(folder), _figures(figures, command)])


def _parts(folder: Path) -> str:
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    lines = ["## What it is made of", "", "| part | what | numbers | on disk |", "|---|---|---|---|"]
    for part, (_, name) in sorted((key, value) for key, value in index.items() if isinstance(value, list) and value[1]):
        size = sum(file.stat().st_size for file in (folder / part).iterdir()) / 1e6
        lines.append(f"| `{part}` | `{name}` | {_numbers(folder / part):,} | {size:.1f} MB |")
    steps, scale = (index.get(f"default_{key}") for key in ("num_inference_steps", "guidance_scale"))
    return "\n".join([*lines, "", f"By default {steps} steps at guidance scale {scale}.", ""])


def _numbers(folder: Path) -> int:
    """Weights in the safetensors files of a folder."""
    count = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():
                size = 1
                for side in tensors.get_slice(key).get_shape():
                    size *= side
                count += size
    return count


def _training(folder: Path) -> str:
    recipe = json.loads((folder / "recipe.json").read_text(encoding="utf-8"))
    state_file = folder / "state.json"
    state = json.loads(state_file.read_text(encoding="utf-8")) if state_file.is_file() else {}
    step = state.get("step", recipe["max_steps"])
    seen = f"{step:,} steps of {recipe['batch_size']} pictures"
    loss = f", loss {state['loss']:.4f}" if state.get("loss") is not None else ""
    data = f"`split: {recipe['dataset']['split']}` of {recipe['dataset']['name']}"
    lines = ["## How it was trained", "", f"{seen}{loss}; {data}.", ""]
    return "\n".join([*lines, "| key | value |", "|---|---|", *(f"| `{key}` | {recipe[key]} |" for key in RECIPE), ""])


def _figures(figures: Mapping[str, Any], command: str) -> str:
    lines = ["## What was measured", "", "```bash", command, "```", "", "| figure | measured | goal | |", "|---|---|---|---|"]
    for text, path, kind, bound in GOALS:
        if path[0] not in figures:  # of pixels there is no autoencoder
            continue
        value: Any = figures
        for key in path:
            value = value[key]
        reached = value >= bound if kind == "at least" else value <= bound
        verdict = ("reached" if reached else "missed") if kind else ""
        lines.append(f"| {text} | {value:.3f} | {f'{kind} {bound:g}' if kind else ''} | {verdict} |")
    lines += ["", "Median distance to the nearest training drawing of the style:", ""]
    lines += ["| split | prompts | generated | real, held out |", "|---|---|---|---|"]
    for split in ("train", "held_out_pairs", "held_out_things"):
        row = figures[split]
        lines.append(f"| {split} | {row['prompts']} | {row['nearest_training']:.3f} | {row['nearest_held_out']:.3f} |")
    lines += ["", "| style | KID to held-out drawings | of training drawings | coverage |", "|---|---|---|---|"]
    for style, row in figures["styles"].items():
        lines.append(f"| {style} | {row['kid']:.4f} | {row['kid_training']:.4f} | {row['coverage']:.3f} |")
    return "\n".join([*lines, ""])
