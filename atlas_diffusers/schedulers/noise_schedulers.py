"""Every beta schedule as a scheduler class of its own."""

from typing import ClassVar

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

    def _setup(self) -> None:
        if self.schedule is not None and is_flow(self.config):
            raise ValueError(f"{type(self).__name__} has betas of its own, a flow has none; use AtlasDDPMScheduler")
        if self.schedule is not None:
            self.register_to_config(beta_schedule=self.schedule, trained_betas=None)
        super()._setup()


class LinearNoiseScheduler(BaseNoiseScheduler):
    """``β_t = linspace(β_start, β_end, T)``. Ho et al. 2020 (arXiv 2006.11239)."""

    schedule = "linear"


class ScaledLinearNoiseScheduler(BaseNoiseScheduler):
    """``β_t = linspace(√β_start, √β_end, T)²``, Stable Diffusion's schedule (arXiv 2112.10752)."""

    schedule = "scaled_linear"


class CosineNoiseScheduler(BaseNoiseScheduler):
    """``ᾱ(u) = cos²((u + 0.008)/1.008 · π/2)``. Nichol & Dhariwal 2021 (arXiv 2102.09672)."""

    schedule = "cosine"


class QuadraticNoiseScheduler(BaseNoiseScheduler):
    """``β_t = β_start + (β_end − β_start)·u²``, u = t/(T−1)."""

    schedule = "quadratic"


class SigmoidNoiseScheduler(BaseNoiseScheduler):
    """``β_t = β_start + (β_end − β_start)·sigmoid(12u − 6)``, u = t/(T−1)."""

    schedule = "sigmoid"


class ExponentialNoiseScheduler(BaseNoiseScheduler):
    """``β_t = β_start·(β_end/β_start)^u``, u = t/(T−1)."""

    schedule = "exponential"


class LaplaceNoiseScheduler(BaseNoiseScheduler):
    """Laplace-distributed log-SNR. Hang & Gu 2024 (arXiv 2407.03297)."""

    schedule = "laplace"


class KarrasNoiseScheduler(BaseNoiseScheduler):
    """``ᾱ_t = 1/(1 + σ̂_t²)`` with Karras' σ̂_t from 0.002 to 80. Karras et al. 2022 (arXiv 2206.00364)."""

    schedule = "karras"
