"""
From a network and its conditions to predictions, and from predictions to samples.

A :class:`Denoiser` gives predictions, ``denoiser(x, t)``; a :class:`CoupledDenoiser` is one whose batch is coupled with
references; :func:`sample` follows a scheduler from one prediction to the next.
"""

from .bridge_process import BridgeFlow, BridgeSteps
from .coarse_to_fine import Stage, plan_stages, sample_coarse_to_fine, set_stages
from .correctors import LangevinCorrector
from .coupling import BridgeReport, CoupledDenoiser, ReferenceCoupling, bridge_timesteps, gate_timestep
from .denoiser import Denoiser
from .guidance import ClassifierFreeGuidance, DiffusersGuidance, Guidance
from .process import SchedulerProcess, noise_level, noised
from .resolution import lift, split_steps
from .sampling import SamplingState, sample, set_begin_index, step_arguments
from .tiles import Tiles

__all__ = [
    "BridgeFlow",
    "BridgeReport",
    "BridgeSteps",
    "ClassifierFreeGuidance",
    "CoupledDenoiser",
    "Denoiser",
    "DiffusersGuidance",
    "Guidance",
    "LangevinCorrector",
    "ReferenceCoupling",
    "SamplingState",
    "SchedulerProcess",
    "Stage",
    "Tiles",
    "bridge_timesteps",
    "gate_timestep",
    "lift",
    "noise_level",
    "noised",
    "plan_stages",
    "sample",
    "sample_coarse_to_fine",
    "set_begin_index",
    "set_stages",
    "split_steps",
    "step_arguments",
]
