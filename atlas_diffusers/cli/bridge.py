"""The subcommand ``atlas-diffusers bridge``: what the Schrödinger-bridge step does with given references."""

import argparse
from pathlib import Path

EXAMPLES = """examples:
  atlas-diffusers bridge plot -o bridge.png
  atlas-diffusers bridge plot my-pipeline/references.safetensors --gate 5 -o bridge.svg
"""


def add_bridge_command(commands: argparse._SubParsersAction) -> None:
    """Add ``bridge plot`` to the subcommands of a parser."""
    bridge = commands.add_parser("bridge", help="draw the Schrödinger-bridge step")
    actions = bridge.add_subparsers(dest="action", required=True)
    plot = actions.add_parser(
        "plot",
        help="draw effective references against noise, the gate, trajectories and coverage",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    plot.add_argument("references", nargs="?", type=Path, help="safetensors file (default: the embedded emoji)")
    plot.add_argument("--gate", type=float, default=10.0, help="effective references (default: %(default)s)")
    plot.add_argument("-o", "--output", type=Path, default=Path("bridge.png"), help="PNG or SVG (default: %(default)s)")
    plot.set_defaults(run=run_plot)


def run_plot(args: argparse.Namespace) -> None:
    from ..pictures.plots import check_path

    check_path(args.output)
    from ..pictures.plots_bridge import plot_bridge

    plot_bridge(read_references(args.references), args.output, args.gate)
    print(args.output.resolve())


def read_references(file: Path | None):
    """References of a safetensors file, or the embedded emoji on [-1, 1]."""
    from ..pipelines.references import References

    if file is not None:
        return References.load(file).as_tensor().float()
    from diffusers.image_processor import VaeImageProcessor

    from ..pretrained import load_emoji

    return VaeImageProcessor(vae_scale_factor=1).preprocess([image.convert("RGB") for image in load_emoji()["image"]])
