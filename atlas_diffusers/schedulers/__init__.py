"""Samplers as ``SchedulerMixin`` classes, one algorithm a file; imported when they are asked for."""

import importlib
import re
from typing import TYPE_CHECKING, Any

# every sampler, by the name of its SamplingMethod: AtlasNameScheduler lies in scheduling_atlas_name.py
SAMPLERS = {
    "ddpm": "AtlasDDPMScheduler",
    "ddim": "AtlasDDIMScheduler",
    "pndm": "AtlasPNDMScheduler",
    "euler": "AtlasEulerScheduler",
    "ancestral": "AtlasEulerAncestralScheduler",
    "heun": "AtlasHeunScheduler",
    "multistep": "AtlasMultistepScheduler",
}
_OTHERS = {
    "BaseNoiseScheduler": "noise_schedulers",
    "BaseScheduler": "scheduling_base",
    "SchedulerOptions": "options",
    "SigmaOptions": "options",
    "SigmaScheduler": "scheduling_sigma_base",
    "extend_config": "options",
}

if TYPE_CHECKING:  # for editors and type checkers
    from .noise_schedulers import BaseNoiseScheduler as BaseNoiseScheduler
    from .options import SchedulerOptions as SchedulerOptions
    from .options import SigmaOptions as SigmaOptions
    from .options import extend_config as extend_config
    from .scheduling_atlas_ddim import AtlasDDIMScheduler as AtlasDDIMScheduler
    from .scheduling_atlas_ddpm import AtlasDDPMScheduler as AtlasDDPMScheduler
    from .scheduling_atlas_euler import AtlasEulerScheduler as AtlasEulerScheduler
    from .scheduling_atlas_euler_ancestral import AtlasEulerAncestralScheduler as AtlasEulerAncestralScheduler
    from .scheduling_atlas_heun import AtlasHeunScheduler as AtlasHeunScheduler
    from .scheduling_atlas_multistep import AtlasMultistepScheduler as AtlasMultistepScheduler
    from .scheduling_atlas_pndm import AtlasPNDMScheduler as AtlasPNDMScheduler
    from .scheduling_base import BaseScheduler as BaseScheduler
    from .scheduling_sigma_base import SigmaScheduler as SigmaScheduler


def __getattr__(name: str) -> Any:
    if name == "__all__":
        from .._registration import NOISE_SCHEDULERS

        return sorted([*SAMPLERS.values(), *_OTHERS, *NOISE_SCHEDULERS.values()])
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in SAMPLERS.values():
        words = re.sub("(?<=[a-z])(?=[A-Z])", "_", name.removeprefix("Atlas").removesuffix("Scheduler"))
        module = f"scheduling_atlas_{words.lower()}"
    else:
        module = _OTHERS.get(name, "noise_schedulers")
    return getattr(importlib.import_module(f".{module}", __name__), name)
