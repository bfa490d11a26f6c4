"""Adapters of others, checked against the pipeline before they change it."""

import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

FILE = "pytorch_lora_weights.safetensors"
SHOWN = 3
MATRIX = re.compile(r"(\w+?)\.(.+)\.(?:lora_(A|B)|lora\.(up|down)|lora_linear_layer\.(up|down))\.weight")


def load_adapter(pipeline: Any, source: str, name: str) -> None:
    """
    ``pipeline.load_lora_weights``, refused where it would leave something out.

    Args:
        source: a file, a folder, or a hub id.
        name: of the adapter.

    Raises:
        OSError: for a source that is not there or cannot be read; ``ValueError`` for a pipeline without adapters, and for
            adapters of another architecture, naming the first keys that do not fit.
    """
    if not hasattr(pipeline, "load_lora_weights"):
        raise ValueError(f"{type(pipeline).__name__} takes no adapters: it has no load_lora_weights")
    path = Path(source)
    if path.is_dir() and not any(path.glob("*.safetensors")):
        raise OSError(f"adapters {source}: the folder has no {FILE}")
    if not path.exists() and (source.count("/") != 1 or path.suffix):
        raise OSError(f"adapters {source}: there is no such file or folder")
    try:
        found = type(pipeline).lora_state_dict(source)
    except SafetensorError as error:
        raise OSError(f"adapters {source} cannot be read: {error}") from error
    state = found[0] if isinstance(found, tuple) else found
    if misfits := _misfits(pipeline, state):
        rest = f" and {len(misfits) - SHOWN} more" if len(misfits) > SHOWN else ""
        kind, first = type(pipeline).__name__, ", ".join(misfits[:SHOWN])
        raise ValueError(f"adapters {source} are of another architecture than this {kind}: {first}{rest}")
    with torch.random.fork_rng():
        pipeline.load_lora_weights(source, adapter_name=name)


def _misfits(pipeline: Any, state: dict[str, torch.Tensor]) -> list[str]:
    """Keys of matrices A and B whose layer is not there, or has other sizes."""
    misfits = []
    for key, value in state.items():
        if (match := MATRIX.fullmatch(key)) is None:
            continue
        component, layer, side = match[1], match[2], match[3] or match[4] or match[5]
        try:
            weight = getattr(pipeline, component).get_submodule(layer).weight
        except AttributeError:
            misfits.append(f"{key} (no such layer)")
            continue
        axis = 1 if side in ("A", "down") else 0
        if value.shape[axis] != weight.shape[axis]:
            misfits.append(f"{key} {tuple(value.shape)} for a weight {tuple(weight.shape)}")
    return misfits
