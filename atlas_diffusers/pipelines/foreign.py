"""A pipeline from a single file of weights."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ..models import AtlasUNet2DModel
from ..schedulers import AtlasDDIMScheduler
from .loading import check_values, named_damage, read_json_object
from .pipeline_atlas import AtlasPipeline

WEIGHT_FILES = (".safetensors", ".pt", ".pth", ".ckpt")
WEIGHTS = ("ema", "ema_state_dict", "model", "model_state_dict", "state_dict", "unet")
PREFIXES = ("_orig_mod.", "module.")


def load_any(checkpoint: str, **options: Any) -> AtlasPipeline:
    """
    A pipeline folder, a hub id, an embedded pipeline's name, or a file of an ``AtlasUNet2DModel``'s weights: safetensors, or a
    ``.pt`` of plain tensors. A file needs the network's configuration: under ``config`` in a ``.pt``, or as ``config.json``, or
    a JSON file of the same name, beside it.

    Args:
        checkpoint: which.
        options: of ``from_pretrained``; of a file, ``dtype`` alone is used.

    Raises:
        OSError: for what does not exist, cannot be read, or holds pickled objects; ``ValueError`` for weights that do not fit.
    """
    path = Path(checkpoint)
    if path.suffix not in WEIGHT_FILES:
        return AtlasPipeline.from_pretrained(checkpoint, **options)
    if not path.is_file():
        raise OSError(f"{path}: there is no such file")
    state, config = _read(path)
    source, config = (path, config) if config is not None else _config_beside(path)
    check_values(config, AtlasUNet2DModel, source)
    state = {_plain(name): value for name, value in state.items()}
    with torch.device("meta"):
        unet: Any = AtlasUNet2DModel.from_config(config)
    expected = unet.state_dict()
    wrong = [name for name, value in expected.items() if name not in state or state[name].shape != value.shape]
    if wrong or len(state) != len(expected):
        besides = sorted(set(state) - set(expected))
        found = f"missing or of another shape {wrong[:3]}, besides {besides[:3]}"
        raise ValueError(f"{path} does not fit its configuration: {found}")
    unet.load_state_dict(state, assign=True)
    unet.to(options.get("dtype") or torch.float32)
    return AtlasPipeline(unet.eval(), AtlasDDIMScheduler(clip_sample=False))


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict | None]:
    """Weights, averaged ones first, and the configuration if it is in the file."""
    with named_damage(f"{path}: weights are damaged"):
        if path.suffix == ".safetensors":
            return load_file(path), None
        try:
            data = torch.load(path, map_location="cpu", weights_only=True)
        except torch.serialization.pickle.UnpicklingError as error:
            raise OSError(
                f"{path} holds pickled objects, which could run code when read: refused. Save its state_dict as safetensors"
            ) from error
    if not isinstance(data, dict):
        raise OSError(f"{path} holds {type(data).__name__}; expected a state dict")
    state = next((data[name] for name in WEIGHTS if isinstance(data.get(name), dict)), data)
    tensors = {name: value for name, value in state.items() if torch.is_tensor(value)}
    config = data.get("config")
    if not (config is None or isinstance(config, dict)):
        raise OSError(f"{path}: config={config!r:.100}; expected the network's configuration, names and values")
    return tensors, config


def _config_beside(path: Path) -> tuple[Path, dict]:
    for file in (path.with_suffix(".json"), path.with_name("config.json")):
        if file.is_file():
            return file, read_json_object(file)
    raise OSError(f"{path}: the network's configuration is missing; expected {path.with_suffix('.json').name} or config.json")


def _plain(name: str) -> str:
    """Without what ``torch.compile`` and ``DataParallel`` put in front."""
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return name
