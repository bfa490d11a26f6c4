"""Training as a process of its own: started, watched, asked to stop."""

import signal
import subprocess
import sys
import threading
from pathlib import Path

from PIL import Image

from ..config import TrainingConfig, read_recipe, validate
from ..image_files import decode
from ..training.checkpoints import latest_checkpoint
from ..training.recorder import read_rows

SCRIPT = "atlas_diffusers.training.script"
TAIL, BAR = 4000, "step/s"  # bytes of the log that are shown; what its progress bar has
PATIENCE = 60  # seconds in which a step ends and a checkpoint is written, before the process is killed


class Run:
    """
    A training run of a recipe; one that was stopped goes on from its last checkpoint when it is started again.

    Args:
        recipe: file; checked here.
        log: file that gets what the process prints.

    Raises:
        ValueError: for a recipe with a mistake.
    """

    def __init__(self, recipe: Path, log: Path):
        self.config = validate(TrainingConfig, read_recipe(str(recipe)))
        self.folder, self.log, self.stopping = Path(self.config.output_dir), log, False
        with open(log, "w", encoding="utf-8") as file:
            # in a session of its own: a terminal's Ctrl-C comes to the page, which asks every run to stop
            self.process = subprocess.Popen(
                [sys.executable, "-m", SCRIPT, "--config", str(recipe)], stdout=file, stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip

    @property
    def is_running(self) -> bool:
        """Whether the process is there."""
        return self.process.poll() is None

    def stop(self) -> str:
        """Ask once for an end after the step, with a checkpoint; what there is to say about it."""
        if not self.is_running:
            return "nothing is running"
        if self.stopping:
            return "already stopping: the step is finished and a checkpoint written"
        self.stopping = True
        self.process.send_signal(signal.SIGTERM)
        return "stopping after this step, with a checkpoint"

    def end(self) -> None:
        """Stop, and wait; a process that does not end is killed."""
        self.stop()
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def status(self) -> str:
        """One line: where the run stands, or how it ended."""
        rows = self.rows()
        step = rows[-1]["step"] if rows else 0
        if self.is_running:
            return f"{'stopping' if self.stopping else 'training'}: step {step} of {self.config.max_steps}"
        if self.process.returncode == 0:
            return f"done: {self.folder / ('pipeline' if self.config.lora is None else 'lora')}"
        if self.stopping:
            at = latest_checkpoint(self.folder)
            return f"stopped; Train goes on from {at}" if at else "stopped before the first checkpoint; Train starts anew"
        said = self.tail().splitlines()
        return said[-1] if said else f"ended with status {self.process.returncode}"

    def rows(self) -> list[dict]:
        """Of ``metrics.jsonl``."""
        return read_rows(self.folder / "metrics.jsonl")

    def grids(self, most: int) -> list[tuple[Image.Image, str]]:
        """The last sample grids with the names of their files, oldest first."""
        files = sorted(self.folder.glob("sample-*.png"))[-most:]
        return [(decode({"path": str(file), "bytes": None}), file.stem) for file in files]

    def tail(self) -> str:
        """The end of the log; of a progress bar its last state."""
        with open(self.log, "rb") as file:
            file.seek(max(0, self.log.stat().st_size - TAIL))
            lines = file.read().decode("utf-8", errors="replace").splitlines()
        shown = [line for line, after in zip(lines, [*lines[1:], ""]) if line.strip() and not (BAR in line and BAR in after)]
        return "\n".join(shown)


class Runs:
    """The runs of every open page, by its session; as a context ends them all."""

    def __init__(self):
        self.of_session: dict[str, Run] = {}
        self._lock = threading.Lock()

    def start(self, session: str, recipe: Path, log: Path) -> Run:
        """The run of a session, in place of one that ended; ``ValueError`` while that goes on."""
        with self._lock:
            if (before := self.of_session.get(session)) is not None and before.is_running:
                raise ValueError("training is already running; stop it first")
            self.of_session[session] = run = Run(recipe, log)
        return run

    def leave(self, session: str) -> None:
        """The page was closed: its run stops with a checkpoint."""
        with self._lock:
            run = self.of_session.pop(session, None)
        if run is not None and run.is_running:
            run.end()
            print(f"page closed: {run.status()}", flush=True)

    def __enter__(self) -> "Runs":
        return self

    def __exit__(self, *error: object) -> None:
        runs = list(self.of_session.values())
        for run in runs:
            run.stop()
        for run in runs:
            run.end()
