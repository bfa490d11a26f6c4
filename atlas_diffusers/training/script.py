"""Train from the command line; what ``training/train.py`` and ``atlas-diffusers train`` run."""

import argparse
import sys

from ..config import TrainingConfig, apply_overrides, read_recipe, validate


def main(description: str = __doc__, defaults: dict | None = None) -> int:
    """Read a recipe and its overrides, and train; ``defaults`` hold where they say nothing."""
    parser = argparse.ArgumentParser(
        prog="train.py", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="recipe: YAML, JSON or experiment:NAME; --key value pairs override it")
    args, overrides = parser.parse_known_args()
    try:
        recipe = {**(defaults or {}), **read_recipe(args.config)}
        config = validate(TrainingConfig, apply_overrides(recipe, overrides))

        from .trainer import Trainer

        folder = Trainer(config).train()
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    print(f"{folder.name}: {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
