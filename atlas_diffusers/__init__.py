"""Few-step samplers, Schrödinger-bridge steps and small text-to-image pipelines for Diffusers."""

import importlib
from functools import cache
from typing import Any

from . import _registration

__version__ = "0.1.0"

_OTHERS = {
    "ModelMixin": "diffusers",
    "SchedulerMixin": "diffusers",
    "DiffusionPipeline": "diffusers",
    "BaseNoiseScheduler": ".schedulers",
    "load_emoji": ".pretrained",
    "load_pictograms": ".pretrained",
    "register_beta_schedule": ".schedules",
}

SCHEDULERS: list[str]


@cache
def _locations() -> dict[str, str]:
    """Modules of the public names; the table of classes needs torch, so it is read when it is asked for."""
    return _registration.CLASSES | _OTHERS


def __getattr__(name: str) -> Any:
    if name == "SCHEDULERS":
        return [name for name, module in _registration.CLASSES.items() if module == ".schedulers"]
    if name == "__all__":
        return ["SCHEDULERS", *_locations()]
    if name.startswith("__") or name not in _locations():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    location = _locations()[name]
    module = importlib.import_module(location, __name__ if location.startswith(".") else None)
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), "SCHEDULERS", *_locations()})


_registration.register()
