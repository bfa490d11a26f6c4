"""The subcommand ``atlas-diffusers evaluate``: distances between a pipeline's pictures and data."""

import argparse
from pathlib import Path

from .output import usable_device

EXAMPLES = """examples:
  atlas-diffusers evaluate atlas-emoji --data embedded:emoji --split test --beside train --count 64
  atlas-diffusers evaluate outputs/mine/pipeline --data my-pictures -o scores.json
  atlas-diffusers evaluate atlas-emoji --lora outputs/fluent-lora/lora --data data/fluent/test
"""


def add_evaluate_command(commands: argparse._SubParsersAction) -> None:
    """Add ``evaluate`` to the subcommands of a parser."""
    evaluate = commands.add_parser(
        "evaluate",
        help="distances between a pipeline's pictures and data",
        description="KID (EfficientNet-Lite0 features), energy distance, precision, recall, density, coverage and nearest "
        "neighbours of pictures generated for captions of the data; written as JSON, with a sheet of pictures beside it.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    evaluate.add_argument("model", metavar="FOLDER", help="embedded name, folder or hub id of a pipeline")
    evaluate.add_argument("--data", required=True, help="embedded:emoji, a folder of pictures, a parquet file or a hub id")
    evaluate.add_argument("--split", default="train", help="default: %(default)s")
    evaluate.add_argument(
        "--beside", nargs="*", default=[], metavar="SPLIT", help="splits of the data whose own KID is told, such as train"
    )
    evaluate.add_argument("--caption-column", default="text", help="`none` for data without captions (default: %(default)s)")
    evaluate.add_argument("--categories", nargs="*", metavar="NAME", help="of the embedded emoji or pictograms")
    evaluate.add_argument("--lora", type=Path, help="folder of adapters to load")
    evaluate.add_argument("--count", type=int, default=256, help="pictures to generate (default: %(default)s)")
    evaluate.add_argument("--steps", type=int, help="default: the pipeline's")
    evaluate.add_argument("--guidance", type=float, help="default: the pipeline's")
    evaluate.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    evaluate.add_argument("--device", default="cpu", help="torch device (default: %(default)s)")
    evaluate.add_argument("-o", "--output", type=Path, default=Path("evaluation.json"), help="default: %(default)s")
    evaluate.set_defaults(run=run_evaluate)


def run_evaluate(args: argparse.Namespace) -> None:
    if args.output.suffix != ".json" or not args.output.parent.is_dir():
        raise OSError(f"output {args.output}: expected a .json file in a folder that exists")
    if args.lora is not None and not args.lora.is_dir():
        raise OSError(f"--lora {args.lora}: there is no such folder")
    from ..config import DatasetConfig, validate
    from ..pipelines import AtlasPipeline
    from ..training import Evaluator, PictureDataset, load_training_data, write_evaluation

    pipeline = AtlasPipeline.from_pretrained(args.model).to(usable_device(args.device))
    pipeline.set_progress_bar_config(disable=True)
    if args.lora is not None:
        pipeline.load_lora_weights(args.lora)
    options = {
        "name": args.data,
        "split": args.split,
        "categories": args.categories,
        "caption_column": None if args.caption_column == "none" else args.caption_column,
        "resolution": pipeline.unet.config.sample_size * pipeline.vae_scale_factor,
    }
    config = validate(DatasetConfig, options)
    data = load_training_data(config)
    if data.info.description:
        print(data.info.description)
    others = [config.model_copy(update={"split": split}) for split in args.beside]
    beside = [PictureDataset(load_training_data(other), other) for other in others]
    evaluator = Evaluator(PictureDataset(data, config))
    numbers, sheet = evaluator(pipeline, args.count, args.steps, args.guidance, args.seed)
    numbers |= {f"kid_of_{split}": evaluator.kid_of(pictures) for split, pictures in zip(args.beside, beside)}
    write_evaluation(numbers, sheet, args.output)
    for name, value in numbers.items():
        print(f"{name}: {value if isinstance(value, (int, str)) else f'{value:.4f}'}")
    print(args.output.resolve())
