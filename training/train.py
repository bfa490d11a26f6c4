"""Train a pipeline from a recipe.

    accelerate launch training/train.py --config training/recipes/emoji.yaml
    accelerate launch training/train.py --config training/recipes/emoji.yaml --max_steps 200 --dataset.resolution 32
    accelerate launch training/train.py --config experiment:ffhq128 --dataset.root my-pictures
"""

import argparse
import sys

from atlas_diffusers.config import TrainingConfig, apply_overrides, read_recipe, validate


def main(description: str = __doc__, defaults: dict | None = None) -> int:
    """Train from the command line; ``defaults`` hold where the recipe and its overrides say nothing."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="recipe: YAML, JSON or experiment:NAME; --key value pairs override it")
    args, overrides = parser.parse_known_args()
    try:
        recipe = {**(defaults or {}), **read_recipe(args.config)}
        config = validate(TrainingConfig, apply_overrides(recipe, overrides))

        from atlas_diffusers.training import Trainer

        folder = Trainer(config).train()
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    print(f"{folder.name}: {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
