"""What a recipe may say: pydantic models, read from YAML or JSON."""

from .bridge import BridgeConfig
from .dataset import DatasetConfig
from .kernels import KernelConfig
from .models import ConditioningConfig, HighResModelConfig, InferenceConfig, SamplerConfig
from .noise_scheduler import BetaSchedule, NoiseSchedulerConfig, SamplingMethod
from .presets import build_preset, list_presets, list_recipes, load_preset, read_recipe, recipe_file
from .reading import apply_overrides, merge, read_mapping, unknown_key, validate
from .training import ClassImagesConfig, LoRAConfig, TextEncoderConfig, TrainingConfig

__all__ = [
    "BetaSchedule",
    "BridgeConfig",
    "ClassImagesConfig",
    "ConditioningConfig",
    "DatasetConfig",
    "HighResModelConfig",
    "InferenceConfig",
    "KernelConfig",
    "LoRAConfig",
    "NoiseSchedulerConfig",
    "SamplerConfig",
    "SamplingMethod",
    "TextEncoderConfig",
    "TrainingConfig",
    "apply_overrides",
    "build_preset",
    "list_presets",
    "list_recipes",
    "load_preset",
    "merge",
    "read_mapping",
    "read_recipe",
    "recipe_file",
    "unknown_key",
    "validate",
]
