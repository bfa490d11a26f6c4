"""``DiffusionPipeline`` classes."""

from .grids import labelled_grid
from .pipeline_atlas import AtlasPipeline

__all__ = ["AtlasPipeline", "labelled_grid"]
