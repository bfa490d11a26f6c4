"""How configurations travel between our samplers and Diffusers' own, in both directions and without warnings."""

import functools
import inspect

import diffusers
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers

from .processes import BETA_OPTIONS, read_process

FAMILY: list[str] = []
# what a network was trained with: travels to other classes even where it was left at its default
PROCESS_OPTIONS = ("num_train_timesteps", "prediction_type", *BETA_OPTIONS)
# schedules that every Diffusers scheduler knows; others travel as explicit betas
STOCK_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")


def extend_config(init):
    """
    Decorate the ``__init__`` of a sampler that adds options to its base class, or changes defaults of it.

    The decorated signature is the base's arguments followed by its own, all registered in the config; the body runs
    before the base is set up, with its own arguments only.
    """
    init._extends_config = True
    return init


def _extended(base_init, init):
    own = list(inspect.signature(init).parameters.values())[1:]
    merged = {**inspect.signature(base_init).parameters, **{p.name: p for p in own}}
    signature = inspect.Signature([p.replace(kind=p.POSITIONAL_OR_KEYWORD) for p in merged.values()])

    @functools.wraps(init)
    def extended(self, *args, **kwargs):
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        init(self, **{p.name: bound.arguments[p.name] for p in own})
        self._setup()

    extended.__signature__ = signature
    return register_to_config(extended)


def _without_process(config) -> list[str]:
    """The options left at their defaults that another class may replace by its own defaults."""
    return [name for name in config.get("_use_default_values", ()) if name not in PROCESS_OPTIONS]


class ConfigConversion:
    """The part of a sampler that reads foreign configurations and writes ones that Diffusers' schedulers read."""

    _compatibles = [e.name for e in KarrasDiffusionSchedulers if e.name != "EDMEulerScheduler"]
    _compatibles += ["LCMScheduler", "TCDScheduler", "SASolverScheduler"]  # their options may travel through us unread

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        FAMILY.append(cls.__name__)
        init = cls.__dict__.get("__init__")
        if getattr(init, "_extends_config", False):
            cls.__init__ = _extended(super(cls, cls).__init__, init)

    @classmethod
    def from_config(cls, config, *args, **kwargs):
        """
        As in Diffusers, from any scheduler's configuration; the noise process travels even where it is a default, and
        betas derived from a schedule's name give way when the schedule is overridden.
        """
        if isinstance(config, dict):
            config = read_process(config, kwargs, cls)
            config["_use_default_values"] = _without_process(config)
            if config.get("_derived_betas") and not kwargs.keys().isdisjoint(PROCESS_OPTIONS):
                del config["_derived_betas"], config["trained_betas"]
        return super().from_config(config, *args, **kwargs)

    @classmethod
    def _get_compatibles(cls):
        names = {cls.__name__, *cls._compatibles, *FAMILY}
        return [getattr(diffusers, name) for name in sorted(names) if hasattr(diffusers, name)]

    def _register_for_diffusers(self, overridden: bool) -> None:
        """
        Complete the configuration so that Diffusers' own schedulers read the same noise process from it.

        Args:
            overridden: whether the betas come from the class rather than from the configuration.
        """
        c = self.config
        self.register_to_config(_class_name=type(self).__name__, _use_default_values=_without_process(c))
        if c.beta_schedule == "cosine" and c.snr_shift_scale == 1 and not overridden:
            self.register_to_config(beta_schedule="squaredcos_cap_v2")
        elif overridden or c.snr_shift_scale != 1 or (c.trained_betas is None and c.beta_schedule not in STOCK_SCHEDULES):
            self.register_to_config(trained_betas=self.betas.tolist(), snr_shift_scale=1.0, _derived_betas=True)
