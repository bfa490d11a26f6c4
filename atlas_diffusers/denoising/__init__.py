"""From a network and its conditions to predictions, and from predictions to samples."""

from .resolution import lift, split_steps

__all__ = ["lift", "split_steps"]
