"""State of a running call that callbacks may change, kept apart for every thread."""

import threading
from typing import Any
from weakref import WeakKeyDictionary

_LOCAL = threading.local()


def _values() -> WeakKeyDictionary:
    """Attribute values of every living pipeline in this thread."""
    if not hasattr(_LOCAL, "values"):
        _LOCAL.values = WeakKeyDictionary()
    return _LOCAL.values


class PerThread:
    """An attribute of a pipeline with one value a thread, so that two threads may share the pipeline."""

    def __init__(self, default: Any):
        self.default = default

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance, owner=None):
        if instance is None:
            return self
        return _values().get(instance, {}).get(self.name, self.default)

    def __set__(self, instance, value) -> None:
        _values().setdefault(instance, {})[self.name] = value
