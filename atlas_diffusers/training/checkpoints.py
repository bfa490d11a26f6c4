"""Checkpoints: one safetensors file and one JSON file in a folder that appears complete or not at all."""

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

PREFIX = "checkpoint-"


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
        save_file({k: v.detach().contiguous().cpu() for k, v in tensors.items()}, temporary / "state.safetensors")
    except SafetensorError as error:
        shutil.rmtree(temporary)
        raise OSError(f"checkpoint {final} could not be written: {error}") from error
    (temporary / "state.json").write_text(json.dumps({**state, "step": step}, indent=1))
    for file in temporary.iterdir():
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(folder.glob(f"{PREFIX}*"), key=lambda path: int(path.name.removeprefix(PREFIX)))


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint, or ``None``."""
    return next(reversed(checkpoints(folder)), None)


def load_checkpoint(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """
    The tensors and the state of a checkpoint.

    Raises:
        OSError: if a file is missing or damaged, naming it.
    """
    try:
        return load_file(path / "state.safetensors"), json.loads((path / "state.json").read_text())
    except (SafetensorError, json.JSONDecodeError) as error:
        raise OSError(f"checkpoint {path} is damaged: {error}") from error
