"""Runnable examples: ``python -m atlas_diffusers.examples.basic_sampling``, and so on."""

import importlib

__all__ = ["run_inference", "run_training"]


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(".training_pipeline", __name__), name)
