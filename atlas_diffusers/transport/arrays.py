"""NumPy arrays in, NumPy arrays out."""

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def as_tensor(value: Any) -> Any:
    """A tensor of an array, without a copy where it may be written to; anything else as it is."""
    if not isinstance(value, np.ndarray):
        return value
    return torch.from_numpy(value if value.flags.writeable and min(value.strides, default=0) >= 0 else value.copy())


def as_arrays(value: Any) -> Any:
    """Tensors as arrays, tuples of them too; an object that has tensors as a view that has arrays; a number as it is."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().numpy()[()]
    if isinstance(value, tuple):
        values = map(as_arrays, value)
        return type(value)(*values) if hasattr(value, "_fields") else tuple(values)
    return ArrayView(value) if hasattr(value, "__dict__") and not callable(value) else value


class ArrayView:
    """An object whose tensors are NumPy arrays, and whose methods take and return them."""

    def __init__(self, viewed: Any):
        self._viewed = viewed

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        value = getattr(self._viewed, name)
        return with_arrays(value) if callable(value) else as_arrays(value)

    def __dir__(self) -> list[str]:
        return dir(self._viewed)

    def __repr__(self) -> str:
        return f"{self._viewed!r}, as arrays"


def with_arrays(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with arrays for tensors, in and out."""

    @wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        values = {name: as_tensor(value) for name, value in options.items()}
        return as_arrays(function(*map(as_tensor, arguments), **values))

    return call


def in_kind(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """
    Decorator: a function of points x and y, or of a matrix ``cost``, that returns arrays if it is given arrays.

    Raises:
        ValueError: for one cloud as an array and the other as a tensor.
    """

    @wraps(function)
    def call(*arguments: Arguments.args, **options: Arguments.kwargs) -> Result:
        named = dict(zip(("x", "y"), arguments)) | options
        given = {name: named[name] for name in ("x", "y", "cost") if isinstance(named.get(name), torch.Tensor | np.ndarray)}
        if not any(isinstance(value, np.ndarray) for value in given.values()):
            return function(*arguments, **options)
        if any(isinstance(value, torch.Tensor) for value in given.values()):
            kinds = ", ".join(f"{name} is a {type(value).__name__}" for name, value in given.items())
            raise ValueError(f"give points as tensors or as arrays, not as both: {kinds}")
        return with_arrays(function)(*arguments, **options)

    return call
