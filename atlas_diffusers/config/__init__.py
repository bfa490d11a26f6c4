"""What a recipe may say: pydantic models, read from YAML or JSON."""

from .bridge import BridgeConfig
from .kernels import KernelConfig
from .models import ConditioningConfig, HighResModelConfig, InferenceConfig, SamplerConfig
from .noise_scheduler import BetaSchedule, NoiseSchedulerConfig, SamplingMethod
from .presets import build_preset, list_presets, load_preset, read_recipe
from .reading import apply_overrides, merge, read_mapping, unknown_key, validate
from .training import DatasetConfig, LoRAConfig, TextEncoderConfig, TrainingConfig

__all__ = [
    "BetaSchedule",
    "BridgeConfig",
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
    "load_preset",
    "merge",
    "read_mapping",
    "read_recipe",
    "unknown_key",
    "validate",
]
