"""What goes with trained weights to others: a model card, and the way to the hub."""

import json
import shutil
from pathlib import Path
from typing import Any

import yaml

from ..config import TrainingConfig

PROMPT = "..."


def write_card(config: TrainingConfig, pictures: Any, output: Path, result: Path) -> None:
    """
    Write ``README.md`` into ``result``, the pipeline or the adapters of a run, with the curves and the last sample grid of its
    folder ``output`` beside it: data, distances to them of the last evaluation, recipe, use and licence.
    """
    shown = []
    for name, file in (("Loss", output / "curves.png"), ("Samples", max(output.glob("sample-*.png"), default=None))):
        if file is not None and file.is_file():
            shutil.copyfile(file, result / file.name)
            shown.append(f"![{name}]({file.name})")
    head = {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image" if pictures.captions() else "unconditional-image-generation",
        "tags": ["atlas-diffusers", *(["lora"] if config.lora is not None else [])],
        **({"license": config.license} if config.license else {}),
        **({"base_model": config.init_from} if config.init_from else {}),
    }
    recipe = yaml.safe_dump(config.model_dump(mode="json", exclude_defaults=True), sort_keys=False, allow_unicode=True)
    sections = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {output.name}",
        _use(config),
        "## Data\n\n" + _data(config, pictures),
        "## How near its pictures are to the data\n\n" + _distances(output),
        *shown,
        f"## Recipe\n\n```yaml\n{recipe}```",
        "## Licence\n\n" + (config.license or "Not stated: give `license` in the recipe, or edit this file, before sharing."),
    ]
    (result / "README.md").write_text("\n\n".join(sections) + "\n", encoding="utf-8")


def _use(config: TrainingConfig) -> str:
    if config.lora is None:
        name = "AtlasBridgePipeline" if config.objective == "bridge_matching" else "DiffusionPipeline"
        module = "atlas_diffusers" if name == "AtlasBridgePipeline" else "diffusers"
        load = f"from {module} import {name}\n\npipeline = {name}.from_pretrained({PROMPT!r})"
    else:
        load = (
            f"from diffusers import DiffusionPipeline\n\npipeline = DiffusionPipeline.from_pretrained({config.init_from!r})\n"
            f"pipeline.load_lora_weights({PROMPT!r})"
        )
    return f"```python\nimport atlas_diffusers\n{load}\n```"


def _data(config: TrainingConfig, pictures: Any) -> str:
    source = f"`{config.dataset.root or config.dataset.name}`"
    if config.dataset.streaming:
        return f"A stream of {source}."
    some = [text for text in dict.fromkeys(pictures.captions()) if text][:3]
    told = f"{len(pictures):,} pictures of {source} at {config.dataset.resolution} pixels"
    return told + (f", with captions such as {', '.join(map(repr, some))}." if some else ", without captions.")


def _distances(output: Path) -> str:
    file = max(output.glob("evaluation-*.json"), default=None)
    if file is None:
        return "Not measured: `eval_interval` in a recipe, or `atlas-diffusers evaluate`, measures it."
    rows = [f"| {name} | {value:.4f} |" for name, value in json.loads(file.read_text()).items() if isinstance(value, float)]
    return (
        "By the last evaluation; `nearest_median` is the median RMS distance of generated pictures to the nearest of the data, "
        "in units of [-1, 1], and near 0 where they are copies.\n\n| metric | value |\n|---|---|\n" + "\n".join(rows)
    )


def push(folder: Path, repository: str, private: bool = False) -> str:
    """
    Upload a folder to ``user/name`` of the hub, which is made if it is not there; the files of a repository that the folder
    lacks stay.

    Returns:
        The address.

    Raises:
        ValueError: for a name that is no ``user/name``; ``OSError`` for a folder without a model, or where the hub refuses.
    """
    if repository.count("/") != 1 or not all(repository.split("/")):
        raise ValueError(f"repository {repository!r}: expected user/name")
    if not any((folder / name).is_file() for name in ("model_index.json", "pytorch_lora_weights.safetensors")):
        raise OSError(f"{folder} is neither a pipeline nor adapters")
    from huggingface_hub import HfApi

    hub = HfApi()
    address = hub.create_repo(repository, private=private, exist_ok=True)
    hub.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload by atlas-diffusers")
    return str(address)
