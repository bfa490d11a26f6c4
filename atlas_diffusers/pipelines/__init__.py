"""``DiffusionPipeline`` classes."""

from .grids import labelled_grid
from .pipeline_atlas import AtlasPipeline
from .pipeline_bridge import AtlasBridgePipeline

__all__ = ["AtlasBridgePipeline", "AtlasPipeline", "labelled_grid"]
