"""Mistakes are answered in the page, in one line."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar

import gradio as gr
import torch

MISTAKES = (ValueError, OSError, ImportError, FloatingPointError, torch.OutOfMemoryError)
Function = TypeVar("Function", bound=Callable[..., Any])


@contextmanager
def _named() -> Iterator[None]:
    try:
        yield
    except MISTAKES as error:
        raise gr.Error(" ".join(str(error).split()), print_exception=False) from error


def answered(function: Function) -> Function:
    """The same function, or generator, for an event of the page."""

    @wraps(function)
    def whole(*args: object, **kwargs: object) -> Any:
        with _named():
            return function(*args, **kwargs)

    @wraps(function)
    def stepwise(*args: object, **kwargs: object) -> Any:
        with _named():
            yield from function(*args, **kwargs)

    found: Any = stepwise if inspect.isgeneratorfunction(function) else whole
    return found
