"""The pieces of a training run: data, losses, checkpoints, and the loop that joins them."""

from .checkpoints import latest_checkpoint, load_checkpoint, save_checkpoint
from .data import PictureDataset, StepSampler, load_training_data
from .losses import denoising_loss, min_snr_weights, stratified_timesteps
from .trainer import Trainer

__all__ = [
    "PictureDataset",
    "StepSampler",
    "Trainer",
    "denoising_loss",
    "latest_checkpoint",
    "load_checkpoint",
    "load_training_data",
    "min_snr_weights",
    "save_checkpoint",
    "stratified_timesteps",
]
