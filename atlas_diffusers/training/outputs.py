"""What a run makes of its networks: a pipeline, adapters, sample grids, evaluations."""

import copy
import inspect
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import atlas_diffusers

from ..config import DatasetConfig, TrainingConfig
from ..config.training import ClassImagesConfig
from ..pictures.sheets import labelled_grid, to_pictures
from .data import Annotated, BridgePairs, PictureDataset
from .evaluation import Evaluator, call_inputs
from .family import Components
from .lora import write_adapters
from .objective_table import objective_class
from .processes import in_shares
from .sources import load_training_data

GRID = 8
PICTURES = (".png", ".jpg", ".jpeg", ".webp")


def load_pictures(config: TrainingConfig, target: DatasetConfig) -> PictureDataset | BridgePairs:
    """The data that ``target`` names, for a bridge together with where its pictures come from."""
    pictures = PictureDataset(load_training_data(target), target)
    if not target.streaming and len(pictures) == 0:
        raise ValueError(f"dataset {target.name!r} has no pictures in split {target.split!r}")
    if config.source_dataset is None:
        return pictures
    for name in ("resolution", "channels"):
        values = getattr(config.source_dataset, name), getattr(target, name)
        if values[0] != values[1]:
            raise ValueError(f"source_dataset.{name}={values[0]} is not dataset.{name}={values[1]}")
    source = PictureDataset(load_training_data(config.source_dataset), config.source_dataset)
    return BridgePairs(pictures, source, paired=config.coupling == "paired")


def class_pictures(config: TrainingConfig, asked: ClassImagesConfig, pipeline: Any) -> PictureDataset:
    """
    The pictures of ``class_images``: those of its folder, to which the pipeline, as it is before training, adds what is
    missing, picture i from noise of ``seed + i``.
    """
    if not pipeline.has_text:
        raise ValueError("class_images: the pipeline takes no text, so there is no class that it knows by a prompt")
    folder = Path(config.output_dir) / "class_images" if asked.root is None else Path(asked.root)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(sum(file.suffix in PICTURES for file in folder.iterdir()), asked.count):
        generator = torch.Generator().manual_seed(config.seed + number)
        image = pipeline(prompt=[asked.prompt], generator=[generator]).images[0]
        image.save(folder / f"{number:05d}.png")
    changes = {"name": "folder", "root": str(folder), "caption": asked.prompt, "captions": "auto", "aspect_buckets": False}
    target = config.dataset.model_copy(update={**changes, "streaming": False, "categories": None, "styles": None})
    return PictureDataset(load_training_data(target), target)


class StockCall:
    """A pipeline of Diffusers called as ours are: sizes, steps and guidance that a call leaves open are the recipe's."""

    has_text = True

    def __init__(self, pipeline: Any, config: TrainingConfig):
        side = config.dataset.resolution
        known = inspect.signature(type(pipeline).__call__).parameters
        given = {
            "height": side, "width": side, "num_inference_steps": config.sample_steps,
            "guidance_scale": config.guidance_scale, "use_resolution_binning": False,
        }  # fmt: skip
        self.pipeline, self.given = pipeline, {name: value for name, value in given.items() if name in known}

    def __call__(self, **arguments: Any) -> Any:
        return self.pipeline(**self.given | {name: value for name, value in arguments.items() if value is not None})

    def save_pretrained(self, folder: Path) -> None:
        """As a folder of Diffusers."""
        self.pipeline.save_pretrained(folder)


def build_pipeline(config: TrainingConfig, components: Components, networks: dict[str, torch.nn.Module]):
    """The pipeline around the trained networks, or copies of them."""
    if components.pipeline is not None:
        whole = copy.copy(components.pipeline)
        for name, network in networks.items():
            setattr(whole, name, network)
        return StockCall(whole, config)
    diffusion = {}
    if config.bridge_passes:
        diffusion = {"backward_unet": networks["backward_unet"], "bridge_sigma": config.bridge_sigma}
    pipeline = getattr(atlas_diffusers, objective_class(config).pipeline)(
        unet=networks["unet"],
        scheduler=components.scheduler,
        vae=components.vae,
        text_encoder=networks.get("text_encoder"),
        tokenizer=components.tokenizer,
        default_guidance_scale=config.guidance_scale,
        default_num_inference_steps=config.sample_steps,
        **diffusion,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save_result(config: TrainingConfig, components: Components, networks: dict[str, torch.nn.Module], folder: Path) -> None:
    """Write a pipeline folder, or the adapters as Diffusers' ``load_lora_weights`` reads them, with the recipe."""
    dtype = getattr(torch, config.save_dtype)
    if config.lora is not None:
        write_adapters(folder, components, networks, dtype)
    else:
        copies = {name: copy.deepcopy(network) for name, network in networks.items()}
        for name in (components.family.network, "backward_unet", "text_encoder"):
            if name in copies and copies[name].dtype != dtype:
                copies[name].to(dtype)
        build_pipeline(config, components, copies).save_pretrained(folder)
    (folder / "recipe.json").write_text(config.model_dump_json(indent=1) + "\n", encoding="utf-8")


def sample_grid(config: TrainingConfig, pipeline: Any, dataset: PictureDataset | Annotated) -> Image.Image:
    """
    Pictures for ``sample_prompts``, or of a bridge from the first pictures of its source, always of the same noise; of several
    processes each paints its share.
    """
    bridging = isinstance(dataset, BridgePairs)
    items = [dataset[index, 0] for index in range(min(GRID, len(dataset)))] if bridging else []
    prompts = [item["text"] for item in items] if bridging else config.sample_prompts
    count = len(prompts) or GRID
    asked = items or [{"text": prompt} for prompt in prompts or [""] * count]

    def paint(places: range) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(i) for i in places]
        inputs = call_inputs(pipeline, [asked[i] for i in places])
        return pipeline(**inputs, generator=generators, output_type="pt").images.float() * 2 - 1

    images = to_pictures(in_shares(count, paint))
    if bridging:
        images = [*to_pictures(torch.stack([item["source"] for item in items])), *images]
        prompts = ["source"] * count + prompts
    return labelled_grid(images, prompts or [""] * count, columns=count if bridging else None)


def build_evaluator(config: TrainingConfig) -> Evaluator:
    """Beside ``eval_dataset``, or the training data."""
    target = config.eval_dataset or config.dataset.model_copy(update={"random_flip": False, "aspect_buckets": False})
    return Evaluator(load_pictures(config, target))
