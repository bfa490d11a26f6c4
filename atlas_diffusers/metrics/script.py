"""What the measures that are run as modules share."""

import argparse
import sys
from collections.abc import Callable
from typing import Any


def measure_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser whose help is a module's docstring as it stands."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def run_measure(name: str, parser: argparse.ArgumentParser, measure: Callable[[argparse.Namespace], None]) -> int:
    """Measure by the command line's arguments; bad input prints one line and gives status 2."""
    args = parser.parse_args()
    try:
        measure(args)
    except (ValueError, OSError, ImportError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    return 0


def quiet(pipeline: Any) -> Any:
    """A pipeline without progress bars."""
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
