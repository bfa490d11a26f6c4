"""The subcommand ``atlas-diffusers app``: a web page to play with a pipeline."""

import argparse
import os
import signal

from .output import usable_device
from .pipelines import load_pipeline

EXAMPLES = """examples:
  atlas-diffusers app
  atlas-diffusers app -m outputs/mine/pipeline --port 8000
"""


def add_app_command(commands: argparse._SubParsersAction) -> None:
    """Add ``app`` to the subcommands of a parser."""
    app = commands.add_parser(
        "app",
        help="a web page to play with a pipeline",
        description="Serve a page to this machine, until Ctrl-C: generate, compare samplers, draw schedules, couple with "
        "references, train on your pictures. Needs the extra `app`; nothing is fetched.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    app.add_argument("-m", "--model", default="atlas-emoji", help="embedded name, folder or hub id (default: %(default)s)")
    app.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s, this machine alone)")
    app.add_argument("--port", type=int, default=7860, help="default: %(default)s")
    app.add_argument("--share", action="store_true", help="a public address by Gradio; folders and training are then left out")
    app.add_argument("--device", default="cpu", help="torch device (default: %(default)s)")
    app.set_defaults(run=run_app)


def run_app(args: argparse.Namespace) -> None:
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise ImportError("the page needs Gradio: pip install 'atlas-diffusers[app]'") from error
    from ..app.model import Model
    from ..app.page import serve

    model = Model(load_pipeline(args.model).to(usable_device(args.device)), args.model)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    serve(model, args.host, args.port, args.share)
