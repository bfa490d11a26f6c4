"""Runnable examples: ``python -m atlas_diffusers.examples.basic_sampling``, and so on."""

from .training_pipeline import run_inference, run_training

__all__ = ["run_inference", "run_training"]
