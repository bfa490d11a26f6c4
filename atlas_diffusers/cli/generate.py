"""``generate``: pictures from prompts."""

import argparse
from pathlib import Path
from typing import Any

from .output import check_output, no_loading_bars, text, usable_device
from .schedulers import scheduler_class, swapped

EXAMPLES = """examples:
  atlas-diffusers generate "red heart" -o heart.png
  atlas-diffusers generate "panda face" "sunflower" --count 4 --seed 7 -o grid.png
  atlas-diffusers generate "frog face" --model outputs/atlas-emoji/pipeline --scheduler ddpm --steps 100 -o frog.png
"""


def add_generate_command(commands: argparse._SubParsersAction) -> None:
    generate = commands.add_parser(
        "generate",
        help="pictures from prompts",
        description="Generate pictures from prompts; several are laid out on one labelled sheet.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    generate.add_argument("prompts", nargs="+", type=text, metavar="PROMPT")
    generate.add_argument("-o", "--output", type=Path, default=Path("atlas.png"), help="picture file (default: %(default)s)")
    generate.add_argument("-m", "--model", default="atlas-emoji", help="embedded name, folder or hub id (default: %(default)s)")
    generate.add_argument("-n", "--count", type=int, default=1, help="pictures a prompt (default: %(default)s)")
    generate.add_argument("--steps", type=int, help="sampling steps (default: the pipeline's)")
    generate.add_argument("--guidance", type=float, help="guidance scale, 1 is off (default: the pipeline's)")
    generate.add_argument("--negative", type=text, help="negative prompt")
    generate.add_argument("--seed", type=int, default=0, help="picture i of the run uses seed + i (default: %(default)s)")
    generate.add_argument("--scheduler", help="ddim, ddpm or a class name (default: the pipeline's)")
    generate.add_argument("--device", default="cpu", help="torch device (default: %(default)s)")
    generate.set_defaults(run=run_generate)


def run_generate(args: argparse.Namespace) -> None:
    if args.count < 1:
        raise ValueError(f"--count {args.count}; expected at least 1")
    if args.steps is not None and args.steps < 1:
        raise ValueError(f"--steps {args.steps}; expected at least 1")
    check_output(args.output)
    import torch

    from ..pictures import labelled_grid
    from ..pipelines import AtlasPipeline

    scheduler = None if args.scheduler is None else scheduler_class(args.scheduler)
    with no_loading_bars():
        pipeline = AtlasPipeline.from_pretrained(args.model).to(usable_device(args.device))
    if scheduler is not None:
        pipeline.scheduler = swapped(pipeline, scheduler)
    prompts = [prompt for prompt in args.prompts for _ in range(args.count)]
    images: Any = pipeline(
        prompts,
        negative_prompt=args.negative,
        num_inference_steps=args.steps,
        guidance_scale=args.guidance,
        generator=[torch.Generator().manual_seed(args.seed + i) for i in range(len(prompts))],
        return_dict=False,
    )[0]
    sheet = images[0] if len(images) == 1 else labelled_grid(images, prompts)
    sheet.save(args.output)
    print(args.output.resolve())
