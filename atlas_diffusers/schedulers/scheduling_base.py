"""What every sampler shares: configuration, noise process, time grid, position in it. A sampler adds one ``step``."""

import functools
import inspect
from dataclasses import dataclass

import diffusers
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
from diffusers.utils import BaseOutput

from ..schedules import NoiseLevel, NoiseTable, data_coefficients, get_betas, noise_coefficients
from ..schedules.betas import rescale_zero_terminal_snr
from ..schedules.grids import TIMESTEP_SPACINGS
from ..schedules.levels import CLEAN
from ..schedules.predictions import check_prediction_type
from .time_grid import TimeGrid, build_time_grid

FAMILY: list[str] = []
ZERO_SNR_FLOOR = 2.0**-24
# what a network was trained with: travels to other classes even where it was left at its default
PROCESS_OPTIONS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")
# schedules that every Diffusers scheduler knows; others travel as explicit betas
STOCK_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")


@dataclass
class AtlasSchedulerOutput(BaseOutput):
    """``prev_sample``: x at the next, less noisy level. ``pred_original_sample``: the data prediction it was made from."""

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor | None = None


def _without_process(config) -> list[str]:
    """The options left at their defaults that another class may replace by its own defaults."""
    return [name for name in config.get("_use_default_values", ()) if name not in PROCESS_OPTIONS]


def extend_config(init):
    """
    Decorate the ``__init__`` of a sampler that adds options to (or changes defaults of) ``BaseNoiseScheduler``.

    The decorated signature is the base's arguments followed by its own, all registered in the config; the body runs
    after the base is set up, with its own arguments only.
    """
    own = list(inspect.signature(init).parameters.values())[1:]
    shared = inspect.signature(BaseNoiseScheduler.__init__).parameters
    merged = {**shared, **{p.name: p for p in own}}
    signature = inspect.Signature([p.replace(kind=p.POSITIONAL_OR_KEYWORD) for p in merged.values()])

    @functools.wraps(init)
    def extended(self, *args, **kwargs):
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        init(self, **{p.name: bound.arguments[p.name] for p in own})
        self._setup()

    extended.__signature__ = signature
    return register_to_config(extended)


def combine(a: float, x: torch.Tensor, b: float, y: torch.Tensor) -> torch.Tensor:
    """``a·x + b·y`` in as few passes over memory as the scalars allow."""
    if a == 0:
        return y if b == 1 else y * b
    if b == 0:
        return x if a == 1 else x * a
    return torch.add(x, y, alpha=b) if a == 1 else torch.mul(x, a).add_(y, alpha=b)


class BaseNoiseScheduler(SchedulerMixin, ConfigMixin):
    r"""
    Base of all samplers: owns the noise process ``x_t = α_t x_0 + σ_t ε`` and the grid of steps; a subclass writes ``step``.

    Args:
        num_train_timesteps: T, the timesteps that the network was trained with.
        beta_start, beta_end: ends of the beta schedule.
        beta_schedule: a name in :data:`atlas_diffusers.schedules.BETA_SCHEDULES`.
        trained_betas: explicit betas instead of a named schedule, ``(T,)``.
        prediction_type: `epsilon`, `sample`, `v_prediction` (α ε − σ x_0) or `flow_prediction` (ε − x_0).
        timestep_spacing: `linspace`, `leading` or `trailing` (arXiv 2305.08891, table 2).
        steps_offset: added to `leading` timesteps.
        use_karras_sigmas, use_exponential_sigmas, use_beta_sigmas, use_lu_lambdas: grid of σ̂ instead of a spacing of
            the training timesteps; at most one.
        final_sigmas_type: where the last step ends: `zero` (clean data) or `sigma_min` (training timestep 0).
        rescale_betas_zero_snr: rescale the betas to zero terminal SNR (arXiv 2305.08891, algorithm 1).
        clip_sample, clip_sample_range: clamp the data prediction to ±range.
        thresholding, dynamic_thresholding_ratio, sample_max_value: clamp it to a quantile of its own absolute values and
            rescale (Imagen, arXiv 2205.11487). Takes precedence over ``clip_sample``, as in Diffusers.

    Raises:
        ValueError: for unknown names, contradictory grids and betas outside ``(0, 1)``.
    """

    _compatibles = [e.name for e in KarrasDiffusionSchedulers if e.name != "EDMEulerScheduler"]
    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: list[float] | None = None,
        prediction_type: str = "epsilon",
        timestep_spacing: str = "leading",
        steps_offset: int = 0,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        use_lu_lambdas: bool = False,
        final_sigmas_type: str = "zero",
        rescale_betas_zero_snr: bool = False,
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
    ):
        self._setup()

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        FAMILY.append(cls.__name__)

    @classmethod
    def from_config(cls, config, *args, **kwargs):
        """
        As in Diffusers, from any scheduler's configuration; the noise process travels even where it is a default, and
        betas derived from a schedule's name give way when the schedule is overridden.
        """
        if isinstance(config, dict):
            config = {**config, "_use_default_values": _without_process(config)}
            if config.get("_derived_betas") and not kwargs.keys().isdisjoint(PROCESS_OPTIONS):
                del config["_derived_betas"], config["trained_betas"]
        return super().from_config(config, *args, **kwargs)

    @classmethod
    def _get_compatibles(cls):
        names = {cls.__name__, *cls._compatibles, *FAMILY}
        return [getattr(diffusers, name) for name in sorted(names) if hasattr(diffusers, name)]

    # ------------------------------------------------------------------ noise process

    def _setup(self) -> None:
        self._check_config()
        self.betas = self._get_beta_schedule()
        self._register_for_diffusers()
        c = self.config
        if c.rescale_betas_zero_snr:
            self.betas = rescale_zero_terminal_snr(self.betas)
        self.alphas = 1.0 - self.betas
        self.alphas_cumprod = torch.cumprod(self.alphas, dim=0)
        floor = ZERO_SNR_FLOOR if c.rescale_betas_zero_snr else 0.0
        self._finite_table = NoiseTable(self.alphas_cumprod, floor)
        # ε says nothing about x_0 where α = 0, so with it the process stops short of zero SNR
        self._table = self._finite_table if c.prediction_type == "epsilon" else NoiseTable(self.alphas_cumprod)
        self.timesteps = torch.arange(len(self.betas) - 1, -1, -1)
        self.num_inference_steps = None
        self._grid: TimeGrid | None = None
        self._step_index = self._begin_index = None

    def _register_for_diffusers(self) -> None:
        """Complete the configuration so that Diffusers' own schedulers read the same noise process from it."""
        c = self.config
        self.register_to_config(_class_name=type(self).__name__, _use_default_values=_without_process(c))
        overridden = type(self)._get_beta_schedule is not BaseNoiseScheduler._get_beta_schedule
        if c.beta_schedule == "cosine" and not overridden:
            self.register_to_config(beta_schedule="squaredcos_cap_v2")
        elif overridden or (c.trained_betas is None and c.beta_schedule not in STOCK_SCHEDULES):
            self.register_to_config(trained_betas=self.betas.tolist(), _derived_betas=True)

    def _get_beta_schedule(self) -> torch.Tensor:
        """The betas of this process, ``(num_train_timesteps,)``; override to add a schedule by subclassing."""
        c = self.config
        return get_betas(c.beta_schedule, c.num_train_timesteps, c.beta_start, c.beta_end, c.trained_betas)

    def _check_config(self) -> None:
        c = self.config
        check_prediction_type(c.prediction_type)
        for name, allowed in (
            ("timestep_spacing", TIMESTEP_SPACINGS),
            ("final_sigmas_type", ("zero", "sigma_min")),
        ):
            if c[name] not in allowed:
                raise ValueError(f"{name}={c[name]!r} is unknown; allowed are {allowed}")
        grids = [k for k in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas") if c[k]]
        if len(grids) > 1:
            raise ValueError(f"at most one sigma grid can be used, got {grids}")

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    # ------------------------------------------------------------------ grid of steps

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
    ) -> None:
        """
        Choose the steps; exactly one of the three ways.

        Args:
            num_inference_steps: number of steps, placed by ``timestep_spacing`` or the sigma grid of the config.
            device: where ``self.timesteps`` lives.
            timesteps: explicit decreasing training timesteps.
            sigmas: explicit decreasing VE noise levels σ̂ including the final one (usually 0).

        Raises:
            ValueError: if none or several are given, or values are out of range or not decreasing.
        """
        self._grid = build_time_grid(
            self.config, self._table, self._finite_table, num_inference_steps, timesteps, sigmas, self._final_level()
        )
        self.num_inference_steps = len(self._grid.source)
        self.timesteps = torch.tensor(self._grid.timesteps, dtype=self._grid.dtype, device=device)
        self.sigmas = torch.tensor([level.sigma_hat for level in (*self._grid.source, self._grid.target[-1])])
        self._step_index = self._begin_index = None

    def _final_level(self) -> NoiseLevel:
        return CLEAN if self.config.final_sigmas_type == "zero" else self._table.level(0)

    @property
    def step_index(self) -> int | None:
        """Index of the next step in ``timesteps``; ``None`` before the first step."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Index of the first step, where a pipeline set it."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start at ``timesteps[begin_index]`` (image-to-image)."""
        self._begin_index = begin_index

    def index_for_timestep(self, timestep: torch.Tensor | float | int) -> int:
        """
        Position of ``timestep`` in ``self.timesteps``, without reading a device.

        An element of ``self.timesteps`` is a view of it, so its storage offset is the position. Other tensors and plain
        numbers are looked up by value; among equal timesteps the expected next one wins.
        """
        if isinstance(timestep, torch.Tensor):
            if timestep.dtype == self.timesteps.dtype and timestep.device == self.timesteps.device:
                offset = (timestep.data_ptr() - self.timesteps.data_ptr()) // timestep.element_size()
                if timestep.numel() and 0 <= offset < len(self._grid.timesteps):
                    return offset
            timestep = timestep.reshape(-1)[0].item()
        values = self._grid.timesteps
        for index in (self._step_index, self._begin_index):
            if index is not None and index < len(values) and values[index] == timestep:
                return index
        if timestep not in values:
            raise ValueError(f"timestep {timestep} is not among the {len(values)} timesteps of set_timesteps: {values}")
        return len(values) - 1 - values[::-1].index(timestep)

    def _advance(self, timestep: torch.Tensor | float | int) -> int:
        """Index of the step to take now."""
        if self._grid is None:
            raise ValueError("step() was called before set_timesteps(); choose the steps first")
        if self._step_index is not None and self._step_index >= len(self._grid.timesteps):
            raise ValueError(f"step() was called more often than the {len(self._grid.timesteps)} steps of set_timesteps()")
        index = self.index_for_timestep(timestep)
        self._step_index = index + 1
        return index

    # ------------------------------------------------------------------ predictions

    def _to_working_dtype(self, tensor: torch.Tensor) -> torch.Tensor:
        """float64 stays; everything below float32 is computed in float32."""
        return tensor if tensor.dtype == torch.float64 else tensor.float()

    def _predict_data(self, output: torch.Tensor, sample: torch.Tensor, level: NoiseLevel) -> torch.Tensor:
        """The data prediction x_0, clipped or thresholded as configured."""
        a, b = data_coefficients(self.config.prediction_type, *level)
        return self._clip(combine(a, sample, b, output))

    def _predict(
        self, output: torch.Tensor, sample: torch.Tensor, level: NoiseLevel
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The data prediction x_0 (clipped) and the noise prediction ε (as the network gave it)."""
        a, b = noise_coefficients(self.config.prediction_type, *level)
        return self._predict_data(output, sample, level), combine(a, sample, b, output)

    def _output(
        self, prev: torch.Tensor, data: torch.Tensor, dtype: torch.dtype, return_dict: bool
    ) -> "AtlasSchedulerOutput | tuple[torch.Tensor, torch.Tensor]":
        prev, data = prev.to(dtype), data.to(dtype)
        return AtlasSchedulerOutput(prev, data) if return_dict else (prev, data)

    def _clip(self, data: torch.Tensor) -> torch.Tensor:
        c = self.config
        if c.thresholding:
            flat = data.flatten(1)
            limit = torch.quantile(flat.abs(), c.dynamic_thresholding_ratio, dim=1, keepdim=True)
            limit = limit.clamp(1, c.sample_max_value)
            return (flat.clamp(-limit, limit) / limit).view_as(data)
        return data.clamp(-c.clip_sample_range, c.clip_sample_range) if c.clip_sample else data

    def _noise_like(self, sample: torch.Tensor, generator) -> torch.Tensor:
        from diffusers.utils.torch_utils import randn_tensor

        return randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)

    def scale_model_input(self, sample: torch.Tensor, timestep: int | None = None) -> torch.Tensor:
        """The network's input for ``sample``; the identity in VP coordinates."""
        return sample

    # ------------------------------------------------------------------ forward process

    def levels_at(self, timesteps: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        α and σ at one timestep a sample, shaped to broadcast over ``like``; fractional timesteps are interpolated.

        Args:
            timesteps: ``(batch,)`` or ``(1,)``, in ``[0, T)``.
            like: gives device, dtype and number of dimensions.
        """
        if timesteps.is_floating_point():
            alpha_bar = 1 / (1 + self._finite_table.sigma_hat_at(timesteps.to(like.device), log=True) ** 2)
        else:
            alpha_bar = self._table.alphas_cumprod.to(like.device)[timesteps.to(like.device)]
        shape = (-1,) + (1,) * (like.ndim - 1)
        return alpha_bar.sqrt().to(like.dtype).view(shape), (1 - alpha_bar).sqrt().to(like.dtype).view(shape)

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """``α_t x_0 + σ_t ε``, one timestep a sample, ``(batch,)``."""
        alpha, sigma = self.levels_at(timesteps, original_samples)
        return alpha * original_samples + sigma * noise

    def get_velocity(self, sample: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """``v = α_t ε − σ_t x_0`` (arXiv 2202.00512), one timestep a sample."""
        alpha, sigma = self.levels_at(timesteps, sample)
        return alpha * noise - sigma * sample
