"""The command line ``atlas-diffusers``."""

import argparse
import signal
import sys

from .. import __version__
from .app import add_app_command
from .bridge import add_bridge_command
from .calibrate import add_calibrate_command
from .compare import add_compare_command
from .completion import add_completion_command
from .config import add_config_commands
from .evaluate import add_evaluate_command
from .generate import add_generate_command
from .push import add_push_command
from .recipes import add_recipe_commands
from .schedulers import add_schedulers_command
from .train import add_train_command


class _Parser(argparse.ArgumentParser):
    """Prints a mistake in one line and exits with status 2."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message}\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser of every subcommand."""
    parser = _Parser(prog="atlas-diffusers", description=__doc__)
    parser.add_argument("--version", action="version", version=f"atlas-diffusers {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)
    add_generate_command(commands)
    add_schedulers_command(commands)
    add_bridge_command(commands)
    add_calibrate_command(commands)
    add_evaluate_command(commands)
    add_compare_command(commands)
    add_recipe_commands(commands)
    add_train_command(commands)
    add_app_command(commands)
    add_push_command(commands)
    add_config_commands(commands)
    add_completion_command(commands, parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a command; bad input prints one line and gives status 2, Ctrl-C one and 130."""
    args = build_parser().parse_args(argv)
    try:
        return args.run(args) or 0
    except (ValueError, OSError, ImportError) as error:
        print(f"atlas-diffusers: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("atlas-diffusers: stopped", file=sys.stderr)
        return 128 + signal.SIGINT
