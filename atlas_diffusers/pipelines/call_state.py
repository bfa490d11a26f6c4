"""State of a running call that callbacks may change, kept apart for every thread."""

import threading
from typing import Any
from weakref import WeakKeyDictionary

_LOCAL = threading.local()


def state_of(pipeline: Any) -> dict[str, Any]:
    """Values of a pipeline's :class:`PerThread` attributes in this thread, by name."""
    if not hasattr(_LOCAL, "values"):
        _LOCAL.values = WeakKeyDictionary()
    return _LOCAL.values.setdefault(pipeline, {})


class PerThread:
    """An attribute of a pipeline with one value a thread, so that two threads may share the pipeline."""

    def __init__(self, default: Any):
        self.default = default

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        return self if instance is None else state_of(instance).get(self.name, self.default)

    def __set__(self, instance: object, value: Any) -> None:
        state_of(instance)[self.name] = value
