"""Checks of a pipeline folder before Diffusers reads it, so that a mistake is named in one line."""

import inspect
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from huggingface_hub.errors import StrictDataclassError
from pydantic import ConfigDict, TypeAdapter, ValidationError
from safetensors import SafetensorError

from ..pretrained import embedded_pipelines, pretrained_path

CONFIG_FILES = ("config.json", "scheduler_config.json")
# what Diffusers, transformers and our constructors raise for values of the right type that make no sense
MALFORMED = (
    SafetensorError, StrictDataclassError, EOFError, AttributeError, LookupError, TypeError, ArithmeticError, RuntimeError,
    AssertionError,
)  # fmt: skip


def resolve_pipeline(name: str, cls: type) -> str:
    """
    A folder or hub id from what a user typed: an embedded pipeline's name, a folder, or ``user/repository``.

    Args:
        name: which.
        cls: class of the pipeline, whose constructor says what the folder's index may hold.

    Raises:
        OSError: if it is none of these, the folder is no pipeline, or one of its components is missing or malformed.
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
    check_folder(folder, cls)
    return str(folder)


def class_of(source: str) -> str | None:
    """The class that a pipeline's index names, if there is one; ``source`` is an embedded pipeline, a folder, or a hub id."""
    folder = pretrained_path(source) or Path(source)
    if folder.is_dir():
        index = folder / "model_index.json"
        name = read_json_object(index).get("_class_name") if index.is_file() else None
    else:
        config: Any = DiffusionPipeline.load_config(source) if "/" in source else {}
        name = config.get("_class_name")
    return name if isinstance(name, str) else None


def check_folder(folder: Path, cls: type) -> None:
    """Raise ``OSError`` if the folder's ``model_index.json`` cannot be read, or what it lists is missing or malformed."""
    index = folder / "model_index.json"
    if not index.is_file():
        raise OSError(f"{folder} is not a pipeline folder: it has no model_index.json")
    listed = read_json_object(index)
    if not isinstance(listed.get("_class_name"), str | list):
        raise OSError(f"{index}: _class_name={listed.get('_class_name')!r}; expected the name of a pipeline's class")
    parameters = inspect.signature(cls).parameters
    options = {name for name, parameter in parameters.items() if parameter.annotation in (int, float, float | None)}
    check_values({name: value for name, value in listed.items() if name in options}, cls, index)
    for name, value in listed.items():
        is_component = name in parameters or isinstance(value, list)  # other pipelines list options of their own
        if is_component and name not in options and not name.startswith("_"):
            _check_component(folder, name, value)


def _check_component(folder: Path, component: str, value: Any) -> None:
    index = folder / "model_index.json"
    if not isinstance(value, list) or len(value) != 2 or not all(part is None or isinstance(part, str) for part in value):
        raise OSError(f"{index}: {component}={value!r}; expected a library and the name of a class")
    library, name = value
    if name is None:
        return
    if not (folder / component).is_dir():
        raise OSError(f"{folder}: component {component!r} is missing; model_index.json expects {name} in {component}/")
    for file in (folder / component / name for name in CONFIG_FILES):
        if file.is_file():
            config = read_json_object(file)
            if library == "atlas_diffusers":
                check_values(config, _own_class(name, index), file)


def _own_class(name: str, file: Path) -> type:
    import atlas_diffusers

    found = getattr(atlas_diffusers, name, None)
    if not inspect.isclass(found):
        raise OSError(f"{file}: atlas_diffusers has no class {name!r}")
    return found


def read_json_object(file: Path) -> dict[str, Any]:
    """The object that a JSON file holds; ``OSError`` names a file that holds none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise OSError(f"{file} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise OSError(f"{file} holds {type(content).__name__}; expected an object of names and values")
    return content


def check_values(config: Mapping[str, object], cls: type, source: Path) -> None:
    """Raise ``OSError`` for a value in a configuration that is not of its constructor argument's annotated type."""
    for name, parameter in inspect.signature(cls).parameters.items():
        if name not in config or parameter.annotation is parameter.empty or config[name] is None is parameter.default:
            continue
        try:
            _adapter(parameter.annotation).validate_json(json.dumps(config[name]), strict=True)
        except ValidationError as error:
            expected = getattr(parameter.annotation, "__name__", parameter.annotation)
            raise OSError(f"{source}: {name}={config[name]!r}; expected {expected}") from error


@cache
def _adapter(annotation: Any) -> TypeAdapter:
    return TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True))


class named_damage:
    """Turns whatever a reader stumbles over inside into an ``OSError`` that says what is mistaken, as in "X is damaged"."""

    def __init__(self, mistake: str):
        self.mistake = mistake

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        is_bare = kind is Exception  # what tokenizers raises
        if (is_bare or isinstance(error, MALFORMED)) and not isinstance(error, torch.OutOfMemoryError):
            raise OSError(f"{self.mistake}: {str(error) or type(error).__name__}") from error


def check_components(components: dict[str, Any], source: str) -> None:
    """
    Raise ``OSError`` for networks whose files lacked weights, which Diffusers leaves on the meta device, and for tokenizers
    that pad texts to more tokens than their CLIP text encoder takes, or to less than the marks of begin and end.
    """
    for name, component in components.items():
        if isinstance(component, torch.nn.Module):
            lacking = [key for key, weight in component.named_parameters() if weight.is_meta]
            if lacking:
                shown = ", ".join(lacking[:3]) + (f" and {len(lacking) - 3} more" if len(lacking) > 3 else "")
                raise OSError(f"{source}: the weights of {name} lack {shown}")
        encoder = components.get(name.replace("tokenizer", "text_encoder")) if name.startswith("tokenizer") else None
        config = getattr(encoder, "config", None)
        if component is not None and getattr(config, "model_type", None) == "clip_text_model":
            _check_tokens(name, component.model_max_length, config, source)


def _check_tokens(name: str, length: object, config: Any, source: str) -> None:
    places, end = config.max_position_embeddings, config.eos_token_id
    if type(length) is not int or not 2 <= length <= places:
        raise OSError(f"{source}: {name} has model_max_length={length!r}; its text encoder takes 2 to {places} tokens")
    if type(end) is not int:
        raise OSError(f"{source}: the text encoder of {name} has eos_token_id={end!r}; expected the number of a token")
