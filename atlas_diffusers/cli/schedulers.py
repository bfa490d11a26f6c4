"""The subcommand ``atlas-diffusers schedulers``: which schedulers there are, and what their noise schedules look like."""

import argparse
import inspect
import sys
from pathlib import Path

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
    plot.add_argument("--dark", action="store_true", help="on dark paper")
    plot.add_argument("-o", "--output", type=Path, default=Path("schedules.png"), help="PNG or SVG (default: %(default)s)")
    plot.set_defaults(run=run_plot)


def run_list(args: argparse.Namespace) -> None:
    import diffusers

    from ..pipelines.named_schedulers import short_names

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
    from ..pipelines.named_schedulers import load_scheduler

    check_path(args.output)
    plot_schedules({name: load_scheduler(name) for name in args.names}, args.steps, args.output, args.dark)
    print(args.output.resolve())
