"""What the samplers share that go straight: in VE coordinates, ``x̂ = x/α = x_0 + σ̂ ε`` with ``σ̂ = σ/α``, or on a flow."""

from collections.abc import Sequence

import torch

from ..schedules import VarianceExploding
from .options import SigmaOptions, Unpack, takes_options
from .scheduling_base import BaseScheduler


class SigmaScheduler(BaseScheduler):
    r"""
    Base of the samplers that follow the probability-flow ODE in the form ``dx/dσ = (x − x_0(x, σ))/σ``, which it has in VE
    coordinates and on a flow alike.

    In VE coordinates the network is called with ``x̂/√(1 + σ̂²)`` (``scale_model_input``), and the first sample is noise times
    ``init_noise_sigma``. Karras et al. 2022 (arXiv 2206.00364).

    Args:
        interpolation_type: σ̂ at a fractional timestep: `linear`, or `log_linear` for σ̂ evenly spaced in log σ̂ whatever
            the timesteps, as Diffusers has it.
        sigma_min, sigma_max: ends of a sigma grid; by default σ̂ at the last and the first spaced timestep.
        timestep_type: `discrete`, or `continuous` for networks with ``v_prediction`` that are given ¼ log σ̂.
        options: see also :class:`BaseScheduler`.
    """

    beta_process = VarianceExploding
    steps_unasked = True

    @takes_options
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        *,
        timestep_spacing: str = "linspace",
        clip_sample: bool = False,
        **options: Unpack[SigmaOptions],
    ):
        self._setup()

    def _check_config(self) -> None:
        super()._check_config()
        c = self.config
        for name, allowed in (
            ("interpolation_type", ("linear", "log_linear")),
            ("timestep_type", ("discrete", "continuous")),
        ):
            if c[name] not in allowed:
                raise ValueError(f"{name}={c[name]!r} is unknown; allowed are {allowed}")

    @property
    def _zero_signal(self) -> bool:
        return False

    @property
    def init_noise_sigma(self) -> torch.Tensor:
        """Standard deviation of the first sample: σ̂ of the first step, with the data's unit variance for `leading`."""
        run, with_data = self._run, self.config.timestep_spacing == "leading"
        first = self.process.ends[0] if run.grid is None else run.grid.source[0]
        return torch.tensor(self.process.start_scale(first, with_data))

    def scale_model_input(self, sample: torch.Tensor, timestep: torch.Tensor | float) -> torch.Tensor:
        """The network's input: in VE coordinates ``x̂/√(1 + σ̂²)``, which is the VP sample; on a flow the sample itself."""
        run = self._run
        scale = self.process.input_scale(run.planned().source[run.index_of(timestep)])
        if scale == 1:
            return sample
        scaled = run.network_input = sample * scale
        return scaled
