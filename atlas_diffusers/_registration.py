"""Make this package's classes known to Diffusers' loader, without importing them."""

import importlib
from typing import Any

import diffusers
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES

PACKAGE = __name__.partition(".")[0]

CLASSES = {
    "AtlasTransformer2DModel": ".models",
    "AtlasUNet2DModel": ".models",
    "AtlasDDPMScheduler": ".schedulers",
    "AtlasDDIMScheduler": ".schedulers",
    "AtlasPNDMScheduler": ".schedulers",
    "AtlasEulerScheduler": ".schedulers",
    "AtlasEulerAncestralScheduler": ".schedulers",
    "AtlasHeunScheduler": ".schedulers",
    "AtlasMultistepScheduler": ".schedulers",
    "LinearNoiseScheduler": ".schedulers",
    "ScaledLinearNoiseScheduler": ".schedulers",
    "CosineNoiseScheduler": ".schedulers",
    "QuadraticNoiseScheduler": ".schedulers",
    "SigmoidNoiseScheduler": ".schedulers",
    "ExponentialNoiseScheduler": ".schedulers",
    "LaplaceNoiseScheduler": ".schedulers",
    "KarrasNoiseScheduler": ".schedulers",
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
