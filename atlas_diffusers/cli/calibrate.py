"""The subcommand ``atlas-diffusers calibrate``: the few-step solver, fitted to a pipeline and written into its folder."""

import argparse
from pathlib import Path

EXAMPLES = """examples:
  atlas-diffusers calibrate outputs/atlas-emoji/pipeline --steps 5 6 8 10
  atlas-diffusers calibrate my-pipeline --prompts-file captions.txt --guidance-scale 5 --cache my-pipeline-teacher
"""


def add_calibrate_command(commands) -> None:
    """Add ``calibrate`` to the subcommands of a parser."""
    calibrate = commands.add_parser(
        "calibrate",
        help="fit the few-step solver to a pipeline",
        description="Fit AtlasMultistepScheduler to a pipeline and write it into the pipeline's folder as its scheduler.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    calibrate.add_argument("folder", type=Path, metavar="FOLDER")
    calibrate.add_argument("--steps", type=int, nargs="+", default=[5, 6, 8, 10], help="step counts (default: 5 6 8 10)")
    calibrate.add_argument("--guidance-scale", type=float, help="default: the pipeline's")
    calibrate.add_argument("--prompts", nargs="*", metavar="PROMPT", help="prompts to calibrate on (default: the empty text)")
    calibrate.add_argument("--prompts-file", type=Path, help="the same, one a line")
    calibrate.add_argument("--trajectories", type=int, default=64, help="start noises (default: %(default)s)")
    calibrate.add_argument("--teacher-steps", type=int, default=36, help="calls of a trajectory (default: %(default)s)")
    calibrate.add_argument("--budget", type=int, default=15_000, help="network calls in all (default: %(default)s)")
    calibrate.add_argument("--batch-size", type=int, help="samples in one network call (default: 8)")
    calibrate.add_argument("--cache", type=Path, help="folder from which an interrupted run goes on")
    calibrate.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    calibrate.add_argument("--device", default="cpu", help="torch device (default: %(default)s)")
    calibrate.set_defaults(run=run_calibrate)


def run_calibrate(args: argparse.Namespace) -> None:
    if not (args.folder / "model_index.json").is_file():
        raise OSError(f"{args.folder} is not the folder of a pipeline: it has no model_index.json")
    prompts = list(args.prompts or [])
    if args.prompts_file is not None:
        prompts += [line for line in args.prompts_file.read_text(encoding="utf-8").splitlines() if line.strip()]
    import torch

    from ..pipelines import AtlasPipeline
    from ..schedulers import AtlasMultistepScheduler

    scheduler = AtlasMultistepScheduler.calibrate(
        AtlasPipeline.from_pretrained(args.folder).to(args.device),
        args.steps,
        num_trajectories=args.trajectories,
        teacher_steps=args.teacher_steps,
        budget=args.budget,
        batch_size=args.batch_size,
        prompts=prompts or None,
        guidance_scale=args.guidance_scale,
        generator=torch.Generator().manual_seed(args.seed),
        cache=args.cache,
    )
    scheduler.save_pretrained(args.folder / "scheduler")
    write_scheduler_class(args.folder / "model_index.json", type(scheduler).__name__)
    report = scheduler.calibration_report
    print(f"{report.network_calls} network calls, {report.teacher_calls} by the teacher; error on held-out trajectories:")
    for steps, found in report.steps.items():
        kept = "" if found.kept else ", not kept"
        print(f"  {steps} steps: {found.calibrated:.4f}, uncalibrated {found.uncalibrated:.4f}{kept}")


def write_scheduler_class(index: Path, name: str) -> None:
    """Name another scheduler of ours in a pipeline's ``model_index.json``; ``save_config`` would add the path of the folder."""
    import json

    content = json.loads(index.read_text(encoding="utf-8"))
    content["scheduler"] = ["atlas_diffusers", name]
    index.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
