"""The subcommand ``atlas-diffusers push``: a trained pipeline, or adapters, to the hub."""

import argparse
from pathlib import Path

from .pipelines import part_of_output

EXAMPLES = """examples:
  atlas-diffusers push outputs/my-pictures --repo me/my-pictures --private
"""


def add_push_command(commands: argparse._SubParsersAction) -> None:
    """Add ``push`` to the subcommands of a parser."""
    push = commands.add_parser(
        "push",
        help="upload a trained pipeline or adapters to the hub",
        description="Upload a pipeline or adapters with their model card; log in first (hf auth login, or HF_TOKEN).",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    push.add_argument("folder", help="of a pipeline, of adapters, or of a run")
    push.add_argument("--repo", required=True, metavar="USER/NAME", help="made if it is not there")
    push.add_argument("--private", action="store_true", help="a repository that is made is not public")
    push.set_defaults(run=run_push)


def run_push(args: argparse.Namespace) -> None:
    from ..training.sharing import push

    folder = part_of_output(args.folder, "pipeline", "model_index.json")
    print(push(Path(part_of_output(folder, "lora", "pytorch_lora_weights.safetensors")), args.repo, args.private))
