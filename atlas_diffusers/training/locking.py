"""One run a folder."""

import os
import re
import socket
from pathlib import Path
from typing import Any

import psutil

CLAIM = re.compile(r"\.lock-(\d+)-(\d+\.\d+)-(.+)")
CLOCK = 2.0  # seconds by which a clock may have been set meanwhile


class RunLock:
    """
    Says which process writes into a folder, by an empty file of its own, ``.lock-PROCESS-START-MACHINE``.

    A process makes its file first and then looks for those of others, so of two that start at one moment at most one goes on,
    and nobody removes the file of a process that is there. Files of ended ones hold nobody up, and are removed.

    Raises:
        ValueError: on entering, or by :meth:`check`, if another process that is still there holds the folder.
    """

    def __init__(self, folder: Path):
        pid = os.getpid()
        self.folder, self.file = folder, folder / f".lock-{pid}-{_started(pid):.2f}-{socket.gethostname()}"

    def check(self) -> None:
        """Raise if the folder is in use."""
        for file in self.folder.glob(".lock-*"):
            self._check(file)

    def __enter__(self) -> "RunLock":
        self.folder.mkdir(parents=True, exist_ok=True)
        self.check()
        self.file.touch()
        try:
            for file in set(self.folder.glob(".lock-*")) - {self.file}:
                self._check(file)
        except ValueError:
            self.file.unlink()
            raise
        return self

    def __exit__(self, *error: Any) -> None:
        self.file.unlink(missing_ok=True)

    def _check(self, file: Path) -> None:
        """Raise if ``file`` is that of a process which is there, or cannot be asked; remove it if the process ended."""
        if (claim := CLAIM.fullmatch(file.name)) is None:
            return
        pid, began, host = int(claim[1]), float(claim[2]), claim[3]
        if host != socket.gethostname():
            raise ValueError(
                f"{self.folder} is in use by process {pid} on {host}, which cannot be asked from here; "
                f"if it has ended, delete {file}"
            )
        started = _started(pid)
        if started is not None and abs(started - began) < CLOCK:
            raise ValueError(f"{self.folder} is in use by process {pid}, which trains into it")
        file.unlink(missing_ok=True)


def _started(pid: int) -> float | None:
    """When a process started, which tells it from a later one of the same number; ``None`` if there is none."""
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.NoSuchProcess:
        return None
