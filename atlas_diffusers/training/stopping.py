"""Calm ends: Ctrl-C and SIGTERM let a run finish its step and write a checkpoint."""

import signal
import threading
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class TrainingStopped(KeyboardInterrupt):
    """
    A run that was asked to stop has written a checkpoint.

    Args:
        number: of the signal that asked.
        message: where the run stands, and how it goes on.
    """

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.number = number


class StopRequest:
    """
    As a context, remembers the first SIGINT or SIGTERM in ``number``; the second one acts as it did before.

    Only the main thread of a process gets signals; elsewhere nothing is changed, nor is a signal that is ignored.
    """

    def __init__(self):
        self.number: int | None = None
        self._before: dict = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._ask) for number in heard}
        return self

    def _ask(self, number: int, frame: Any) -> None:
        self.number = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def __exit__(self, *error: Any) -> None:
        self._restore()


def leave_signals_alone(worker: int) -> None:
    """For the processes that read data: they end with the process that trains, which gets the same signals."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
