"""Contact sheets and plots."""

from .sheets import labelled_grid, to_pictures

__all__ = ["labelled_grid", "to_pictures"]
