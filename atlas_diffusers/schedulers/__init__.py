"""Samplers as ``SchedulerMixin`` classes, one algorithm a file."""

from .scheduling_atlas_ddim import AtlasDDIMScheduler
from .scheduling_atlas_ddpm import AtlasDDPMScheduler
from .scheduling_base import BaseNoiseScheduler, extend_config

__all__ = ["AtlasDDIMScheduler", "AtlasDDPMScheduler", "BaseNoiseScheduler", "extend_config"]
