"""The folder from which an interrupted calibration goes on: the teacher's batches, and every table that was tried."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ..adams_bashforth import adams_bashforth
from .fit import distance
from .model import Model
from .teacher import Trajectories, advance

SAME_MODEL = 1e-3  # relative difference of velocities that rounding may leave
NAMES = ("states", "velocities", "ends")


def write_whole(file: Path, write: Any) -> None:
    """``write(path)`` beside the file and renamed, so that the file is whole or not there."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f"{file.name}.part")
    try:
        write(unfinished)
        os.replace(unfinished, file)
    finally:
        unfinished.unlink(missing_ok=True)


def write_text(file: Path, text: str) -> None:
    write_whole(file, lambda path: path.write_text(text, encoding="utf-8"))


def fingerprint(model: Model, sigmas: list[float], rows: slice) -> torch.Tensor:
    """
    Start noise of some trajectories and the model's velocities at two states, (3, batch, d): at the start, and at the middle
    of the grid, where the first takes it. Two calls a trajectory; of another model, prompts or guidance, others.
    """
    pair, found = [sigmas[0], sigmas[len(sigmas) // 2]], []
    angles = torch.tensor(pair, dtype=torch.float64).atan().tolist()

    def step(n: int, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        found.extend([x, v] if n == 0 else [v])
        return advance(x, [v], adams_bashforth(angles[:1], angles[1]))

    model.march(pair, step, rows=rows)
    return torch.stack(found)


class Cache:
    """
    Args:
        folder: made where it is missing.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def read_teacher(self, model: Model, sigmas: list[float], rows: slice) -> Trajectories | None:
        """
        Trajectories of a batch, if the folder has them.

        Raises:
            ValueError: unless they are on this grid, from the noise and by the model of now.
        """
        file = self._teacher_file(rows)
        if not file.exists():
            return None
        stored = load_file(file)
        now = fingerprint(model, sigmas, rows)
        then = stored["fingerprint"].to(now.device)
        if stored["sigmas"].tolist() != sigmas or then.shape != now.shape or not torch.equal(then[0], now[0]):
            raise ValueError(f"{file} belongs to another calibration: other noise, betas, or number of trajectories or steps")
        differences = [distance(a, b) / b.square().mean().sqrt().item() for a, b in zip(now[1:], then[1:])]
        if not max(differences) <= SAME_MODEL:
            raise ValueError(f"{file} belongs to another calibration: the model, its prompts or its guidance scale differ")
        return Trajectories(sigmas, *(stored[name].to(now.device) for name in NAMES))

    def write_teacher(self, model: Model, part: Trajectories, rows: slice) -> None:
        """Store the trajectories of a batch."""
        tensors = {name: getattr(part, name) for name in NAMES} | {"fingerprint": fingerprint(model, part.sigmas, rows)}
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        tensors["sigmas"] = torch.tensor(part.sigmas, dtype=torch.float64)
        write_whole(self._teacher_file(rows), lambda path: save_file(tensors, path))

    def _teacher_file(self, rows: slice) -> Path:
        return self.folder / f"teacher-{rows.start:05}.safetensors"

    def read_tables(self, steps: int, teacher: Trajectories) -> dict[tuple, dict]:
        """What was stored of tables of ``steps`` nodes on these trajectories, by their keys."""
        file = self._tables_file(steps)
        stored = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        if stored.get("teacher") != identity(teacher):
            return {}
        return {tuple(entry["key"]): entry for entry in stored["tables"]}

    def write_tables(self, steps: int, teacher: Trajectories, tables: list[dict]) -> None:
        """Store the tables of ``steps`` nodes that were tried so far."""
        write_text(self._tables_file(steps), json.dumps({"teacher": identity(teacher), "tables": tables}))

    def _tables_file(self, steps: int) -> Path:
        return self.folder / f"tables-{steps:03}.json"


def identity(teacher: Trajectories) -> list[float]:
    """Numbers that other trajectories do not have."""
    return [*teacher.states.shape, teacher.states.double().abs().sum().item(), teacher.ends.double().sum().item()]
