"""From a YAML or JSON file and ``--key value`` overrides to a validated model."""

import difflib
import json
import re
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

Model = TypeVar("Model", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """Safe YAML in which ``1e-4`` is a number, as in YAML 1.2 and JSON (PyYAML wants ``1.0e-4``)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_mapping(path: str | Path) -> dict[str, Any]:
    """
    Read a YAML or JSON file whose top level is a mapping.

    Raises:
        ValueError: for a file that does not parse or holds something else; ``OSError`` if it cannot be read.
    """
    text = Path(path).read_text(encoding="utf-8")
    try:
        data = json.loads(text) if str(path).endswith(".json") else yaml.load(text, _Loader)
    except (yaml.YAMLError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: does not parse: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path}: the top level must be a mapping of keys to values, found {type(data).__name__}")
    return data


def apply_overrides(data: dict[str, Any], arguments: list[str]) -> dict[str, Any]:
    """
    Set ``--key value``, ``--key=value`` and ``--section.key value`` pairs in a copy of ``data``; values are read as YAML.

    Raises:
        ValueError: for a key without a value, or a section that is not a mapping.
    """
    result = json.loads(json.dumps(data))
    queue = list(arguments)
    while queue:
        key, equals, value = queue.pop(0).partition("=")
        if not key.startswith("--") or not (equals or queue):
            raise ValueError(f"expected --key value, got {key!r}" + ("" if key.startswith("--") else " in key position"))
        *sections, last = key[2:].split(".")
        target = result
        for section in sections:
            target = target.setdefault(section, {})
            if not isinstance(target, dict):
                raise ValueError(f"--{key[2:]}: {section!r} is a value, not a section")
        value = value if equals else queue.pop(0)
        try:
            target[last] = yaml.load(value, _Loader)
        except yaml.YAMLError as error:
            raise ValueError(f"--{key[2:]}: {value!r} does not parse: {' '.join(str(error).split())}") from error
    return result


def _fields(model: type[BaseModel], location: tuple) -> list[str]:
    """Names that the model at this location knows."""
    for part in location:
        annotation = model.model_fields[part].annotation if part in model.model_fields else None
        model = next((m for m in (annotation, *getattr(annotation, "__args__", ())) if hasattr(m, "model_fields")), model)
    return list(model.model_fields)


def validate(model: type[Model], data: dict[str, Any]) -> Model:
    """
    Build ``model`` from ``data``; every mistake is reported, unknown keys with the nearest known name.

    Raises:
        ValueError: one line a mistake: field, value, what is allowed.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        lines = []
        for item in error.errors():
            name = ".".join(str(part) for part in item["loc"])
            if item["type"] == "extra_forbidden":
                near = difflib.get_close_matches(str(item["loc"][-1]), _fields(model, item["loc"][:-1]), n=1)
                lines.append(f"{name}: unknown key" + (f", did you mean {near[0]!r}?" if near else ""))
            else:
                lines.append(f"{name}={item['input']!r}: {item['msg']}")
        raise ValueError("; ".join(lines)) from error
