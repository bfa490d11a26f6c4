"""What a recipe may say: pydantic models, read from YAML or JSON."""

from .reading import apply_overrides, read_mapping, validate
from .training import DatasetConfig, TextEncoderConfig, TrainingConfig

__all__ = ["DatasetConfig", "TextEncoderConfig", "TrainingConfig", "apply_overrides", "read_mapping", "validate"]
