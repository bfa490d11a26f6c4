"""Every beta schedule as a scheduler class of its own."""

import functools
from typing import ClassVar

from .._registration import NOISE_SCHEDULERS
from ..schedules import BETA_SCHEDULES
from .processes import is_flow
from .scheduling_atlas_ddpm import AtlasDDPMScheduler


class BaseNoiseScheduler(AtlasDDPMScheduler):
    """
    A noise process with a beta schedule of its own; ``step`` is the posterior of that process, see
    :class:`AtlasDDPMScheduler` for its formula and options.

    A subclass either names a registered schedule in ``schedule``, which then takes the place of the options
    ``beta_schedule`` and ``trained_betas``, or writes ``_get_beta_schedule()`` and returns the betas,
    ``(num_train_timesteps,)``.
    """

    schedule: ClassVar[str | None] = None

    @property
    def _has_own_betas(self) -> bool:
        return self.schedule is not None or super()._has_own_betas

    def _setup(self) -> None:
        if self.schedule is not None and not is_flow(self.config):
            self.register_to_config(beta_schedule=self.schedule, trained_betas=None)
        super()._setup()


@functools.cache
def noise_scheduler(schedule: str) -> type[BaseNoiseScheduler]:
    """The class of a beta schedule of this package: ``noise_scheduler("linear")`` is ``LinearNoiseScheduler``."""
    members = {"schedule": schedule, "__doc__": BETA_SCHEDULES[schedule].__doc__, "__module__": __name__}
    return type(NOISE_SCHEDULERS[schedule], (BaseNoiseScheduler,), members)


def __getattr__(name: str) -> type[BaseNoiseScheduler]:
    for schedule, class_name in NOISE_SCHEDULERS.items():
        if class_name == name:
            return noise_scheduler(schedule)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
