"""Bridges from odd to even digits, in one pass and by iterative Markovian fitting: ``python benchmarks/digit_bridges.py``.

Each row trains ``training/recipes/digits-odd-to-even.yaml`` with a coupling and a number of passes for the same number of
steps, and carries the odd digits of the training data over by its diffusion. ``energy distance`` is that of the results to the
held-out even digits (of the even digits of the training data in the first row), ``moved`` the mean squared change of a pixel,
of which a Schrödinger bridge takes little. CPU seconds of training on one thread.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch

from atlas_diffusers import AtlasBridgePipeline
from atlas_diffusers.config import DatasetConfig, TrainingConfig, read_recipe, validate
from atlas_diffusers.metrics import energy_distance
from atlas_diffusers.training import PictureDataset, Trainer, load_training_data

RECIPE = Path(__file__).parents[1] / "training" / "recipes" / "digits-odd-to-even.yaml"


def pictures(section: dict, split: str) -> torch.Tensor:
    config = validate(DatasetConfig, section | {"split": split})
    data = PictureDataset(load_training_data(config), config)
    return torch.stack([data[index, 0]["pixels"] for index in range(len(data))])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--couplings", nargs="+", default=["independent", "sinkhorn", "mixture"])
    parser.add_argument("--passes", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--steps", type=int, default=4000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    recipe = read_recipe(str(RECIPE))
    source = pictures(recipe["source_dataset"], "train")
    known, held_out = (pictures(recipe["dataset"], split) for split in ("train", "test"))
    print("| coupling | passes | energy distance | moved | s |\n|---|---|---|---|---|")
    print(f"| the even digits themselves | | {energy_distance(known.flatten(1), held_out.flatten(1)):.3f} | | |")
    for coupling in args.couplings:
        for passes in args.passes:
            with tempfile.TemporaryDirectory() as folder:
                changes = {"output_dir": folder, "coupling": coupling, "bridge_passes": passes, "max_steps": args.steps}
                start = time.process_time()
                result = Trainer(validate(TrainingConfig, recipe | changes | {"sample_interval": None}), cpu=True).train()
                seconds = time.process_time() - start
                pipeline = AtlasBridgePipeline.from_pretrained(result)
            pipeline.set_progress_bar_config(disable=True)
            generator = torch.Generator().manual_seed(0)
            found = pipeline(source / 2 + 0.5, num_inference_steps=20, generator=generator, output_type="latent").images
            distance = energy_distance(found.flatten(1), held_out.flatten(1))
            moved = (found - source).square().mean()
            print(f"| {coupling} | {passes} | {distance:.3f} | {moved:.3f} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
