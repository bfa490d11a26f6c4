"""One run a folder."""

import json
import os
import socket
from pathlib import Path
from typing import Any

import psutil

NAME = ".lock"
CLOCK = 2.0  # seconds by which a clock may have been set meanwhile


class RunLock:
    """
    Holds ``folder/.lock``, which says which process writes into a folder; the lock of a process that ended is taken over.

    Raises:
        ValueError: on entering, or by :meth:`check`, if another process that is still there holds it.
    """

    def __init__(self, folder: Path):
        self.file = folder / NAME

    def check(self) -> None:
        """Raise if the folder is in use."""
        try:
            held = json.loads(self.file.read_text(encoding="utf-8"))
            pid, host, began = held["pid"], held["host"], held["started"]
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return
        if host != socket.gethostname():
            raise ValueError(
                f"{self.file.parent} is in use by process {pid} on {host}, which cannot be asked from here; "
                f"if it has ended, delete {self.file}"
            )
        started = _started(pid)
        if started is not None and abs(started - began) < CLOCK:
            raise ValueError(f"{self.file.parent} is in use by process {pid}, which trains into it")

    def __enter__(self) -> "RunLock":
        self.check()
        self.file.unlink(missing_ok=True)
        content = {"pid": os.getpid(), "host": socket.gethostname(), "started": _started(os.getpid())}
        try:
            with open(self.file, "x", encoding="utf-8") as file:
                json.dump(content, file)
        except FileExistsError as error:
            raise ValueError(f"{self.file.parent}: another run started at the same moment") from error
        return self

    def __exit__(self, *error: Any) -> None:
        self.file.unlink(missing_ok=True)


def _started(pid: int) -> float | None:
    """When a process started, which tells it from a later one of the same number; ``None`` if there is none."""
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.NoSuchProcess:
        return None
