"""Schedulers by the names that people type, and in place of a pipeline's own."""

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import torch

import atlas_diffusers

from .._registration import SAMPLERS
from ..pretrained import pretrained_path
from .loading import check_values, named_damage, read_json_object

if TYPE_CHECKING:
    from diffusers.schedulers.scheduling_utils import SchedulerMixin

CONFIG = "scheduler_config.json"


def short_names() -> dict[str, str]:
    """Our scheduler classes by short name: ``ddim`` for ``AtlasDDIMScheduler``."""
    return {name.removeprefix("Atlas").removesuffix("Scheduler").lower(): name for name in atlas_diffusers.SCHEDULERS}


def scheduler_class(name: str):
    """A scheduler class from its class name, or from the short name of one of ours (``ddim``, ``euler-ancestral``)."""
    short = short_names()
    found = (SAMPLERS | short).get(name.lower().replace("-", ""), name)
    if not found.endswith("Scheduler") or not hasattr(diffusers, found):
        raise ValueError(f"scheduler {name!r} is unknown; allowed are {sorted(short)} and Diffusers' class names")
    return getattr(diffusers, found)


def load_scheduler(name: str):
    """
    The scheduler that a NAME of the command line stands for: a folder with a configuration, or a class.

    Raises:
        ValueError: for an unknown class, a folder without a scheduler, or a beta schedule that the class does not have.
    """
    for folder in (Path(name), Path(name, "scheduler"), (pretrained_path(name) or Path(name)) / "scheduler"):
        if (folder / CONFIG).is_file():
            config = read_json_object(folder / CONFIG)
            cls = scheduler_class(str(config.get("_class_name")))
            check_values(config, cls, folder / CONFIG)
            with named_damage(f"{folder / CONFIG} cannot be read"):
                return cls.from_config(config)
    if Path(name).is_dir():
        raise ValueError(f"folder {name} has neither {CONFIG} nor scheduler/{CONFIG}")
    class_name, _, beta_schedule = name.partition(":")
    cls = scheduler_class(class_name)
    if not beta_schedule:
        with named_damage(f"{class_name} is no scheduler of a noise process"):
            return cls()
    if "beta_schedule" not in inspect.signature(cls).parameters:
        raise ValueError(f"{name}: {cls.__name__} has no beta schedule to choose")
    try:
        return cls(beta_schedule=beta_schedule)
    except NotImplementedError as error:  # Diffusers' word for an unknown schedule
        raise ValueError(f"{name}: {error}") from error


def swapped(pipeline: Any, cls: Any) -> "SchedulerMixin":
    """
    A scheduler of another class for a pipeline, with the pipeline's noise process.

    Raises:
        OSError: for a class that takes no step of such a process: of other data, other arguments, or other noise.
    """
    network = getattr(pipeline, "unet", None) or pipeline.transformer
    x = torch.zeros(1, network.config.in_channels, 8, 8)
    with named_damage(f"scheduler {cls.__name__} cannot sample with this pipeline"), torch.random.fork_rng():
        trial = cls.from_config(pipeline.scheduler.config)
        trial.set_timesteps(10, **({"mu": 1.0} if trial.config.get("use_dynamic_shifting") else {}))
        trial.step(trial.scale_model_input(x, trial.timesteps[0]) * trial.order, trial.timesteps[0], x)
        return cls.from_config(pipeline.scheduler.config)


def scheduler_for(pipeline: Any, name: str) -> "SchedulerMixin":
    """A scheduler for a pipeline by a NAME: a class takes over the pipeline's noise process, a folder brings its own."""
    if Path(name).is_dir():
        return load_scheduler(name)
    return swapped(pipeline, scheduler_class(name))
