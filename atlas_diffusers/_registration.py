"""Make this package's classes known to Diffusers' loader, once that is imported, without importing them or it."""

import importlib
import importlib.abc
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

PACKAGE = __name__.partition(".")[0]

METHODS = {
    "ModelMixin": ["save_pretrained", "from_pretrained"],
    "SchedulerMixin": ["save_pretrained", "from_pretrained"],
    "DiffusionPipeline": ["save_pretrained", "from_pretrained"],
}

# computed where they are asked for: beta schedules need torch
SAMPLERS: dict[str, str]
NOISE_SCHEDULERS: dict[str, str]
CLASSES: dict[str, str]


def __getattr__(name: str) -> Any:
    tables = {"SAMPLERS": _samplers, "NOISE_SCHEDULERS": _noise_schedulers, "CLASSES": _classes}
    if name not in tables:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return tables[name]()


def _samplers() -> dict[str, str]:
    """Every sampler, by the name of its ``SamplingMethod``."""
    from .schedulers import SAMPLERS

    return SAMPLERS


@cache
def _noise_schedulers() -> dict[str, str]:
    """The noise scheduler of every beta schedule, by the schedule's name."""
    from .schedules.betas import BETA_SCHEDULES, STOCK_NAMES

    names = [name for name in BETA_SCHEDULES if name not in STOCK_NAMES]
    return {name: "".join(word.capitalize() for word in name.split("_")) + "NoiseScheduler" for name in names}


@cache
def _classes() -> dict[str, str]:
    """Public classes of the package, with the module of each."""
    from .models import MODELS

    return {
        **dict.fromkeys(sorted(MODELS), ".models"),
        **dict.fromkeys([*_samplers().values(), *_noise_schedulers().values()], ".schedulers"),
        "AtlasPipeline": ".pipelines",
        "AtlasBridgePipeline": ".pipelines",
    }


class _LazyObjects(dict):
    """The extra objects of the ``diffusers`` module; ours are imported when asked for."""

    def __getitem__(self, name: Any):
        value = super().__getitem__(name)
        return getattr(importlib.import_module(PACKAGE), name) if value is _LazyObjects else value


def _add_classes(package: Any) -> None:
    """``diffusers.CLASS`` finds ours."""
    if not isinstance(package._objects, _LazyObjects):
        package._objects = _LazyObjects(package._objects)
    package._objects.update(dict.fromkeys(_classes(), _LazyObjects))


def _add_library(loading: Any) -> None:
    """``model_index.json`` may name this package."""
    loading.LOADABLE_CLASSES[PACKAGE] = METHODS


def _add_pipeline(auto: Any) -> None:
    """``AutoPipelineForText2Image`` finds ``AtlasPipeline``."""
    auto.AUTO_TEXT2IMAGE_PIPELINES_MAPPING["atlas"] = importlib.import_module(PACKAGE).AtlasPipeline


ADDITIONS: dict[str, Callable[[Any], None]] = {
    "diffusers": _add_classes,
    "diffusers.pipelines.pipeline_loading_utils": _add_library,
    "diffusers.pipelines.auto_pipeline": _add_pipeline,
}


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds modules as the others do, and adds to those of ``ADDITIONS`` when they have been executed."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname not in ADDITIONS:
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        spec = next((found for finder in others if (found := finder.find_spec(fullname, path, target))), None)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            execute = loader.exec_module

            def then(module: Any) -> None:
                execute(module)
                # `diffusers` puts another object in its place
                ADDITIONS[fullname](sys.modules[fullname])

            loader.exec_module = then
        return spec


def register() -> None:
    """
    Let ``model_index.json`` name this package, and ``diffusers.CLASS`` find its classes; calling it again changes nothing.
    """
    if not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())
    for name, add in ADDITIONS.items():
        if name in sys.modules:
            add(sys.modules[name])
