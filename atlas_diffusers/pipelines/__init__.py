"""``DiffusionPipeline`` classes."""

import importlib

from .base import AtlasPipelineOutput
from .pipeline_atlas import AtlasPipeline
from .pipeline_bridge import AtlasBridgePipeline

__all__ = ["AtlasBridgePipeline", "AtlasPipeline", "AtlasPipelineOutput", "labelled_grid"]


def __getattr__(name: str):
    if name == "labelled_grid":  # its path before there was a room for pictures
        return getattr(importlib.import_module("..pictures", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
