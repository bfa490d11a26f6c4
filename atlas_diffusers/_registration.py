"""Make this package's classes known to Diffusers' loader, without importing them."""

import importlib
from typing import Any

import diffusers
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES

from .schedules.betas import BETA_SCHEDULES, STOCK_NAMES

PACKAGE = __name__.partition(".")[0]

# every sampler, by the name of its SamplingMethod
SAMPLERS = {
    "ddpm": "AtlasDDPMScheduler",
    "ddim": "AtlasDDIMScheduler",
    "pndm": "AtlasPNDMScheduler",
    "euler": "AtlasEulerScheduler",
    "ancestral": "AtlasEulerAncestralScheduler",
    "heun": "AtlasHeunScheduler",
    "multistep": "AtlasMultistepScheduler",
}
# the noise scheduler of every beta schedule, by the schedule's name
NOISE_SCHEDULERS = {
    name: "".join(word.capitalize() for word in name.split("_")) + "NoiseScheduler"
    for name in BETA_SCHEDULES
    if name not in STOCK_NAMES
}
CLASSES = {
    "AtlasAutoencoder": ".models",
    "AtlasTransformer2DModel": ".models",
    "AtlasUNet2DModel": ".models",
    **dict.fromkeys([*SAMPLERS.values(), *NOISE_SCHEDULERS.values()], ".schedulers"),
    "AtlasPipeline": ".pipelines",
    "AtlasBridgePipeline": ".pipelines",
}

METHODS = {
    "ModelMixin": ["save_pretrained", "from_pretrained"],
    "SchedulerMixin": ["save_pretrained", "from_pretrained"],
    "DiffusionPipeline": ["save_pretrained", "from_pretrained"],
}


class _LazyObjects(dict):
    """The extra objects of the ``diffusers`` module; ours are imported when asked for."""

    def __getitem__(self, name: Any):
        value = super().__getitem__(name)
        return getattr(importlib.import_module(PACKAGE), name) if value is _LazyObjects else value


def register() -> None:
    """
    Let ``model_index.json`` name this package, and ``diffusers.CLASS`` find its classes; calling it again changes nothing.
    """
    LOADABLE_CLASSES[PACKAGE] = METHODS
    package: Any = diffusers
    if not isinstance(package._objects, _LazyObjects):
        package._objects = _LazyObjects(package._objects)
    package._objects.update(dict.fromkeys(CLASSES, _LazyObjects))
