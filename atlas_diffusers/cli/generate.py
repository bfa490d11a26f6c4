"""``generate``: pictures from prompts."""

import argparse
import hashlib
import re
import sys
from pathlib import Path
from typing import Any

from ..pretrained.pictogram_data import STYLES
from .output import check_output, text, usable_device
from .pipelines import load_adapters, load_pipeline

EXAMPLES = """examples:
  atlas-diffusers generate "red heart" -o heart.png
  atlas-diffusers generate "panda face" "sunflower" --count 4 --seed 7 --scale 4 -o grid.png
  atlas-diffusers generate "frog face" --model outputs/atlas-emoji --scheduler ddpm --steps 100 -o frog.png
  atlas-diffusers generate "a cat" -m my-sdxl --lora outputs/cats:0.8 --lora sketch.safetensors:0.5 -o pictures/
  atlas-diffusers generate --from-png heart.png -o again.png
"""
# what a picture is made from, and what stands for it where neither the command nor a PNG file says it
DEFAULTS = {
    "prompts": None, "negative": None, "model": "atlas-emoji", "lora": [], "count": 1, "steps": None, "guidance": None,
    "seed": 0, "scheduler": None, "height": None, "width": None, "image": None, "strength": None, "scale": 1,
    "resampling": "nearest",
}  # fmt: skip
BATCH = 16


def add_generate_command(commands: argparse._SubParsersAction) -> None:
    """Add ``generate`` to the subcommands of a parser."""
    generate = commands.add_parser(
        "generate",
        help="pictures from prompts",
        description="Generate pictures from prompts: one file, one labelled sheet with a row a prompt, or, into a folder, a "
        "file a picture. PNG files say how they were made.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = generate.add_argument
    add("prompts", nargs="*", type=text, metavar="PROMPT")
    add("-o", "--output", type=Path, default=Path("atlas.png"), help="picture file, or a folder for a file each (atlas.png)")
    add("-m", "--model", help="embedded name, folder of a pipeline or of a run, or hub id (default: atlas-emoji)")
    add("--lora", action="append", metavar="PATH[:scale]", help="adapters: file, folder, or folder of a run; may be repeated")
    add("-n", "--count", type=int, help="pictures a prompt (default: 1)")
    add("--steps", type=int, help="sampling steps (default: the pipeline's)")
    add("--guidance", type=float, help="guidance scale, 1 is off (default: the pipeline's)")
    add("--style", help=f"added to the prompts of a pipeline trained on the pictograms: {', '.join(STYLES)}")
    add("--negative", type=text, help="negative prompt")
    add("--seed", type=int, help="picture i of the run uses seed + i (default: 0)")
    add("--scheduler", help="as `atlas-diffusers schedulers list` has them, or a class of Diffusers (default: the pipeline's)")
    add("--height", type=int, help="in pixels (default: the pipeline's)")
    add("--width", type=int, help="in pixels (default: the pipeline's)")
    add("--image", metavar="FILE", help="start from this picture")
    add("--strength", type=float, help="how much of it is replaced, up to 1 (default: the pipeline's)")
    add("--scale", type=int, help="enlarge pictures by a whole factor (default: 1)")
    add("--resampling", choices=("nearest", "lanczos"), help="how they are enlarged (default: nearest)")
    add("--from-png", type=Path, metavar="FILE", help="make a picture again; other options change what it says")
    add("--device", default="auto", help="torch device (default: a GPU that is there, or else cpu)")
    generate.set_defaults(run=run_generate)


def run_generate(args: argparse.Namespace) -> None:
    settings = chosen_settings(args)
    as_files = args.output.is_dir() or not args.output.suffix
    if not as_files:
        check_output(args.output)
    device = usable_device(args.device)
    from ..pictures import labelled_grid
    from ..pictures.metadata import save_picture

    pipeline = prepared(settings, device)
    if args.style is not None and not names_styles(pipeline):
        raise ValueError(f"--style: {settings['model']} was not trained on the pictograms, whose captions name styles")
    images = enlarged(pictures(pipeline, settings), settings)
    prompts = [prompt for prompt in settings["prompts"] for _ in range(settings["count"])]
    if as_files:
        args.output.mkdir(parents=True, exist_ok=True)
        for number, (image, prompt) in enumerate(zip(images, prompts)):
            own = settings | {"prompts": [prompt], "count": 1, "seed": settings["seed"] + number}
            words = "-".join(re.findall(r"\w+", prompt))[:40]
            save_picture(image, args.output / f"{number:03d}-{words}.png", own)
    else:
        rows = settings["count"] if len(prompts) > settings["count"] > 1 else None
        sheet = images[0] if len(images) == 1 else labelled_grid(images, prompts, columns=rows)
        save_picture(sheet, args.output, settings)
    print(args.output.resolve())


def chosen_settings(args: argparse.Namespace) -> dict[str, Any]:
    """
    What the command says, or else the PNG file that it goes on from, or else the defaults.

    Raises:
        ValueError: for settings out of range, and options without what they need.
    """
    from .. import __version__

    made: dict[str, Any] = {}
    if args.from_png is not None:
        from ..pictures.metadata import read_settings

        made = read_settings(args.from_png)
        if made.get("version") != __version__:
            print(f"note: {args.from_png} was made by version {made.get('version')}, this is {__version__}", file=sys.stderr)
    given = {name: value for name in DEFAULTS if (value := getattr(args, name)) not in (None, [])}
    settings = DEFAULTS | {name: value for name, value in made.items() if name in DEFAULTS} | given
    if not settings["prompts"]:
        raise ValueError("give a PROMPT, or --from-png")
    for name, least in (("count", 1), ("steps", 1), ("scale", 1), ("height", 1), ("width", 1)):
        if settings[name] is not None and settings[name] < least:
            raise ValueError(f"--{name} {settings[name]}; expected at least {least}")
    if args.style is not None:
        if args.style not in STYLES:
            raise ValueError(f"--style {args.style!r} is unknown; allowed are {', '.join(STYLES)}")
        settings["prompts"] = [f"{prompt}, {args.style} style" for prompt in settings["prompts"]]
    if settings["strength"] is not None and settings["image"] is None:
        raise ValueError("--strength needs --image, the picture to start from")
    if settings["resampling"] != "nearest" and settings["scale"] == 1:
        raise ValueError(f"--resampling {settings['resampling']} needs --scale, the factor to enlarge by")
    if settings["image"] is not None:
        settings["image_sha256"] = hashlib.sha256(Path(settings["image"]).read_bytes()).hexdigest()
        if (before := made.get("image_sha256")) is not None and args.image is None and before != settings["image_sha256"]:
            raise ValueError(f"--image {settings['image']} is not the picture that {args.from_png} was made from")
    return settings | {"version": __version__}


def prepared(settings: dict[str, Any], device: str) -> Any:
    """The pipeline with its adapters and scheduler; the sampler and the steps that it takes are added to ``settings``."""
    from ..pipelines.named_schedulers import scheduler_class, scheduler_for

    wanted = settings["scheduler"]
    if wanted is not None and not Path(wanted).is_dir():
        scheduler_class(wanted)  # a mistake shows before the pipeline is loaded
    pipeline = load_pipeline(settings["model"]).to(device)
    load_adapters(pipeline, settings["lora"])
    if wanted is not None:
        pipeline.scheduler = scheduler_for(pipeline, wanted)
    settings["sampler"] = type(pipeline.scheduler).__name__
    settings["steps"] = settings["steps"] or default_steps(pipeline)
    return pipeline


def names_styles(pipeline: Any) -> bool:
    """Whether a pipeline's captions named the styles of pictograms: frequent words are tokens of their own."""
    return pipeline.tokenizer is not None and "twemoji</w>" in pipeline.tokenizer.get_vocab()


def default_steps(pipeline: Any) -> int:
    """Where a call does not say."""
    import inspect

    own = getattr(pipeline, "defaults", None)
    if own is not None:
        return own.default_num_inference_steps
    return inspect.signature(type(pipeline).__call__).parameters["num_inference_steps"].default


def pictures(pipeline: Any, settings: dict[str, Any]) -> list[Any]:
    """One a prompt and count, picture i from ``seed + i``, in batches."""
    import torch

    prompts = [prompt for prompt in settings["prompts"] for _ in range(settings["count"])]
    pipeline, options = call_options(pipeline, settings)
    images = []
    for start in range(0, len(prompts), BATCH):
        part = prompts[start : start + BATCH]
        generators = [torch.Generator().manual_seed(settings["seed"] + start + i) for i in range(len(part))]
        negative = {} if settings["negative"] is None else {"negative_prompt": [settings["negative"]] * len(part)}
        images += pipeline(prompt=part, generator=generators, **negative, **options).images
    return images


def call_options(pipeline: Any, settings: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """
    The pipeline to call, image-to-image where there is a picture, and the arguments that are the same for every batch.

    Raises:
        ValueError: for an option that its call does not have.
    """
    import inspect

    names = {"steps": "num_inference_steps", "guidance": "guidance_scale", "negative": "negative_prompt"}
    options = {name: settings[name] for name in ("steps", "guidance", "height", "width", "strength", "negative", "image")}
    options = {names.get(name, name): value for name, value in options.items() if value is not None}
    if "image" in options:
        from ..image_files import decode

        options["image"] = decode({"path": options["image"], "bytes": None})
        if not hasattr(pipeline, "defaults"):
            from diffusers import AutoPipelineForImage2Image

            pipeline = AutoPipelineForImage2Image.from_pipe(pipeline)
    known = inspect.signature(type(pipeline).__call__).parameters
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(f"{type(pipeline).__name__} takes no {', '.join(unknown)}")
    options.pop("negative_prompt", None)
    return pipeline, options


def enlarged(images: list[Any], settings: dict[str, Any]) -> list[Any]:
    """By the factor ``scale``."""
    from PIL import Image

    factor, how = settings["scale"], Image.Resampling[settings["resampling"].upper()]
    return images if factor == 1 else [image.resize((image.width * factor, image.height * factor), how) for image in images]
