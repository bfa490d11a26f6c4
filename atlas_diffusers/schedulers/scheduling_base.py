"""What every sampler shares: configuration, noise process, time grid, position in it. A sampler adds one ``step``."""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from ..schedules import NoiseLevel, NoiseProcess, VariancePreserving, combine, get_betas
from ..schedules.betas import rescale_zero_terminal_snr, shift_snr
from ..schedules.grids import TIMESTEP_SPACINGS
from ..schedules.predictions import check_prediction_type
from ..schedules.time_grid import GRID_OF_OPTION, Request, TimeGrid, as_tensor, grid_option
from .conversion import ConfigConversion
from .forward_process import ForwardProcess
from .options import SchedulerOptions, Unpack, takes_options
from .position import Run, Runs
from .processes import flow_process, is_flow, settle_flow

MOST_TIMESTEPS = 10**6
ZERO_SNR_FLOOR = 2.0**-24
WORKING_DTYPES = torch.float32, torch.float64
Generators = torch.Generator | list[torch.Generator] | None


@dataclass
class AtlasSchedulerOutput(BaseOutput):
    """``prev_sample``: x at the next, less noisy level. ``pred_original_sample``: the data prediction it was made from."""

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor | None = None


@dataclass(frozen=True)
class _Plan:
    """Result of ``set_timesteps``, kept for the next call with the same arguments and configuration."""

    key: tuple | None
    config: object
    num_inference_steps: int
    grid: TimeGrid
    timesteps: torch.Tensor
    sigmas: torch.Tensor
    levels: torch.Tensor

    def __deepcopy__(self, memo: dict[int, object]) -> "_Plan":
        return self


class BaseScheduler(ForwardProcess, ConfigConversion, SchedulerMixin, ConfigMixin):
    r"""
    Base of all samplers: owns the noise process ``x_t = α_t x_0 + σ_t ε`` and the grid of steps; a subclass writes ``step``.

    The process is that of betas or, with ``use_flow_sigmas``, ``shift`` or the configuration of a flow scheduler of Diffusers,
    flow matching ``x_s = (1 − s) x_0 + s ε`` (:class:`~atlas_diffusers.schedules.Flow`). Then the prediction type is
    `flow_prediction` unless told otherwise, and options of betas are refused.

    Args:
        num_train_timesteps: T, the timesteps that the network was trained with.
        beta_start, beta_end: ends of the beta schedule.
        beta_schedule: a name in :data:`atlas_diffusers.schedules.BETA_SCHEDULES`.
        trained_betas: explicit betas instead of a named schedule, ``(T,)``.
        timestep_spacing: `linspace`, `leading` or `trailing` (arXiv 2305.08891, table 2).
        clip_sample: clamp the data prediction to ±``clip_sample_range``.
        options: see :class:`~atlas_diffusers.schedulers.options.SchedulerOptions`.

    Raises:
        ValueError: for unknown names, contradictory grids and betas outside ``(0, 1)``.
    """

    config: Any  # of the constructor's arguments, by Diffusers
    order = 1
    init_noise_sigma = 1.0
    renoises: ClassVar[bool] = False
    """Whether the sampler has ``stochastic_sampling``."""
    beta_process: ClassVar[type[VariancePreserving]] = VariancePreserving
    steps_unasked: ClassVar[bool] = False
    """Whether ``step`` works before ``set_timesteps``, on every training timestep, as in Diffusers' class."""

    @takes_options
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        *,
        timestep_spacing: str = "leading",
        clip_sample: bool = False,
        **options: Unpack[SchedulerOptions],
    ):
        self._setup()

    # ------------------------------------------------------------------ noise process

    @property
    def _computes_betas(self) -> bool:
        """Whether the betas come from the class rather than from the configuration."""
        return type(self)._get_beta_schedule is not BaseScheduler._get_beta_schedule

    @property
    def _has_own_betas(self) -> bool:
        """Whether the class is that of one beta schedule."""
        return self._computes_betas

    def _setup(self) -> None:
        if self._has_own_betas and is_flow(self.config):
            raise ValueError(f"{type(self).__name__} has betas of its own, a flow has none; use AtlasDDPMScheduler")
        settle_flow(self)
        self._check_config()
        unread = [] if grid_option(self.config) else [n for n in ("sigma_min", "sigma_max") if self.config[n] is not None]
        if unread:
            text = f"{' and '.join(unread)}: not read, because no sigma grid is on; there are {', '.join(GRID_OF_OPTION)}"
            warnings.warn(text, stacklevel=5)
        self.process = self._make_process()
        self._plan: _Plan | None = None
        self._runs = Runs([])

    def _make_process(self) -> NoiseProcess:
        c = self.config
        if is_flow(c):
            self.register_to_config(_class_name=type(self).__name__)
            return flow_process(c)
        self.betas = shift_snr(self._get_beta_schedule(), c.snr_shift_scale)
        self._register_for_diffusers(self._computes_betas)
        if c.rescale_betas_zero_snr:
            self.betas = rescale_zero_terminal_snr(self.betas)
        self.alphas = 1.0 - self.betas
        self.alphas_cumprod = torch.cumprod(self.alphas, dim=0)
        self._check_signal()
        floor = ZERO_SNR_FLOOR if c.rescale_betas_zero_snr else 0.0
        return self.beta_process(self.alphas_cumprod, floor, self._zero_signal)

    @property
    def _zero_signal(self) -> bool:
        """Whether a step of the betas' process may start at α = 0, where ε says nothing about x_0."""
        return self.config.prediction_type != "epsilon"

    def _get_beta_schedule(self) -> torch.Tensor:
        """The betas of this process, ``(num_train_timesteps,)``; override to add a schedule by subclassing."""
        c = self.config
        return get_betas(c.beta_schedule, c.num_train_timesteps, c.beta_start, c.beta_end, c.trained_betas, below_one=False)

    def _check_signal(self) -> None:
        """Warn of training timesteps without signal, which Diffusers takes as well; steps from them are refused."""
        signal = self.alphas_cumprod > 0
        if not bool(signal[:-1].all()) or not (signal[-1] or self.config.rescale_betas_zero_snr):
            first = int(signal.int().argmin())
            warnings.warn(f"steps cannot start at timestep {first} and above: {self._no_signal()}", stacklevel=6)

    def _no_signal(self) -> str:
        if is_flow(self.config):
            return "the shifts of the flow leave no signal there"
        ends = f"{self.betas.min():g} to {self.betas.max():g}"
        return f"betas must lie in (0, 1) and keep ᾱ above 0 in float32; these, from {ends}, leave no signal"

    def _check_zero_signal(self, timestep: float, level: NoiseLevel, target: NoiseLevel) -> None:
        if level.alpha != 0 or not target.alpha > 0 or not self.process.zero_signal:
            raise ValueError(f"timestep {timestep}: {self._no_signal()}")

    def _check_config(self) -> None:
        c = self.config
        check_prediction_type(c.prediction_type)
        if not 1 <= c.num_train_timesteps <= MOST_TIMESTEPS:
            raise ValueError(f"num_train_timesteps={c.num_train_timesteps}; expected 1 to {MOST_TIMESTEPS}")
        for name, allowed in (
            ("timestep_spacing", TIMESTEP_SPACINGS),
            ("final_sigmas_type", ("zero", "sigma_min")),
        ):
            if c[name] not in allowed:
                raise ValueError(f"{name}={c[name]!r} is unknown; allowed are {allowed}")
        if c.stochastic_sampling and not self.renoises:
            raise ValueError(
                f"stochastic_sampling=True: {type(self).__name__} has no fresh noise; use AtlasEulerScheduler, "
                "AtlasEulerAncestralScheduler or AtlasDDIMScheduler, or set it to False"
            )
        if not c.steps_offset >= 0:
            raise ValueError(f"steps_offset={c.steps_offset}; expected 0 or more, it is added to every timestep")
        grids = [option for option in GRID_OF_OPTION if c[option]]
        if len(grids) > 1:
            raise ValueError(f"at most one sigma grid can be used, got {grids}")
        if not 0 < (1e-9 if c.sigma_min is None else c.sigma_min) < (math.inf if c.sigma_max is None else c.sigma_max):
            raise ValueError(f"expected 0 < sigma_min < sigma_max, got sigma_min={c.sigma_min} and sigma_max={c.sigma_max}")

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    # ------------------------------------------------------------------ grid of steps

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """
        Choose the steps: exactly one of the three ways, or on a flow several that agree in their number.

        Args:
            num_inference_steps: number of steps, placed by ``timestep_spacing`` or the sigma grid of the config.
            device: where ``self.timesteps`` lives.
            timesteps: explicit decreasing training timesteps.
            sigmas: explicit decreasing VE noise levels σ̂ including the final one (usually 0); on a flow its sigmas, before
                the shift and without the final one, as Diffusers' pipelines give them.
            mu: μ of ``use_dynamic_shifting``.

        Raises:
            ValueError: if none or several are given, or values are out of range or not decreasing.
        """
        cacheable = type(num_inference_steps) is int and timesteps is None and sigmas is None
        key = (num_inference_steps, device, mu, self.process) if cacheable else None
        plan = self._plan  # the last one of any thread
        if key is None or plan is None or plan.key != key or plan.config is not self._internal_dict:
            plan = self._plan = self._make_plan(Request(num_inference_steps, timesteps, sigmas, mu), device, key)
        run = Run(plan.grid, plan.timesteps.clone(), plan.sigmas.clone(), plan.levels, plan.num_inference_steps)
        self._runs.start(run)
        self._reset()

    def _first_run(self) -> Run:
        timesteps, sigmas = self.process.training_steps()
        run = Run(None, timesteps, sigmas)
        if self.steps_unasked and not is_flow(self.config):
            source = [self.process.level_at(int(t)) for t in timesteps.tolist()]
            target = [*source[1:], self._final_level()]
            run = Run(TimeGrid(timesteps.tolist(), source, target, timesteps.dtype), timesteps, sigmas)
        return run

    def _make_plan(self, request: Request, device: Any, key: Any) -> _Plan:
        grid = self._build_grid(request)
        steps = len(grid.source)
        calls = self._network_calls(grid, steps)
        sigmas = as_tensor([self.process.sigma(level) for level in (*calls.source, calls.target[-1])], torch.float32)
        timesteps = as_tensor(calls.timesteps, calls.dtype).to(device)
        return _Plan(key, self._internal_dict, steps, calls, timesteps, sigmas, as_tensor(calls.source, torch.float64).T)

    def _build_grid(self, request: Request) -> TimeGrid:
        return self.process.grid(self.config, request, self._final_level())

    def _network_calls(self, grid: TimeGrid, steps: int) -> TimeGrid:
        """The grid of network calls of a grid of steps; a sampler with several calls a step overrides this."""
        return grid

    @property
    def shift(self) -> float | None:
        """The shift of a flow; ``None`` for betas."""
        return self.process.shift

    def set_shift(self, shift: float) -> None:
        """Change the shift of a flow, from the next ``set_timesteps`` on; ``ValueError`` for betas."""
        self.process = self.process.with_shift(shift)

    def dynamic_shift(self, image_seq_len: int) -> float:
        """μ for a number of tokens: linear between ``base_shift`` and ``max_shift``."""
        c = self.config
        slope = (c.max_shift - c.base_shift) / (c.max_image_seq_len - c.base_image_seq_len)
        return c.base_shift + slope * (image_seq_len - c.base_image_seq_len)

    @property
    def final_alpha_cumprod(self) -> torch.Tensor:
        """ᾱ where the last step ends."""
        return torch.tensor(self._final_level().alpha ** 2)

    def _final_level(self) -> NoiseLevel:
        return self.process.final_level(self.config.final_sigmas_type)

    # ------------------------------------------------------------------ predictions

    def _to_working_dtype(self, tensor: torch.Tensor) -> torch.Tensor:
        """float64 stays; everything below float32 is computed in float32."""
        return tensor if tensor.dtype in WORKING_DTYPES else tensor.float()

    def predict_data(self, output: torch.Tensor, sample: torch.Tensor, level: NoiseLevel) -> torch.Tensor:
        """The data prediction x_0 of a network's output at a level, clipped or thresholded as configured."""
        data = self._clip(self.process.data(self.config.prediction_type, output, sample, level))
        return data.clone() if data is output else data  # a step never returns the network's own tensor

    def predict_noise(self, output: torch.Tensor, sample: torch.Tensor, level: NoiseLevel) -> torch.Tensor:
        """The noise prediction ε of a network's output at a level, as the network gave it."""
        return self.process.noise(self.config.prediction_type, output, sample, level)

    def _output(
        self, prev: torch.Tensor, data: torch.Tensor | Callable[[], torch.Tensor], dtype: torch.dtype, return_dict: bool
    ) -> "AtlasSchedulerOutput | tuple[torch.Tensor, ...]":
        """An output object or a tuple, on a flow as in Diffusers ``(prev_sample,)``, for which ``data`` need not be made."""
        prev = prev if prev.dtype == dtype else prev.to(dtype)
        if not return_dict and self.process.shift is not None:
            return (prev,)
        data = (data if isinstance(data, torch.Tensor) else data()).to(dtype)
        return AtlasSchedulerOutput(prev, data) if return_dict else (prev, data)

    @property
    def _clips(self) -> bool:
        return self.config.clip_sample or self.config.thresholding

    def _clip(self, data: torch.Tensor) -> torch.Tensor:
        c = self.config
        if c.thresholding:
            flat = data.flatten(1)
            limit = torch.quantile(flat.abs(), c.dynamic_thresholding_ratio, dim=1, keepdim=True)
            limit = limit.clamp(1, c.sample_max_value)
            return (flat.clamp(-limit, limit) / limit).view_as(data)
        return data.clamp(-c.clip_sample_range, c.clip_sample_range) if c.clip_sample else data

    def _renoised(self, data: torch.Tensor, target: NoiseLevel, sample: torch.Tensor, generator: Generators) -> torch.Tensor:
        """``α' x_0 + σ' z`` of ``stochastic_sampling``."""
        z = self._to_working_dtype(self._noise_like(sample, generator))
        return combine(target.alpha, data, target.sigma, z)

    def _noise_like(self, sample: torch.Tensor, generator: Generators) -> torch.Tensor:
        if generator is None:
            return torch.randn(sample.shape, device=sample.device, dtype=sample.dtype)
        return randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)

    def scale_model_input(self, sample: torch.Tensor, timestep: int | None = None) -> torch.Tensor:
        """The network's input for ``sample``: ``x̂/√(1 + σ̂²)`` in VE coordinates, otherwise ``sample`` itself."""
        return sample
