"""The command line ``atlas-diffusers``."""

import argparse
import sys
from contextlib import contextmanager
from pathlib import Path

from .cli_bridge import add_bridge_command
from .cli_calibrate import add_calibrate_command
from .cli_compare import add_compare_command
from .cli_config import add_config_commands
from .cli_evaluate import add_evaluate_command
from .cli_schedulers import add_schedulers_command, scheduler_class
from .cli_train import add_train_command

EXAMPLES = """examples:
  atlas-diffusers generate "red heart" -o heart.png
  atlas-diffusers generate "panda face" "sunflower" --count 4 --seed 7 -o grid.png
  atlas-diffusers generate "frog face" --model outputs/atlas-emoji/pipeline --scheduler ddpm --steps 100 -o frog.png
"""


class _Parser(argparse.ArgumentParser):
    """Prints a mistake in one line and exits with status 2."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message}\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser of every subcommand."""
    parser = _Parser(prog="atlas-diffusers", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)
    generate = commands.add_parser(
        "generate",
        help="pictures from prompts",
        description="Generate pictures from prompts; several are laid out on one labelled sheet.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    generate.add_argument("prompts", nargs="+", metavar="PROMPT")
    generate.add_argument("-o", "--output", type=Path, default=Path("atlas.png"), help="picture file (default: %(default)s)")
    generate.add_argument("-m", "--model", default="atlas-emoji", help="embedded name, folder or hub id (default: %(default)s)")
    generate.add_argument("-n", "--count", type=int, default=1, help="pictures a prompt (default: %(default)s)")
    generate.add_argument("--steps", type=int, help="sampling steps (default: the pipeline's)")
    generate.add_argument("--guidance", type=float, help="guidance scale, 1 is off (default: the pipeline's)")
    generate.add_argument("--negative", help="negative prompt")
    generate.add_argument("--seed", type=int, default=0, help="picture i of the run uses seed + i (default: %(default)s)")
    generate.add_argument("--scheduler", help="ddim, ddpm or a class name (default: the pipeline's)")
    generate.add_argument("--device", default="cpu", help="torch device (default: %(default)s)")
    generate.set_defaults(run=run_generate)
    add_schedulers_command(commands)
    add_bridge_command(commands)
    add_calibrate_command(commands)
    add_evaluate_command(commands)
    add_compare_command(commands)
    add_train_command(commands)
    add_config_commands(commands)
    return parser


def check_output(path: Path) -> None:
    """Raise before any work is done if ``path`` cannot become a picture file."""
    from PIL import Image

    if path.suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"output {path}: expected a picture file name such as {path.stem or 'picture'}.png")
    if not path.parent.is_dir():
        raise OSError(f"output {path}: folder {path.parent} does not exist")


@contextmanager
def no_loading_bars():
    """Only sampling shows its progress."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = (diffusers_logging, transformers_logging)
    for library in libraries:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in libraries:
            library.enable_progress_bar()


def run_generate(args: argparse.Namespace) -> None:
    if args.count < 1:
        raise ValueError(f"--count {args.count}; expected at least 1")
    if args.steps is not None and args.steps < 1:
        raise ValueError(f"--steps {args.steps}; expected at least 1")
    check_output(args.output)
    import torch

    from .pipelines import AtlasPipeline, labelled_grid

    scheduler = None if args.scheduler is None else scheduler_class(args.scheduler)
    with no_loading_bars():
        pipeline = AtlasPipeline.from_pretrained(args.model).to(args.device)
    if scheduler is not None:
        pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    prompts = [prompt for prompt in args.prompts for _ in range(args.count)]
    images = pipeline(
        prompts,
        negative_prompt=args.negative,
        num_inference_steps=args.steps,
        guidance_scale=args.guidance,
        generator=[torch.Generator().manual_seed(args.seed + i) for i in range(len(prompts))],
    ).images
    sheet = images[0] if len(images) == 1 else labelled_grid(images, prompts)
    sheet.save(args.output)
    print(args.output.resolve())


def main(argv: list[str] | None = None) -> int:
    """Run a command; bad input prints one line and gives status 2."""
    args = build_parser().parse_args(argv)
    try:
        return args.run(args) or 0
    except (ValueError, OSError, ImportError) as error:
        print(f"atlas-diffusers: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
