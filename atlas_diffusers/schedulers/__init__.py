"""Samplers as ``SchedulerMixin`` classes, one algorithm a file."""

from .._registration import NOISE_SCHEDULERS
from . import noise_schedulers
from .noise_schedulers import BaseNoiseScheduler
from .options import SchedulerOptions, SigmaOptions, extend_config
from .scheduling_atlas_ddim import AtlasDDIMScheduler
from .scheduling_atlas_ddpm import AtlasDDPMScheduler
from .scheduling_atlas_euler import AtlasEulerScheduler
from .scheduling_atlas_euler_ancestral import AtlasEulerAncestralScheduler
from .scheduling_atlas_heun import AtlasHeunScheduler
from .scheduling_atlas_multistep import AtlasMultistepScheduler
from .scheduling_atlas_pndm import AtlasPNDMScheduler
from .scheduling_base import BaseScheduler
from .scheduling_sigma_base import SigmaScheduler

__all__ = [
    "AtlasDDIMScheduler",
    "AtlasDDPMScheduler",
    "AtlasEulerAncestralScheduler",
    "AtlasEulerScheduler",
    "AtlasHeunScheduler",
    "AtlasMultistepScheduler",
    "AtlasPNDMScheduler",
    "BaseNoiseScheduler",
    "BaseScheduler",
    "SchedulerOptions",
    "SigmaOptions",
    "SigmaScheduler",
    "extend_config",
]
__all__ += NOISE_SCHEDULERS.values()


def __getattr__(name: str) -> type[BaseNoiseScheduler]:
    return getattr(noise_schedulers, name)
