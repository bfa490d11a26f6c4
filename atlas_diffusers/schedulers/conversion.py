"""How configurations travel between our samplers and Diffusers' own, in both directions and without warnings."""

import inspect
from typing import Any, Literal, overload

import diffusers
import torch
from diffusers.configuration_utils import ConfigMixin, FrozenDict
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from diffusers.utils import logging
from typing_extensions import Self

from .._registration import CLASSES
from .processes import BETA_OPTIONS, read_process

# what a network was trained with: travels to other classes even where it was left at its default
PROCESS_OPTIONS = ("num_train_timesteps", "prediction_type", *BETA_OPTIONS)
# schedules that every Diffusers scheduler knows; others travel as explicit betas
STOCK_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
# of Diffusers' Euler: the network is given ¼ log σ̂
CONTINUOUS = {"timestep_type": "continuous", "prediction_type": "v_prediction"}

logger = logging.get_logger(__name__)


def _listed(options: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in options.items())


def _without_process(config: Any) -> list[str]:
    """The options left at their defaults that another class may replace by its own defaults."""
    return sorted(name for name in config.get("_use_default_values", ()) if name not in PROCESS_OPTIONS)


def _clips(config: Any) -> bool:
    """Whether the scheduler that a configuration was written by clamps its data prediction."""
    source = getattr(diffusers, str(config.get("_class_name")), None)
    option = inspect.signature(source).parameters.get("clip_sample") if isinstance(source, type) else None
    return config.get("clip_sample", option is not None and option.default)


class ConfigConversion(ConfigMixin):
    """The part of a sampler that reads foreign configurations and writes ones that Diffusers' schedulers read."""

    config: Any  # of the constructor's arguments, by Diffusers
    betas: torch.Tensor
    _compatibles = [e.name for e in KarrasDiffusionSchedulers if e.name != "EDMEulerScheduler"]
    _compatibles += ["LCMScheduler", "TCDScheduler", "SASolverScheduler"]  # their options may travel through us unread

    @overload
    @classmethod
    def from_config(cls, config: object, return_unused_kwargs: Literal[False] = False, **kwargs: Any) -> Self: ...

    @overload
    @classmethod
    def from_config(cls, config: object, return_unused_kwargs: Literal[True], **kwargs: Any) -> tuple[Self, dict[str, Any]]: ...

    @classmethod
    def from_config(cls, config: Any, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """
        As in Diffusers, from any scheduler's configuration; the noise process travels even where it is a default, betas
        derived from a schedule's name give way when the schedule is overridden, and what did not clip does not begin to.

        Options of the algorithm that is replaced, such as ``solver_order``, go with it. A warning names overrides that this
        class has not, and a kind of timesteps that only a network trained for it understands.
        """
        taken = inspect.signature(cls).parameters
        if unread := {name: value for name, value in kwargs.items() if name not in taken and not return_unused_kwargs}:
            logger.warning(f"{cls.__name__} has no {_listed(unread)}: without effect")
        if isinstance(config, dict):
            if "timestep_type" not in taken and CONTINUOUS.items() <= config.items():
                logger.warning(f"{cls.__name__} gives a network whole timesteps, but this one learned {_listed(CONTINUOUS)}")
            of_scheduler = isinstance(config, FrozenDict) or "_class_name" in config
            config = read_process(config, kwargs, cls)
            config["_use_default_values"] = _without_process(config)
            if taken["clip_sample"].default and of_scheduler and not _clips(config):
                config["clip_sample"] = False
                config["_use_default_values"] = [name for name in config["_use_default_values"] if name != "clip_sample"]
            if config.get("_derived_betas") and not kwargs.keys().isdisjoint(PROCESS_OPTIONS):
                del config["_derived_betas"], config["trained_betas"]
        return super().from_config(config, return_unused_kwargs, **kwargs)

    @classmethod
    def _get_compatibles(cls):
        family = [name for name, module in CLASSES.items() if module == ".schedulers"]
        names = {cls.__name__, *cls._compatibles, *family}
        return [getattr(diffusers, name) for name in sorted(names) if hasattr(diffusers, name)]

    def _register_for_diffusers(self, overridden: bool) -> None:
        """
        Complete the configuration so that Diffusers' own schedulers read the same noise process from it.

        Args:
            overridden: whether the betas come from the class rather than from the configuration.
        """
        c = self.config
        self.register_to_config(_class_name=type(self).__name__)
        if "_use_default_values" in c:
            self.register_to_config(_use_default_values=_without_process(c))
        if c.beta_schedule == "cosine" and c.snr_shift_scale == 1 and not overridden:
            self.register_to_config(beta_schedule="squaredcos_cap_v2")
        elif overridden or c.snr_shift_scale != 1 or (c.trained_betas is None and c.beta_schedule not in STOCK_SCHEDULES):
            self.register_to_config(trained_betas=self.betas.tolist(), snr_shift_scale=1.0, _derived_betas=True)
