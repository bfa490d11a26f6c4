"""The subcommand ``atlas-diffusers bridge``: what the Schrödinger-bridge step does with given references."""

import argparse
from pathlib import Path

from .output import no_loading_bars, text

EXAMPLES = """examples:
  atlas-diffusers bridge plot -o bridge.png
  atlas-diffusers bridge plot my-pipeline/references.safetensors --gate 5 -o bridge.svg
  atlas-diffusers bridge plot my-pictures -m outputs/mine/pipeline -o bridge.png
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
    plot.add_argument(
        "references", nargs="?", type=Path,
        help="safetensors file or, with -m, a folder of pictures (default: the embedded emoji)",
    )  # fmt: skip
    plot.add_argument("-m", "--model", help="pipeline whose samples are drawn (default: an example in two dimensions)")
    plot.add_argument("--prompt", type=text, help="of that pipeline")
    plot.add_argument("-n", "--count", type=int, default=64, help="samples of it (default: %(default)s)")
    plot.add_argument("--gate", type=float, default=10.0, help="effective references (default: %(default)s)")
    plot.add_argument("--dark", action="store_true", help="on dark paper")
    plot.add_argument("-o", "--output", type=Path, default=Path("bridge.png"), help="PNG or SVG (default: %(default)s)")
    plot.set_defaults(run=run_plot)


def run_plot(args: argparse.Namespace) -> None:
    from ..pictures.plots import check_path

    check_path(args.output)
    from ..pictures.plots_bridge import plot_bridge

    if args.model is None:
        if args.prompt is not None:
            raise ValueError(f"--prompt {args.prompt!r} needs --model, the pipeline that draws it")
        plot_bridge(read_references(args.references), args.output, args.gate, dark=args.dark)
    else:
        references, paths = sampled_paths(args)
        plot_bridge(references, args.output, args.gate, paths, args.dark)
    print(args.output.resolve())


def read_references(given: Path | None):
    """References of a safetensors file, or the embedded emoji on [-1, 1]."""
    from ..pipelines.references import References

    if given is not None:
        if given.is_dir():
            raise ValueError(f"{given} is a folder: its pictures need a size, that of --model")
        return References.load(given).as_tensor().float()
    from diffusers.image_processor import VaeImageProcessor

    from ..pretrained import load_emoji

    return VaeImageProcessor(vae_scale_factor=1).preprocess([image.convert("RGB") for image in load_emoji()["image"]])


def sampled_paths(args: argparse.Namespace):
    """References in the space that a pipeline samples, and its data predictions on the way, without and with the bridge."""
    import torch

    from ..pipelines import AtlasPipeline
    from ..pipelines.references import read_references as read_for
    from ..pipelines.watching import watched
    from ..pretrained import load_emoji

    with no_loading_bars():
        pipeline = AtlasPipeline.from_pretrained(args.model)
    size = pipeline.checked_size(None, None)
    given = load_emoji("train") if args.references is None else str(args.references)
    references = read_for(pipeline, given, None, *size)
    call: dict = {"num_images_per_prompt": args.count, "output_type": "latent"}
    if args.prompt is not None:
        call["prompt"] = args.prompt
    paths = {}
    for name, bridge in (("network alone", {}), ("with the bridge", {"references": references, "bridge": {"gate": args.gate}})):
        seen: list[torch.Tensor] = []
        generators = [torch.Generator().manual_seed(seed) for seed in range(args.count)]
        end = watched(pipeline, pipeline.scheduler, seen.append)(**call, **bridge, generator=generators).images
        paths[name] = torch.stack([*seen, end]).float()
    return references.as_tensor().float(), paths
