"""Checkpoints: one safetensors file, one JSON file and their hashes in a folder that appears complete or not at all."""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

PREFIX = "checkpoint-"
TENSORS, STATE, HASHES = "state.safetensors", "state.json", "hashes.json"


def save_checkpoint(folder: Path, step: int, tensors: dict[str, torch.Tensor], state: dict, keep: int) -> Path:
    """
    Write ``folder/checkpoint-STEP``: first under a temporary name, synced to disk, then renamed; then prune to ``keep``.

    Raises:
        OSError: if the disk is full; earlier checkpoints stay as they were.
    """
    final, temporary = folder / f"{PREFIX}{step}", folder / f".{PREFIX}{step}.partial"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        save_file({k: v.detach().contiguous().cpu() for k, v in tensors.items()}, temporary / TENSORS)
    except SafetensorError as error:
        shutil.rmtree(temporary)
        raise OSError(f"checkpoint {final} could not be written: {error}") from error
    (temporary / STATE).write_text(json.dumps({**state, "step": step}, indent=1), encoding="utf-8")
    hashes = {name: _hash(temporary / name) for name in (TENSORS, STATE)}
    (temporary / HASHES).write_text(json.dumps(hashes, indent=1), encoding="utf-8")
    for file in temporary.iterdir():
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first; folders of other names, such as ``checkpoint-best``, are left alone."""
    found = ((path, re.fullmatch(rf"{PREFIX}(\d+)", path.name)) for path in folder.glob(f"{PREFIX}*"))
    return [path for _, path in sorted((int(match[1]), path) for path, match in found if match)]


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint, or ``None``."""
    return next(reversed(checkpoints(folder)), None)


def load_checkpoint(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """
    The tensors and the state of a checkpoint.

    Raises:
        OSError: if a file is missing, or is not what was written, naming it.
    """
    try:
        if is_hashed(path):
            _check_hashes(path)
        tensors, state = load_file(path / TENSORS), json.loads((path / STATE).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise OSError(f"checkpoint {path} is damaged: a file is missing ({error})") from error
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, SafetensorError) as error:
        raise OSError(f"checkpoint {path} is damaged: {error}") from error
    return tensors, state if is_hashed(path) else {**_before_hashes(tensors, state), **state}


def is_hashed(path: Path) -> bool:
    """Whether a checkpoint has hashes of its files; early ones have none."""
    return (path / HASHES).is_file()


def _check_hashes(path: Path) -> None:
    hashes = json.loads((path / HASHES).read_text(encoding="utf-8"))
    if changed := [name for name in (TENSORS, STATE) if _hash(path / name) != hashes[name]]:
        raise OSError(
            f"checkpoint {path} is damaged: {' and '.join(changed)} changed since it was written; remove the folder to go on "
            "from an older checkpoint"
        )


def _before_hashes(tensors: dict[str, torch.Tensor], state: dict) -> dict:
    """What the state of a checkpoint says that is too early to have hashes."""
    names = [key.removeprefix("weight.") for key in tensors if key.startswith("weight.")]
    still = [name for name in names if f"moment.{name}.step" not in tensors]
    return {"origin": None, "lr_step": state.get("lr_scheduler", {}).get("last_epoch"), "without_moments": still}


def _hash(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as handle:
        while chunk := handle.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()
