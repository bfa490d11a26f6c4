"""
Noise schedulers and samplers by configuration: several pipelines side by side.

Every name of the original "advanced noise scheduler system" is here; the mathematics is that of
:mod:`atlas_diffusers.schedulers`.
"""

from ..config import BetaSchedule, NoiseSchedulerConfig, SamplingMethod
from ..schedulers import BaseNoiseScheduler
from ..schedulers import BaseScheduler as BaseSampler
from .pipeline import DiffusionPipeline, GaussianModel, NoiseSchedulerFactory, SamplerFactory
from .system import AdvancedDiffusionSystem, SchedulerComparison

__all__ = [
    "AdvancedDiffusionSystem",
    "BaseNoiseScheduler",
    "BaseSampler",
    "BetaSchedule",
    "DiffusionPipeline",
    "GaussianModel",
    "NoiseSchedulerConfig",
    "NoiseSchedulerFactory",
    "SamplerFactory",
    "SamplingMethod",
    "SchedulerComparison",
]
