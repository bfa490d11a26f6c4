"""The subcommands ``recipes`` and ``init``: recipes that ship with the package, and one for a folder of pictures."""

import argparse
import shutil
from pathlib import Path
from typing import Any

RECIPES_EXAMPLES = """examples:
  atlas-diffusers recipes list
  atlas-diffusers recipes show emoji
  atlas-diffusers recipes copy emoji -o my-recipe.yaml
"""
INIT_EXAMPLES = """examples:
  atlas-diffusers init my-pictures -o recipe.yaml
  atlas-diffusers init my-pictures --captions folders --resolution 64
"""


def add_recipe_commands(commands: argparse._SubParsersAction) -> None:
    """Add ``recipes`` and ``init`` to the subcommands of a parser."""
    options: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    recipes = commands.add_parser("recipes", help="recipes that ship with the package", epilog=RECIPES_EXAMPLES, **options)
    actions = recipes.add_subparsers(dest="action", required=True)
    actions.add_parser("list", help="names, with their first lines").set_defaults(run=run_list)
    show = actions.add_parser("show", help="print a recipe")
    copy = actions.add_parser("copy", help="write a recipe to a file of your own")
    for command, run in ((show, run_show), (copy, run_copy)):
        command.add_argument("name", help="as listed")
        command.set_defaults(run=run)
    copy.add_argument("-o", "--output", type=Path, help="default: NAME.yaml")

    init = commands.add_parser("init", help="a recipe for a folder of pictures", epilog=INIT_EXAMPLES, **options)
    init.add_argument("folder", help="pictures, with captions in metadata.jsonl, metadata.csv or .txt files")
    init.add_argument("-o", "--output", type=Path, default=Path("recipe.yaml"), help="default: %(default)s")
    init.add_argument("--captions", default="auto", choices=("auto", "metadata", "files", "names", "folders"))
    init.add_argument("--resolution", type=int, help="side in pixels; by default from the pictures and the device")
    init.set_defaults(run=run_init)


def run_list(args: argparse.Namespace) -> None:
    from ..config import list_recipes, recipe_file

    for name in list_recipes():
        first = recipe_file(name).read_text(encoding="utf-8").splitlines()[0]
        print(f"{name:18} {first.lstrip('# ')}")


def run_show(args: argparse.Namespace) -> None:
    from ..config import recipe_file

    print(recipe_file(args.name).read_text(encoding="utf-8"), end="")


def run_copy(args: argparse.Namespace) -> None:
    from ..config import recipe_file

    output = args.output or Path(f"{args.name}.yaml")
    _check_free(output)
    shutil.copyfile(recipe_file(args.name), output)
    print(f"{output}: a copy of {args.name}")


def run_init(args: argparse.Namespace) -> None:
    from ..training.starting import write_recipe

    _check_free(args.output)
    print(write_recipe(args.folder, args.output, args.captions, args.resolution))
    print(f"{args.output}: edit it if you like, then: atlas-diffusers train {args.output}")


def _check_free(output: Path) -> None:
    if output.exists():
        raise ValueError(f"{output} exists; choose another name by -o, or remove it")
    if not output.parent.is_dir():
        raise OSError(f"output {output}: folder {output.parent} does not exist")
