"""The subcommand ``atlas-diffusers calibrate``: the few-step solver, fitted to a pipeline and saved with a copy of it."""

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import Any

from .output import text, usable_device
from .pipelines import load_pipeline

EXAMPLES = """examples:
  atlas-diffusers calibrate outputs/atlas-emoji/pipeline -o outputs/few-step --steps 5 6 8 10
  atlas-diffusers calibrate my-pipeline -o my-pipeline-few --prompts-file captions.txt --guidance-scale 5 --cache teacher
  atlas-diffusers calibrate my-flux --in-place --call '{"height": 1024, "width": 1024}' --prompts "a cat" --device cuda
"""
LINKED = 2**20  # bytes from which a file is linked, not copied


def add_calibrate_command(commands: argparse._SubParsersAction) -> None:
    """Add ``calibrate`` to the subcommands of a parser."""
    calibrate = commands.add_parser(
        "calibrate",
        help="fit the few-step solver to a pipeline",
        description="Fit AtlasMultistepScheduler to a pipeline of any class by calling it, and write it as its scheduler.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    calibrate.add_argument("folder", type=Path, metavar="FOLDER")
    output = calibrate.add_mutually_exclusive_group(required=True)
    output.add_argument("-o", "--output", type=Path, metavar="NEW_FOLDER", help="a copy with the scheduler; links weights")
    output.add_argument("--in-place", action="store_true", help="write the scheduler into FOLDER itself")
    calibrate.add_argument("--steps", type=int, nargs="+", default=[5, 6, 8, 10], help="step counts (default: 5 6 8 10)")
    calibrate.add_argument(
        "--guidance-scale", type=float, nargs="+", metavar="SCALE",
        help="several get tables of their own, of which a call takes the nearest (default: the pipeline's)",
    )  # fmt: skip
    calibrate.add_argument("--prompts", nargs="*", type=text, metavar="PROMPT", help="default: the empty text")
    calibrate.add_argument("--prompts-file", type=Path, help="the same, one a line")
    calibrate.add_argument("--image", type=Path, help="calibrate image-to-image from this picture")
    calibrate.add_argument("--call", metavar="JSON", help="more arguments of the pipeline's call, such as height or strength")
    calibrate.add_argument("--trajectories", type=int, default=64, help="start noises (default: %(default)s)")
    calibrate.add_argument("--teacher-steps", type=int, default=36, help="calls of a trajectory (default: %(default)s)")
    calibrate.add_argument("--budget", type=int, default=15_000, help="network calls in all (default: %(default)s)")
    calibrate.add_argument("--batch-size", type=int, help="samples in one network call (default: 8)")
    calibrate.add_argument("--cache", type=Path, help="folder from which an interrupted run goes on")
    calibrate.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    calibrate.add_argument("--device", default="cpu", help="torch device (default: %(default)s)")
    dtypes = ("float32", "float16", "bfloat16")
    calibrate.add_argument("--dtype", choices=dtypes, default="float32", help="of the pipeline (default: %(default)s)")
    calibrate.set_defaults(run=run_calibrate)


def run_calibrate(args: argparse.Namespace) -> None:
    if not (args.folder / "model_index.json").is_file():
        raise OSError(f"{args.folder} is not the folder of a pipeline: it has no model_index.json")
    if args.output is not None and args.output.exists():
        raise OSError(f"{args.output} exists; choose another folder, or --in-place to write into {args.folder}")
    scales: list[float | None] = args.guidance_scale or [None]
    if len(set(scales)) < len(scales):
        raise ValueError(f"--guidance-scale {' '.join(map(str, scales))}: expected scales that differ")
    call, device = pipeline_arguments(args), usable_device(args.device)
    import torch

    pipeline = load_pipeline(str(args.folder), getattr(torch, args.dtype)).to(device)
    scheduler = calibrated(args, pipeline, call, scales[0], args.cache)
    for scale in scales[1:]:
        folder = args.cache and args.cache / f"guidance-{scale:g}"
        scheduler.add_tables(calibrated(args, pipeline, call, scale, folder))
    written: Any = args.folder if args.in_place else args.output
    if args.in_place:
        write_scheduler(written, scheduler)
    else:
        write_copy(args.folder, written, scheduler)
    print(f"written to {written}; import atlas_diffusers before from_pretrained({str(written)!r}), or take its scheduler:")
    print(f"  pipeline.scheduler = atlas_diffusers.AtlasMultistepScheduler.from_pretrained({str(written / 'scheduler')!r})")


def calibrated(args: argparse.Namespace, pipeline: Any, call: dict, scale: float | None, cache: Path | None) -> Any:
    """The scheduler for a guidance scale, and a report of it."""
    import torch

    from ..schedulers import AtlasMultistepScheduler

    scheduler = AtlasMultistepScheduler.calibrate(
        pipeline,
        args.steps,
        call=call,
        guidance_scale=scale,
        num_trajectories=args.trajectories,
        teacher_steps=args.teacher_steps,
        budget=args.budget,
        batch_size=args.batch_size,
        generator=torch.Generator().manual_seed(args.seed),
        cache=cache,
    )
    report, at = scheduler.calibration_report, "" if scale is None else f" at guidance scale {scale:g}"
    print(f"{report.network_calls} network calls{at}, {report.teacher_calls} by the teacher; error on held-out trajectories:")
    for steps, found in report.steps.items():
        kept = "" if found.kept else ", not kept"
        spread = f"{found.calibrated:.4f} ± {found.standard_error:.4f}"
        others = f"{len(found.restarts)} tables by nodes {found.restarts[0]:.4f} to {found.restarts[-1]:.4f}"
        print(f"  {steps} steps: {spread}, {others}, uncalibrated {found.uncalibrated:.4f}{kept}")
    return scheduler


def pipeline_arguments(args: argparse.Namespace) -> dict:
    """What the pipeline is called with; ``ValueError`` for JSON that is no object, ``OSError`` for damaged files."""
    try:
        call = json.loads(args.call or "{}")
    except json.JSONDecodeError:
        call = None
    if not isinstance(call, dict):
        raise ValueError(f"--call {args.call}: expected an object such as '{{\"height\": 512}}'")
    prompts = list(args.prompts or [])
    if args.prompts_file is not None:
        try:
            prompts += [line for line in args.prompts_file.read_text(encoding="utf-8").splitlines() if line.strip()]
        except UnicodeDecodeError as error:
            raise OSError(f"--prompts-file {args.prompts_file} is not UTF-8 (byte {error.start})") from error
    if prompts:
        call["prompt"] = prompts
    if args.image is not None:
        from ..image_files import decode

        call["image"] = decode({"path": str(args.image), "bytes": None})
    return call


def write_copy(folder: Path, output: Path, scheduler: Any) -> None:
    """A folder like another one, with this scheduler: whole or not there. Large files are links to the same data."""
    unfinished = output.with_name(f"{output.name}.part")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed
    try:
        shutil.copytree(folder, unfinished, copy_function=link_or_copy)
        write_scheduler(unfinished, scheduler)
        unfinished.rename(output)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def link_or_copy(source: str, target: str) -> None:
    """A hard link to a large file, where the file system allows one."""
    source = os.path.realpath(source)
    if os.path.getsize(source) >= LINKED:
        try:
            os.link(source, target)
            return
        except OSError:
            pass
    shutil.copy2(source, target)


def write_scheduler(folder: Path, scheduler: Any) -> None:
    """
    Make this the scheduler of a pipeline's folder. Each file is written beside the old one and renamed, so that a pipeline
    loads at any moment; ``save_config`` of the pipeline would add the path of the folder to its index.
    """
    from ..schedulers.calibration.cache import write_text

    index = folder / "model_index.json"
    write_text(folder / "scheduler" / "scheduler_config.json", scheduler.to_json_string())
    content = json.loads(index.read_text(encoding="utf-8"))
    content["scheduler"] = ["atlas_diffusers", type(scheduler).__name__]
    write_text(index, json.dumps(content, indent=2, sort_keys=True) + "\n")
