"""Few-step samplers, Schrödinger-bridge steps and small text-to-image pipelines for Diffusers."""

import importlib

from ._registration import CLASSES, register

__version__ = "0.1.0"

_LOCATIONS = {
    **CLASSES,
    "ModelMixin": "diffusers",
    "SchedulerMixin": "diffusers",
    "DiffusionPipeline": "diffusers",
    "BaseNoiseScheduler": ".schedulers",
    "load_emoji": ".pretrained",
    "load_pictograms": ".pretrained",
    "register_beta_schedule": ".schedules",
}
SCHEDULERS = [name for name, module in CLASSES.items() if module.startswith(".schedulers")]

__all__ = ["SCHEDULERS", *_LOCATIONS]


def __getattr__(name: str):
    if name not in _LOCATIONS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    location = _LOCATIONS[name]
    module = importlib.import_module(location, __name__ if location.startswith(".") else None)
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LOCATIONS})


register()
