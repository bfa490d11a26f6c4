"""Train from the command line; what ``training/train.py`` and ``atlas-diffusers train`` run."""

import argparse
import os
import signal
import sys

from ..config import TrainingConfig, apply_overrides, read_recipe, validate
from .processes import is_lost_process

# a trial neither reads nor writes caches, and makes no pictures
UNCACHED = {"cache_latents": False, "cache_text_embeddings": False, "class_images": None}
FITTED = {"coupling": "independent"}  # nor does it fit the semidiscrete coupling


def main(description: str | None = __doc__, defaults: dict | None = None) -> int:
    """
    Read a recipe and its overrides, and train; ``defaults`` hold where they say nothing.

    Returns:
        0; 2 after a mistake; 130 or 143 if SIGINT or SIGTERM stopped the run. Mistakes and stops print one line.
    """
    parser = argparse.ArgumentParser(
        prog="train.py", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="recipe: YAML, JSON or experiment:NAME; --key value pairs override it")
    parser.add_argument("--dry-run", action="store_true", help="say what the run would do, try one batch, and stop")
    args, overrides = parser.parse_known_args()
    try:
        recipe = {**(defaults or {}), **read_recipe(args.config)}
        config = validate(TrainingConfig, apply_overrides(recipe, overrides))

        from .trainer import Trainer

        trainer = Trainer(_uncached(config) if args.dry_run else config)
        if os.environ.get("RANK", "0") == "0":
            print(trainer.summary(), file=sys.stderr)
        if args.dry_run:
            print(f"one batch has loss {trainer.check():.4f}; nothing was written")
            return 0
        folder = trainer.train()
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        _say(str(error))
        return 2
    except RuntimeError as error:
        if not is_lost_process(error):
            raise
        _say("another process of the run ended; the same command goes on from the last checkpoint")
        return 2
    except KeyboardInterrupt as stop:
        if os.environ.get("RANK", "0") == "0":
            _say(str(stop) or "stopped; nothing was changed since the last checkpoint")
        return 128 + getattr(stop, "number", signal.SIGINT)
    print(f"{folder.name}: {folder}")
    return 0


def _uncached(config: TrainingConfig) -> TrainingConfig:
    return config.model_copy(update=UNCACHED | (FITTED if config.coupling == "semidiscrete" else {}))


def _say(message: str) -> None:
    if message.startswith("Caught "):
        # from a process that reads data: the last line has the mistake, after the name of its class
        message = message.strip().splitlines()[-1].partition(": ")[2]
    print(f"train.py: {' '.join(message.split())}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
