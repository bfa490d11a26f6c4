"""Make a pipeline of a run's newest checkpoint, also while the run goes on.

    python training/export_checkpoint.py outputs/pictograms training/state/pictograms

The pipeline has the averaged weights, in the recipe's `save_dtype`; `state.json` beside it says at which step and loss.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

from atlas_diffusers.config import TrainingConfig
from atlas_diffusers.training.checkpoints import latest_checkpoint, load_checkpoint
from atlas_diffusers.training.deriving import complete_recipe
from atlas_diffusers.training.networks import build_components
from atlas_diffusers.training.outputs import load_pictures, save_result


def export(run: Path, folder: Path) -> dict:
    """
    Write the pipeline of a run's newest checkpoint.

    Returns:
        What ``state.json`` says: ``step``, ``pictures`` seen, and the ``loss`` before it.

    Raises:
        ValueError: for a run of adapters, or without a checkpoint; ``OSError`` for a folder that is no run.
    """
    config = TrainingConfig.model_validate_json((run / "recipe.json").read_text(encoding="utf-8"))
    checkpoint = latest_checkpoint(run)
    if checkpoint is None or config.lora is not None:
        raise ValueError(f"{run} has {'no checkpoint yet' if checkpoint is None else 'adapters, which are no pipeline'}")
    pictures = load_pictures(config, config.dataset)
    texts = pictures.captions() if config.init_from is None and config.text_encoder is not None else []
    components = build_components(complete_recipe(config, pictures, texts), texts)
    tensors, state = load_checkpoint(checkpoint)
    networks = components.networks
    for name, network in networks.items():
        prefix = f"average.{name}."
        trained = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        network.load_state_dict({**network.state_dict(), **trained})
    if components.vae is not None:
        components.vae.to(getattr(torch, config.save_dtype))
    save_result(config, components, networks, folder)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row and row["step"] <= state["step"]]
    told = {"step": state["step"], "pictures": state["step"] * config.batch_size, "loss": losses[-1] if losses else None}
    (folder / "state.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    return told


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="output_dir of the run")
    parser.add_argument("folder", type=Path, help="where the pipeline is written")
    args = parser.parse_args()
    try:
        print(json.dumps(export(args.run, args.folder)))
    except (ValueError, OSError) as error:
        print(f"export_checkpoint: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
