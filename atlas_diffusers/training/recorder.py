"""What a run tells while it goes on: a progress bar, ``metrics.jsonl``, trackers of Accelerate, and curves at the end."""

import json
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.utils import logging
from tqdm.auto import tqdm

from ..config import TrainingConfig

logger = logging.get_logger(__name__)

TIMED = 10


class Recorder:
    """
    Writes on the main process, and nothing on the others; as a context it closes the bar at the end.

    Args:
        config: of the run.
        accelerator: whose trackers, by ``config.trackers``, are started and fed.
        step: at which the run starts; rows of ``metrics.jsonl`` after it, of a run that was killed, are dropped.
    """

    def __init__(self, config: TrainingConfig, accelerator: Accelerator, step: int):
        self.folder, self.accelerator, self.main = Path(config.output_dir), accelerator, accelerator.is_main_process
        self.batch = config.batch_size * accelerator.num_processes
        self.file, self.trackers = self.folder / "metrics.jsonl", config.trackers
        text = f"from step {step}" if step else None
        self.bar = tqdm(total=config.max_steps, initial=step, unit="step", desc=text, disable=not self.main)
        self.start, self.logged, self.begun = step, step, perf_counter()
        self.at = self.begun
        if self.main:
            kept = [row for row in self.rows() if row["step"] <= step]
            self.file.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        if self.trackers:
            accelerator.init_trackers(self.folder.name)

    def rows(self) -> list[dict]:
        """What ``metrics.jsonl`` holds."""
        return read_rows(self.file)

    def advance(self, first_loss: torch.Tensor | None = None) -> None:
        """A step of the bar, which shows the first loss at once; after ten steps a line says how long the run will take."""
        self.bar.update()
        if self.main and first_loss is not None:
            self.bar.set_postfix({"loss": f"{first_loss.item():.4f}"})
        if self.main and (done := self.bar.n - self.start) == TIMED:
            left = (self.bar.total - self.bar.n) * (perf_counter() - self.begun) / done
            self.bar.write(f"about {_duration(left)} to go")

    def log(self, step: int, loss: float, learning_rate: float, skipped: int = 0) -> None:
        """A row with the speed since the last one, and how many pictures were skipped so far, if any."""
        now = perf_counter()
        speed = (step - self.logged) * self.batch / max(now - self.at, 1e-9)
        self.logged, self.at = step, now
        self.bar.set_postfix({"loss": f"{loss:.4f}", "images/s": f"{speed:.1f}"})
        seconds = round(self.bar.format_dict["elapsed"], 1)
        row = {"step": step, "loss": loss, "lr": learning_rate, "images_per_second": round(speed, 2), "seconds": seconds}
        self.write(row | {"skipped_images": skipped} if skipped else row)

    def write(self, row: dict) -> None:
        """Append a row, and feed the trackers with its numbers."""
        if not self.main:
            return
        with open(self.file, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if self.trackers:
            self.accelerator.log({k: v for k, v in row.items() if isinstance(v, (int, float))}, step=row["step"])

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *error: Any) -> None:
        self.bar.close()

    def finish(self) -> None:
        """Draw ``curves.png`` if matplotlib, of the extra `plot`, is there."""
        if not self.main:
            return
        try:
            from matplotlib.figure import Figure
        except ImportError:
            logger.info("no curves.png: it needs matplotlib, which the extra 'plot' installs")
            return
        draw_curves(Figure(figsize=(9, 3.2), layout="constrained"), self.rows()).savefig(self.folder / "curves.png", dpi=120)


def read_rows(file: Path) -> list[dict]:
    """Rows of a ``metrics.jsonl``, none if it is not there; a last line that a kill cut short is left out."""
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            logger.warning(f"{file}: left out a line that is not complete")
    return rows


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def draw_curves(figure: Any, rows: list[dict]):
    """Loss, learning rate and, where there are evaluations, KID against the step."""
    names = {"loss": "loss", "lr": "learning rate", "kid": "KID (EfficientNet-Lite0)"}
    present = [name for name in names if any(name in row for row in rows)]
    for axes, name in zip(figure.subplots(1, max(len(present), 1), squeeze=False)[0], present):
        steps, values = zip(*((row["step"], row[name]) for row in rows if name in row))
        axes.plot(steps, values, marker="." if len(values) < 30 else None)
        axes.set(xlabel="step", title=names[name])
        axes.grid(alpha=0.3)
    return figure
