"""Pictures as they lie in files and folders, read for pipelines and training."""

from .folders import read_folder
from .reading import decode, on_white, size_of

__all__ = ["decode", "on_white", "read_folder", "size_of"]
