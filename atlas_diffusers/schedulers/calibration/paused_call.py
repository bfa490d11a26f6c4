"""A function that stops in the middle and is told how to go on, whatever calls lie between."""

import contextvars
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any


class Abandoned(BaseException):
    """Unwinds a call that nobody will resume."""


class PausedCall:
    """
    A call in a thread of its own that runs only while :meth:`resume` waits for it.

    Args:
        function: called with this object, whose :meth:`pause` it may call from anywhere.
    """

    def __init__(self, function: Callable[["PausedCall"], None]):
        self._questions, self._answers = SimpleQueue(), SimpleQueue()
        self._thread = ThreadPoolExecutor(1)
        self._result = self._thread.submit(contextvars.copy_context().run, self._run, function)
        self._result.add_done_callback(lambda _: self._questions.put(None))

    def _run(self, function: Callable[["PausedCall"], None]) -> None:
        self._wait()
        function(self)

    def _wait(self) -> Any:
        abandoned, answer = self._answers.get()
        if abandoned:
            raise Abandoned
        return answer

    def pause(self, question: Any) -> Any:
        """In the call: ask, and stop until there is an answer."""
        self._questions.put(question)
        return self._wait()

    def resume(self, answer: object = None) -> Any:
        """Answer the last question (at first, nothing), and run to the next one, or to the end, which gives ``None``."""
        self._answers.put((False, answer))
        question = self._questions.get()
        return self._result.result() if question is None else question

    def abandon(self) -> None:
        """Unwind the call where it stands."""
        self._answers.put((True, None))
        self._thread.shutdown()
