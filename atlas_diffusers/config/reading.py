"""From a YAML or JSON file and ``--key value`` overrides to a validated model."""

import copy
import difflib
import json
import re
import reprlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from yaml.composer import ComposerError

Model = TypeVar("Model", bound=BaseModel)

MOST_VALUES, LONGEST = 100_000, 100


# what people bring from Diffusers' examples and from kohya's scripts
ELSEWHERE = {
    "lr": "learning_rate", "train_data_dir": "dataset.root", "data_dir": "dataset.root", "dataset_name": "dataset.name",
    "instance_data_dir": "dataset.root", "instance_prompt": "dataset.caption", "class_prompt": "class_images.prompt",
    "class_data_dir": "class_images.root", "num_class_images": "class_images.count", "prior_loss_weight": "class_images.weight",
    "caption_extension": "dataset.captions", "enable_bucket": "dataset.aspect_buckets",
    "train_batch_size": "batch_size", "gradient_accumulation_steps": "micro_batch_size", "max_train_steps": "max_steps",
    "num_train_epochs": "epochs", "max_train_epochs": "epochs", "num_epochs": "epochs", "resume_from_checkpoint": "resume",
    "pretrained_model_name_or_path": "init_from", "checkpointing_steps": "checkpoint_interval",
    "save_every_n_steps": "checkpoint_interval", "validation_prompt": "sample_prompts", "validation_prompts": "sample_prompts",
    "validation_steps": "sample_interval", "lr_warmup_steps": "warmup_steps", "max_grad_norm": "gradient_clip_norm",
    "snr_gamma": "loss_weighting", "noise_offset": "offset_noise", "report_to": "trackers", "network_dim": "lora.rank",
    "rank": "lora.rank", "network_alpha": "lora.alpha", "use_ema": "ema_decay", "resolution": "dataset.resolution",
    "center_crop": "dataset.center_crop", "random_flip": "dataset.random_flip", "cache_latents_to_disk": "cache_latents",
    "adam_weight_decay": "weight_decay", "dataloader_num_workers": "dataset.num_workers", "checkpoint_dir": "output_dir",
}  # fmt: skip


class _Loader(yaml.SafeLoader):
    """Safe YAML with JSON's scalars: ``1e-4`` is a number, as in YAML 1.2 (PyYAML wants ``1.0e-4``), a date is a text."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Of two equal keys PyYAML takes the last one without a word."""
        node = super().compose_mapping_node(anchor)
        if key := _twice([key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]):
            raise ComposerError(None, None, f"key {key!r} stands there twice", node.start_mark)
        return node


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_mapping(path: str | Path) -> dict[str, Any]:
    """
    Read a YAML or JSON file whose top level is a mapping.

    Raises:
        ValueError: for a file that does not parse or holds something else; ``OSError`` if it cannot be read.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        data = json.loads(text, object_pairs_hook=_unique) if str(path).endswith(".json") else yaml.load(text, _Loader)
        _count(data, {})
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: does not parse: it is not UTF-8 (byte {error.start})") from error
    except RecursionError as error:
        raise ValueError(f"{path}: does not parse: it is nested too deeply") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path}: does not parse: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path}: the top level must be a mapping of keys to values, found {type(data).__name__}")
    return data


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of a JSON file; ``ValueError`` for a key that stands there twice."""
    if key := _twice([key for key, _ in pairs]):
        raise ValueError(f"key {key!r} stands there twice")
    return dict(pairs)


def _twice(keys: list[str]) -> str | None:
    return next((key for key, count in Counter(keys).items() if count > 1), None)


def _count(value: object, known: dict[int, int]) -> int:
    """
    Values in ``value``, counted as often as aliases repeat them.

    Raises:
        ValueError: for more than ``MOST_VALUES``, or a key that is not a text; ``RecursionError`` for a circle of aliases.
    """
    if not isinstance(value, (dict, list)):
        return 1
    if id(value) not in known:
        if isinstance(value, dict) and (wrong := [key for key in value if not isinstance(key, str)]):
            raise ValueError(f"key {wrong[0]!r} is not a text; put it into quotes")
        members = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_count(member, known) for member in members)
        if known[id(value)] > MOST_VALUES:
            raise ValueError(f"it has more than {MOST_VALUES:,} values")
    return known[id(value)]


def apply_overrides(data: dict[str, Any], arguments: list[str]) -> dict[str, Any]:
    """
    Set ``--key value``, ``--key=value`` and ``--section.key value`` pairs in a copy of ``data``; values are read as YAML.

    Raises:
        ValueError: for a key without a value, or a section that is not a mapping.
    """
    result = copy.deepcopy(data)
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
            _count(target[last], {})
        except RecursionError as error:
            raise ValueError(f"--{key[2:]}: nested too deeply") from error
        except (yaml.YAMLError, ValueError) as error:
            raise ValueError(f"--{key[2:]}: {_shown(value)} does not parse: {' '.join(str(error).split())}") from error
    return result


def merge(data: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """``data`` with ``changes``, section by section."""
    both = {key: merge(data[key], value) for key, value in changes.items() if _are_sections(data.get(key), value)}
    return {**data, **changes, **both}


def _are_sections(*values: Any) -> bool:
    return all(isinstance(value, dict) for value in values)


def _fields(model: type[BaseModel], location: tuple) -> list[str]:
    """Names that the model at this location knows."""
    for part in location:
        annotation: Any = model.model_fields[part].annotation if part in model.model_fields else None
        model = next((m for m in (annotation, *getattr(annotation, "__args__", ())) if hasattr(m, "model_fields")), model)
    return list(model.model_fields)


def validate(model: type[Model], data: Mapping[str, object]) -> Model:
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
                lines.append(unknown_key(name, _fields(model, item["loc"][:-1])))
            elif name:
                lines.append(f"{name}={_shown(item['input'])}: {item['msg']}")
            else:
                lines.append(item["msg"])
        raise ValueError("; ".join(lines)) from error


def unknown_key(name: str, known: list[str]) -> str:
    """What is wrong with the dotted key ``name``, with its name here or the nearest of the ``known`` ones."""
    last = name.rpartition(".")[2]
    near = [ELSEWHERE[last]] if last in ELSEWHERE else difflib.get_close_matches(last, known, n=1)
    return f"{name}: unknown key" + (f", did you mean {near[0]!r}?" if near else "")


def _shown(value: Any) -> str:
    """A value in a message: whole where it is short."""
    text = repr(value) if not isinstance(value, (dict, list)) else reprlib.repr(value)
    return text if len(text) <= LONGEST else text[:LONGEST] + "..."
