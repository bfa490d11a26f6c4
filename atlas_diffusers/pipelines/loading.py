"""Checks of a pipeline folder before Diffusers reads it, so that a mistake is named in one line."""

import json
from pathlib import Path

from ..pretrained import embedded_pipelines, pretrained_path


def resolve_pipeline(name: str) -> str:
    """
    A folder or hub id from what a user typed: an embedded pipeline's name, a folder, or ``user/repository``.

    Raises:
        OSError: if it is none of these, the folder is no pipeline, or one of its components is missing.
    """
    if embedded := pretrained_path(name):
        return str(embedded)
    folder = Path(name)
    if not folder.is_dir():
        parts = name.split("/")
        if len(parts) == 2 and all(parts) and not name.startswith((".", "~")):
            return name
        raise OSError(
            f"no pipeline {name!r}: expected a folder with model_index.json, a hub id user/repository, "
            f"or one of the embedded pipelines {embedded_pipelines()}"
        )
    check_folder(folder)
    return str(folder)


def check_folder(folder: Path) -> None:
    """Raise ``OSError`` if the folder has no readable ``model_index.json`` or lacks a component that it lists."""
    index = folder / "model_index.json"
    if not index.is_file():
        raise OSError(f"{folder} is not a pipeline folder: it has no model_index.json")
    try:
        listed = json.loads(index.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise OSError(f"{index} is damaged: {error}") from error
    for component, value in listed.items():
        is_component = isinstance(value, list) and len(value) == 2 and value[0] is not None
        if is_component and not (folder / component).is_dir():
            raise OSError(f"{folder}: component {component!r} is missing; model_index.json expects {value[1]} in {component}/")
