"""The subcommand ``atlas-diffusers train``: a recipe, by Accelerate."""

import argparse

EXAMPLES = """examples:
  atlas-diffusers train my-recipe.yaml --max_steps 1000 --dataset.root my-pictures
  atlas-diffusers train my-recipe.yaml --dry-run
  atlas-diffusers train emoji --output_dir outputs/emoji
  atlas-diffusers train experiment:cifar10 --output_dir outputs/cifar10
"""


def add_train_command(commands: argparse._SubParsersAction) -> None:
    """Add ``train`` to the subcommands of a parser."""
    train = commands.add_parser(
        "train",
        help="train from a recipe",
        description="Train from a recipe with `accelerate launch`, as `accelerate config` set it up.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train.add_argument("recipe", help="YAML, JSON, a name of `atlas-diffusers recipes list`, or experiment:NAME")
    train.add_argument(
        "overrides", nargs=argparse.REMAINDER, metavar="--key value",
        help="fields of the recipe, changed; --dry-run says what the run would do and tries one batch",
    )  # fmt: skip
    train.set_defaults(run=run_train)


def run_train(args: argparse.Namespace) -> int:
    from ..config import TrainingConfig, apply_overrides, read_recipe, validate
    from .launching import launch

    overrides = [word for word in args.overrides if word != "--dry-run"]
    validate(TrainingConfig, apply_overrides(read_recipe(args.recipe), overrides))
    return launch(["--config", args.recipe, *args.overrides])
