"""The subcommand ``atlas-diffusers compare``: schedulers side by side, on a pipeline's pictures or on exact predictions."""

import argparse
import time
from pathlib import Path
from typing import Any

from .generate import call_options
from .output import check_output, text, usable_device
from .pipelines import load_adapters, load_pipeline

EXAMPLES = """examples:
  atlas-diffusers compare "a red heart" -o comparison.png
  atlas-diffusers compare "a cat" -m my-sdxl --schedulers own euler multistep --steps 5 10 20 40 --guidance 5
  atlas-diffusers compare --config system.yaml --steps 10 --shape 1 3 64 64 -o comparison.png
"""
STEPS, EXACT_STEPS = [5, 10, 20, 40], 20
OWN = "own"
SCHEDULERS = [OWN, "ddim", "euler", "heun", "multistep"]
TILE = 240


def add_compare_command(commands: argparse._SubParsersAction) -> None:
    """Add ``compare`` to the subcommands of a parser."""
    compare = commands.add_parser(
        "compare",
        help="samples of several schedulers from the same noise",
        description="With a PROMPT: pictures of a pipeline, a row a scheduler and a column a step count, with time, network "
        "calls and the RMS distance to the finest, which is the first scheduler's with the most steps. Without one: every "
        "pipeline of a configuration under the exact prediction for Gaussian data, and the distance to the first one's sample.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = compare.add_argument
    add("prompt", nargs="?", type=text)
    add("-m", "--model", help="embedded name, folder of a pipeline or of a run, or hub id (default: atlas-emoji)")
    add("--lora", action="append", metavar="PATH[:scale]", help="adapters; may be repeated")
    add("--schedulers", nargs="+", metavar="NAME", help=f"`own` is the pipeline's (default: {' '.join(SCHEDULERS)})")
    add("--negative", type=text, help="negative prompt")
    add("--guidance", type=float, help="guidance scale, 1 is off (default: the pipeline's)")
    add("--height", type=int, help="in pixels (default: the pipeline's)")
    add("--width", type=int, help="in pixels (default: the pipeline's)")
    add("--config", type=Path, help="without a prompt: YAML or JSON of pipelines (default: every sampler, linear betas)")
    add("--shape", type=int, nargs=4, metavar="N", help="without a prompt: of the samples (default: 1 3 32 32)")
    add("--steps", type=int, nargs="+", help="default: 5 10 20 40; without a prompt one number, 20")
    add("--seed", type=int, default=0, help="default: %(default)s")
    add("--device", default="auto", help="torch device (default: a GPU that is there, or else cpu)")
    add("-o", "--output", type=Path, default=Path("comparison.png"), help="default: %(default)s")
    compare.set_defaults(run=run_compare)


def run_compare(args: argparse.Namespace) -> None:
    others = ("config", "shape") if args.prompt is not None else (
        "model", "lora", "schedulers", "negative", "guidance", "height", "width"
    )  # fmt: skip
    if unread := [f"--{name}" for name in others if getattr(args, name) is not None]:
        raise ValueError(f"{', '.join(unread)}: not read {'with' if args.prompt is not None else 'without'} a PROMPT")
    if args.prompt is None:
        compare_exact(args)
    else:
        compare_pictures(args)
    print(args.output.resolve())


def compare_exact(args: argparse.Namespace) -> None:
    """Every pipeline of a configuration, under the exact prediction."""
    from ..pictures.plots import check_path

    check_path(args.output)
    if args.steps is not None and len(args.steps) > 1:
        raise ValueError(f"--steps {args.steps}: without a PROMPT expected one number")
    from ..system import AdvancedDiffusionSystem, NoiseSchedulerConfig, SamplingMethod

    system, steps = AdvancedDiffusionSystem(args.config), (args.steps or [EXACT_STEPS])[0]
    if args.config is None:
        for method in SamplingMethod:
            system.create_pipeline(method.value, NoiseSchedulerConfig(timestep_spacing="trailing"), method)
    found = system.compare_schedulers(tuple(args.shape or (1, 3, 32, 32)), steps, seed=args.seed)
    found.plot(args.output)
    for name in found:
        print(f"{name}: {found.network_calls[name]} calls, {found.seconds[name]:.3f} s, distance {found.distances[name]:.4f}")


def compare_pictures(args: argparse.Namespace) -> None:
    """A pipeline's picture for every scheduler and number of steps, from the same noise."""
    check_output(args.output)
    steps, names = sorted(args.steps or STEPS), list(dict.fromkeys(args.schedulers or SCHEDULERS))
    if steps[0] < 1:
        raise ValueError(f"--steps {steps[0]}; expected at least 1")
    from PIL import Image

    from ..pictures import labelled_grid
    from ..pipelines.named_schedulers import scheduler_for

    device = usable_device(args.device)
    pipeline = load_pipeline(args.model or "atlas-emoji").to(device)
    load_adapters(pipeline, args.lora or [])
    pipeline.set_progress_bar_config(disable=True)
    schedulers = {name: pipeline.scheduler if name == OWN else scheduler_for(pipeline, name) for name in names}
    asked = {"steps": None, "guidance": args.guidance, "height": args.height, "width": args.width, "strength": None}
    _, options = call_options(pipeline, asked | {"negative": args.negative, "image": None})
    options |= {"prompt": [args.prompt]} | ({} if args.negative is None else {"negative_prompt": [args.negative]})
    cells = {}
    for name, scheduler in schedulers.items():
        pipeline.scheduler = scheduler
        for count in steps:
            cells[name, count] = timed_call(pipeline, args.seed, options | {"num_inference_steps": count})
    finest, images, labels = cells[names[0], steps[-1]][0], [], []
    for (name, count), (picture, calls, seconds) in cells.items():
        distance = float(((picture - finest) ** 2).mean() ** 0.5)
        print(f"{name}, {count} steps: {calls} calls, {seconds:.3f} s, distance {distance:.4f}")
        images.append(Image.fromarray((255 * picture).round().astype("uint8").squeeze()))
        labels.append(f"{name} {count}: {calls} calls, {seconds:.1f} s, {distance:.3f}")
    labelled_grid(images, labels, columns=len(steps), tile=TILE).save(args.output)


def timed_call(pipeline: Any, seed: int, arguments: dict[str, Any]) -> tuple[Any, int, float]:
    """A picture (height, width, channels) in [0, 1], the network calls that it took, and the seconds."""
    import torch

    network, calls = getattr(pipeline, "unet", None) or pipeline.transformer, []
    counter = network.register_forward_pre_hook(lambda *given: calls.append(1))
    start = time.perf_counter()
    try:
        generators = [torch.Generator().manual_seed(seed)]
        picture = pipeline(**arguments, generator=generators, output_type="np").images[0]
    finally:
        counter.remove()
    return picture, len(calls), time.perf_counter() - start
