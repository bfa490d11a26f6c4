"""Checkpoints: safetensors shards, JSON and hashes in a folder that appears complete or not at all."""

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from diffusers.utils import logging
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from .processes import place, together

logger = logging.get_logger(__name__)

PREFIX = "checkpoint-"
STATE, HASHES = "state.json", "hashes.json"
REMEDY = "give resume: newest_complete to go on from the newest checkpoint that is whole"


def save_checkpoint(folder: Path, step: int, tensors: dict[str, torch.Tensor], state: Mapping[str, object], keep: int) -> Path:
    """
    Write ``folder/checkpoint-STEP``: first under a temporary name, synced to disk, then renamed; then prune to ``keep``.

    All processes of a run call it, each writes a file of its share of the tensors, and the first one the rest. A tensor that
    every process holds whole is written once.

    Raises:
        OSError: in all processes, if one cannot write, such as to a full disk; earlier checkpoints stay as they were.
    """
    final, temporary, main = folder / f"{PREFIX}{step}", folder / f".{PREFIX}{step}.partial", place()[0] == 0
    try:
        _once(lambda: _start(folder, temporary), main)
        together(lambda: _look(temporary))
        _write(tensors, temporary)
        hashes = {name: digest for own in together(lambda: _hashes(temporary)) for name, digest in own.items()}
        _once(lambda: _finish(temporary, {**state, "step": step}, hashes), main)
    except OSError as error:
        if main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(f"checkpoint {final} could not be written: {error}") from error
    _once(lambda: _publish(folder, temporary, final, keep), main)
    return final


def _once(work: Callable[[], None], main: bool) -> None:
    """On the main process, while the others wait."""
    together(work if main else lambda: None)


def _start(folder: Path, temporary: Path) -> None:
    for left in folder.glob(f".{PREFIX}*.partial"):
        shutil.rmtree(left)
    temporary.mkdir(parents=True)


def _look(folder: Path) -> None:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not there, or not on a disk that all processes share")


def _write(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    with _disk_errors():
        dcp.save(contiguous, storage_writer=writer, no_dist=place()[1] == 1)


@contextmanager
def _disk_errors() -> Iterator[None]:
    """What processes met as one ``OSError``, where it was the disk; other mistakes keep their traceback."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        try:
            yield
        except CheckpointException as error:
            reasons = {rank: failure[0] for rank, failure in error.failures.items()}
            if stop := next((reason for reason in reasons.values() if isinstance(reason, KeyboardInterrupt)), None):
                raise stop from error
            if not all(isinstance(reason, (OSError, SafetensorError)) for reason in reasons.values()):
                raise
            raise OSError("; ".join(f"process {rank}: {reason}" for rank, reason in sorted(reasons.items()))) from error


def _hashes(folder: Path) -> dict[str, str]:
    """Of this process's share of the files."""
    rank, world = place()
    return {file.name: _hash(file) for file in sorted(folder.glob("*.safetensors"))[rank::world]}


def _finish(temporary: Path, state: Mapping[str, object], hashes: dict[str, str]) -> None:
    (temporary / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
    hashes = hashes | {STATE: _hash(temporary / STATE)}
    (temporary / HASHES).write_text(json.dumps(hashes, indent=1), encoding="utf-8")
    for name in (STATE, HASHES, "."):
        _sync(temporary / name)


def _publish(folder: Path, temporary: Path, final: Path, keep: int) -> None:
    if final.exists():
        _remove(final)
    temporary.rename(final)
    _sync(folder)
    for old in checkpoints(folder)[:-keep]:
        _remove(old)


def _remove(checkpoint: Path) -> None:
    """So that a kill on the way leaves no part of it under its name."""
    hidden = checkpoint.with_name(f".{checkpoint.name}.removed.partial")
    checkpoint.rename(hidden)
    shutil.rmtree(hidden)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoints, oldest first; folders of other names, such as ``checkpoint-best``, are left alone."""
    found = ((path, re.fullmatch(rf"{PREFIX}(\d+)", path.name)) for path in folder.glob(f"{PREFIX}*"))
    return [path for _, path in sorted((int(match[1]), path) for path, match in found if match)]


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint, or ``None``."""
    return next(reversed(checkpoints(folder)), None)


def newest_complete(folder: Path) -> Path | None:
    """The newest checkpoint whose files are all there and as they were written; those passed over are named in a warning."""
    for path in reversed(checkpoints(folder)):
        try:
            check_files(path)
        except OSError as error:
            logger.warning(f"passed over: {error}")
        else:
            return path
    return None


def check_files(path: Path) -> None:
    """
    Compare a checkpoint with its hashes; of several processes each reads its share.

    Raises:
        OSError: if a file is missing, or is not what was written, naming it.
    """
    rank, world = place()
    problems = dict.fromkeys(text for part in together(lambda: _damage(path, rank, world)) for text in part)
    if problems:
        raise OSError(f"checkpoint {path} is damaged: {'; '.join(problems)}; {REMEDY}")


def _damage(path: Path, rank: int, world: int) -> list[str]:
    if not is_hashed(path):
        return _unreadable(path)
    try:
        hashes = json.loads((path / HASHES).read_text(encoding="utf-8"))
        names = sorted({STATE, *hashes})[rank::world]
        missing = [f"{name} is missing" for name in names if not (path / name).is_file()]
        changed = [name for name in names if (path / name).is_file() and _hash(path / name) != hashes[name]]
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        return [f"{HASHES} cannot be read ({error})"]
    return missing + ([f"{' and '.join(changed)} changed since it was written"] if changed else [])


def is_hashed(path: Path) -> bool:
    """Whether a checkpoint has hashes of its files; early ones have none."""
    return (path / HASHES).is_file()


def _unreadable(path: Path) -> list[str]:
    """What can be said of one that has none."""
    try:
        read_state(path)
    except FileNotFoundError as error:
        return [f"a file is missing ({error})"]
    except (UnicodeDecodeError, json.JSONDecodeError, SafetensorError) as error:
        return [str(error)]
    return [] if read_layout(path) else ["it has no tensors"]


def read_state(path: Path) -> dict[str, Any]:
    """What a checkpoint has beside its tensors."""
    state = json.loads((path / STATE).read_text(encoding="utf-8"))
    return state if is_hashed(path) else {**_before_hashes(read_layout(path), state), **state}


def _before_hashes(layout: dict[str, torch.Tensor], state: dict[str, Any]) -> dict[str, Any]:
    """What the state of a checkpoint says that is too early to have hashes."""
    names = [key.removeprefix("weight.") for key in layout if key.startswith("weight.")]
    still = [name for name in names if f"moment.{name}.step" not in layout]
    return {"origin": None, "lr_step": state.get("lr_scheduler", {}).get("last_epoch"), "without_moments": still}


def read_layout(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint on the meta device, however many files they are split over."""
    found = dcp.HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    tensors = {name: data for name, data in found.items() if isinstance(data, TensorStorageMetadata)}
    return {name: torch.empty(data.size, dtype=data.properties.dtype, device="meta") for name, data in tensors.items()}


def read_tensors(path: Path, into: dict[str, torch.Tensor]) -> None:
    """
    Fill tensors by name, whole ones or this process's parts of split ones, wherever the files have them.

    Raises:
        OSError: if a file cannot be read.
    """
    with _disk_errors():
        dcp.load(into, storage_reader=dcp.HuggingFaceStorageReader(str(path)), no_dist=True)


def load_checkpoint(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """
    All tensors, whole, and the state of a checkpoint.

    Raises:
        OSError: if a file is missing, or is not what was written, naming it.
    """
    check_files(path)
    tensors = {name: torch.empty_like(tensor, device="cpu") for name, tensor in read_layout(path).items()}
    read_tensors(path, tensors)
    return tensors, read_state(path)


def _hash(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as handle:
        while chunk := handle.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()
