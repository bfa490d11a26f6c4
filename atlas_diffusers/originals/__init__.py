"""Thin names of the two systems that this package unites."""

from .hierarchical import AdvancedHierarchicalDiffusionSampler
from .high_res import HighResLatentScoreModel, build_highres_score_model
from .karras_schedule import karras_noise_schedule

__all__ = [
    "AdvancedHierarchicalDiffusionSampler",
    "HighResLatentScoreModel",
    "build_highres_score_model",
    "karras_noise_schedule",
]
