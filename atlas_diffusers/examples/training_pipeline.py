"""
Train a preset and draw from the result:

    python -m atlas_diffusers.examples.training_pipeline PRESET [DATA [FOLDER [STEPS]]]
"""

import argparse
import sys
from pathlib import Path
from typing import Any, cast

import torch

from ..config import TrainingConfig, load_preset, merge, validate
from ..easy_api import create_sampler
from ..training import Trainer


def run_training(
    preset_name: str,
    dataset_root: str | None = None,
    checkpoint_dir: str | None = None,
    device: str | None = None,
    max_steps: int | None = None,
    **overrides: object,
) -> Path:
    """
    Train ``experiment:NAME``.

    Args:
        preset_name: see :func:`~atlas_diffusers.config.list_presets`.
        dataset_root: folder of pictures, instead of the preset's data.
        checkpoint_dir: where everything is written; a run that was interrupted goes on.
        device: `cpu` or `cuda`; by default what Accelerate finds.
        max_steps: optimiser steps.
        overrides: further fields of the recipe; a section changes the keys that it has.

    Returns:
        The folder of the pipeline.

    Raises:
        ValueError: for an unknown preset, fields that are wrong, and a device that is not there.
    """
    if device not in (None, "cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        raise ValueError(f"device={device!r}: expected cpu or, where torch finds a GPU, cuda")
    recipe = merge(load_preset(preset_name), overrides)
    if dataset_root is not None:
        dataset = {name: value for name, value in recipe["dataset"].items() if name != "image_column"}
        recipe["dataset"] = dataset | {"name": "imagefolder", "root": str(dataset_root)}
    if checkpoint_dir is not None:
        recipe["output_dir"] = str(checkpoint_dir)
    if max_steps is not None:
        recipe["max_steps"] = max_steps
    if device == "cpu":
        recipe["mixed_precision"] = "no"
    return Trainer(validate(TrainingConfig, recipe), cpu=device == "cpu").train()


def run_inference(
    checkpoint: str | Path,
    prompts: list[str] | None = None,
    num_samples: int = 4,
    timesteps: int = 50,
    seed: int = 0,
    **options: Any,
) -> torch.Tensor:
    """Pictures (n, channels, height, width) in [0, 1] of a trained folder; ``options`` of ``create_sampler``."""
    sampler = create_sampler(str(checkpoint), **options)
    return cast(torch.Tensor, sampler.generate(prompts, num_samples=num_samples, timesteps=timesteps, seed=seed))


def train_command(preset: str, description: str | None, arguments: list[str] | None = None) -> None:
    """Train a preset from the command line, by the original toolkit's options; a mistake is one line and status 2."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data-root", help="folder of pictures; default: the preset's")
    parser.add_argument("--checkpoints", help="where everything is written; default: the preset's")
    parser.add_argument("--device", help="cpu or cuda; default: what there is")
    parser.add_argument("--max-steps", type=int, help="optimiser steps; default: the preset's")
    given = parser.parse_args(arguments)
    try:
        print(run_training(preset, given.data_root, given.checkpoints, given.device, given.max_steps))
    except (ValueError, OSError) as error:
        parser.exit(2, f"{preset}: {' '.join(str(error).split())}\n")


def main(preset: str, data: str | None = None, folder: str | None = None, steps: str | None = None) -> None:
    """Train, then draw four pictures."""
    pipeline = run_training(preset, data, folder, max_steps=None if steps is None else int(steps))
    print(pipeline, tuple(run_inference(pipeline).shape))


if __name__ == "__main__":
    main(*sys.argv[1:])
