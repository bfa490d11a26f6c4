"""The subcommand ``atlas-diffusers schedulers``: which schedulers there are, and what their noise schedules look like."""

import argparse
import inspect
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers.schedulers.scheduling_utils import SchedulerMixin

CONFIG = "scheduler_config.json"
EXAMPLES = """a NAME is
  euler                   a class: the short name of one of ours, or Diffusers' class name
  euler:cosine            a class with a beta schedule
  schedulers/sdxl-euler   the folder of a preset or of a pipeline, or an embedded pipeline

examples:
  atlas-diffusers schedulers plot ddim:linear ddim:cosine ddim:sigmoid -o schedules.png
  atlas-diffusers schedulers plot atlas-emoji schedulers/sdxl-euler HeunDiscreteScheduler --steps 20 -o schedules.svg
"""


def add_schedulers_command(commands: argparse._SubParsersAction) -> None:
    """Add ``schedulers list`` and ``schedulers plot`` to the subcommands of a parser; ``schedules`` is another spelling."""
    schedulers = commands.add_parser("schedulers", aliases=["schedules"], help="list the schedulers, or draw their schedules")
    actions = schedulers.add_subparsers(dest="action", required=True)
    actions.add_parser("list", help="our classes, one a line").set_defaults(run=run_list)
    plot = actions.add_parser(
        "plot",
        help="draw betas, alpha-bar, log-SNR and the placement of the steps",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    plot.add_argument("names", nargs="+", metavar="NAME")
    plot.add_argument("--steps", type=int, default=10, help="sampling steps to place (default: %(default)s)")
    plot.add_argument("-o", "--output", type=Path, default=Path("schedules.png"), help="PNG or SVG (default: %(default)s)")
    plot.set_defaults(run=run_plot)


def short_names() -> dict[str, str]:
    """Our scheduler classes by short name: ``ddim`` for ``AtlasDDIMScheduler``."""
    import atlas_diffusers

    return {name.removeprefix("Atlas").removesuffix("Scheduler").lower(): name for name in atlas_diffusers.SCHEDULERS}


def scheduler_class(name: str):
    """A scheduler class from its class name, or from the short name of one of ours (``ddim``, ``euler-ancestral``)."""
    import diffusers

    short = short_names()
    found = short.get(name.lower().replace("-", ""), name)
    if not found.endswith("Scheduler") or not hasattr(diffusers, found):
        raise ValueError(f"scheduler {name!r} is unknown; allowed are {sorted(short)} and Diffusers' class names")
    return getattr(diffusers, found)


def load_scheduler(name: str):
    """
    The scheduler that a NAME of the command line stands for: a folder with a configuration, or a class.

    Raises:
        ValueError: for an unknown class, a folder without a scheduler, or a beta schedule that the class does not have.
    """
    from ..pipelines.loading import check_values, named_damage, read_json_object
    from ..pretrained import pretrained_path

    for folder in (Path(name), Path(name, "scheduler"), (pretrained_path(name) or Path(name)) / "scheduler"):
        if (folder / CONFIG).is_file():
            config = read_json_object(folder / CONFIG)
            cls = scheduler_class(str(config.get("_class_name")))
            check_values(config, cls, folder / CONFIG)
            with named_damage(f"{folder / CONFIG} cannot be read"):
                return cls.from_config(config)
    if Path(name).is_dir():
        raise ValueError(f"folder {name} has neither {CONFIG} nor scheduler/{CONFIG}")
    class_name, _, beta_schedule = name.partition(":")
    cls = scheduler_class(class_name)
    if not beta_schedule:
        with named_damage(f"{class_name} is no scheduler of a noise process"):
            return cls()
    if "beta_schedule" not in inspect.signature(cls).parameters:
        raise ValueError(f"{name}: {cls.__name__} has no beta schedule to choose")
    try:
        return cls(beta_schedule=beta_schedule)
    except NotImplementedError as error:  # Diffusers' word for an unknown schedule
        raise ValueError(f"{name}: {error}") from error


def swapped(pipeline: Any, cls: Any) -> "SchedulerMixin":
    """
    A scheduler of another class for a pipeline, with the pipeline's noise process.

    Raises:
        OSError: for a class that takes no step of such a process: of other data, other arguments, or other noise.
    """
    import torch

    from ..pipelines.loading import named_damage

    network = getattr(pipeline, "unet", None) or pipeline.transformer
    x = torch.zeros(1, network.config.in_channels, 8, 8)
    with named_damage(f"scheduler {cls.__name__} cannot sample with this pipeline"), torch.random.fork_rng():
        trial = cls.from_config(pipeline.scheduler.config)
        trial.set_timesteps(10, **({"mu": 1.0} if trial.config.get("use_dynamic_shifting") else {}))
        trial.step(trial.scale_model_input(x, trial.timesteps[0]) * trial.order, trial.timesteps[0], x)
        return cls.from_config(pipeline.scheduler.config)


def run_list(args: argparse.Namespace) -> None:
    import diffusers

    rows = [(short, name, _one_line(getattr(diffusers, name))) for short, name in short_names().items()]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    for short, name, line in rows:
        print(f"{short:{widths[0]}}  {name:{widths[1]}}  {line}")


def _one_line(cls: type) -> str:
    """What a class is: its own first line, or its file's where the file holds one algorithm."""
    one_algorithm = ".scheduling_" in cls.__module__
    text = sys.modules[cls.__module__].__doc__ if one_algorithm else inspect.getdoc(cls)
    return str(text).partition("\n")[0].replace("`", "")


def run_plot(args: argparse.Namespace) -> None:
    from ..pictures.plots import check_path, plot_schedules

    check_path(args.output)
    plot_schedules({name: load_scheduler(name) for name in args.names}, args.steps, args.output)
    print(args.output.resolve())
