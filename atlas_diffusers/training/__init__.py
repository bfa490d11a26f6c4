"""The pieces of a training run: data, losses, checkpoints, and the loop that joins them."""

from .bridge_matching import brownian_bridge
from .checkpoints import latest_checkpoint, load_checkpoint, save_checkpoint
from .couplings import MixtureCoupling, PlanSampler, sinkhorn_pairs
from .data import BridgePairs, PictureDataset
from .evaluation import Evaluator, write_evaluation
from .losses import denoising_loss, edm_weights, min_snr_weights, offset_noise, p2_weights, stratified_timesteps
from .markovian_fitting import MarkovianFitting
from .order import StepSampler, StreamSampler
from .semidiscrete import SemidiscreteCoupling
from .sources import load_training_data
from .stopping import TrainingStopped
from .trainer import Trainer

__all__ = [
    "BridgePairs",
    "Evaluator",
    "MarkovianFitting",
    "MixtureCoupling",
    "PictureDataset",
    "PlanSampler",
    "SemidiscreteCoupling",
    "StepSampler",
    "StreamSampler",
    "Trainer",
    "TrainingStopped",
    "brownian_bridge",
    "denoising_loss",
    "edm_weights",
    "latest_checkpoint",
    "load_checkpoint",
    "load_training_data",
    "min_snr_weights",
    "offset_noise",
    "p2_weights",
    "save_checkpoint",
    "sinkhorn_pairs",
    "stratified_timesteps",
    "write_evaluation",
]
