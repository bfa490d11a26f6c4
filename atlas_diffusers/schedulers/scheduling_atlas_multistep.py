"""The few-step solver: Adams-Bashforth in the angle of the noise level, with nodes and weights that can be calibrated."""

import math
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from diffusers.utils import logging

from ..schedules import NoiseLevel
from ..schedules.time_grid import Request, TimeGrid, as_tensor, grid_option
from .angle import ScaledVelocity, VelocityHistory, angle, radius, velocity_coefficients
from .angle_nodes import Nodes, grid_of, lean, nodes_from, table_of
from .calibration.reports import CalibrationReport
from .calibration.tables import Calibration, StepTable, calibrations_of
from .network_step import network_step
from .options import SchedulerOptions, Unpack, takes_options
from .scheduling_base import AtlasSchedulerOutput, BaseScheduler

logger = logging.get_logger(__name__)
NOISE_ALONE = 1e6  # σ̂
SCALE = 3.0
SAME_GUIDANCE = 0.25  # relative difference that tables bear


class AtlasMultistepScheduler(BaseScheduler):
    r"""
    Few-step linear multistep solver in the angle ``θ = arctan(σ/(cα))``, the radius ``r = √(σ² + c²α²)`` and the velocity
    ``v = cos θ ε − sin θ x_0/c``, for which the probability flow is ``d(x/r)/dθ = v``:

        x_{n+1} / r_{n+1} = (1 + a_n) x_n / r_n + Σ_{j≤n} w_nj v_j

    Uncalibrated, ``a = 0`` and ``w`` are the variable-step Adams-Bashforth weights of order up to ``multistep_order``. After
    :meth:`calibrate` nodes, ``w`` and ``a`` are those that carry a model's own fine trajectories with that many calls, in
    ``c = 1``, where r = 1 and v is the velocity of v-prediction; a trajectory that begins in the middle of them
    (image-to-image) uses Adams-Bashforth on the same nodes. Related: DPM-Solver-v3 (arXiv 2310.13268), GITS (arXiv
    2405.11326), S4S (arXiv 2502.17423).

    Args:
        multistep_order: 1 to 4.
        angle_scale: c, the noise level at which θ is π/4. Pictures, whose largest principal components are far above 1, want
            it larger than data of a few dimensions. By default ``3 √σ̂`` of the level halfway through training, where a
            schedule puts the middle of what there is to decide: 3.8 for Stable Diffusion, 5.6 for linear betas, 3 for cosine
            ones and flows. A flow's shift, which grows with the resolution, raises it by half of what exceeds 1, to twice as
            much at a shift of 3.
        angle_power: p of the nodes ``θ_k = θ_max (1 − k/N)^p``, raised with c, by a fifth at a shift of 3; ``None`` places
            them by ``timestep_spacing``. A sigma grid, explicit timesteps and sigmas, and calibrated nodes take precedence.
        use_angle_nodes: lay these nodes between the first sigma of a flow's pipeline and clean data: by default where its
            sigmas are even, before the shift; ``True`` for sigmas of every kind, ``False`` for none.
        calibration: tables that :meth:`calibrate` made, as JSON; a list of them for several guidance scales.
        options: see :class:`BaseScheduler`.

    Raises:
        ValueError: also for a calibration of another noise process or prediction type.
    """

    calibration_report: CalibrationReport
    """Of a scheduler that :meth:`calibrate` returned."""

    @takes_options
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        *,
        multistep_order: int = 3,
        angle_scale: float | None = None,
        angle_power: float | None = 2.0,
        use_angle_nodes: bool | None = None,
        calibration: dict | list[dict] | None = None,
        timestep_spacing: str = "leading",
        clip_sample: bool = False,
        **options: Unpack[SchedulerOptions],
    ):
        self._setup()

    def _setup(self) -> None:
        super()._setup()
        self._calibrations = calibrations_of(self.config)
        for calibration in self._calibrations:
            calibration.check(self.process_sigma_hats, self.config.prediction_type)
        self._calibration: Calibration | None = self._calibrations[0] if self._calibrations else None

    def _check_config(self) -> None:
        super()._check_config()
        c = self.config
        if c.multistep_order not in (1, 2, 3, 4):
            raise ValueError(f"multistep_order={c.multistep_order}; expected 1, 2, 3 or 4")
        if c.angle_scale is not None and not 0 < c.angle_scale < math.inf:
            raise ValueError(f"angle_scale={c.angle_scale}; expected a positive number or None")
        if c.angle_power is not None and not c.angle_power > 0:
            raise ValueError(f"angle_power={c.angle_power}; expected a positive number or None")

    @classmethod
    def calibrate(
        cls,
        model: object,
        num_inference_steps: Sequence[int] = (5, 6, 8, 10),
        *,
        call: dict | None = None,
        prompts: list[str] | None = None,
        guidance_scale: float | None = None,
        config: dict | None = None,
        sample_shape: Sequence[int] | None = None,
        num_trajectories: int = 64,
        teacher_steps: int = 36,
        budget: int = 15_000,
        batch_size: int | None = None,
        generator: torch.Generator | None = None,
        device: str | torch.device | None = None,
        cache: str | Path | None = None,
        progress: bool = True,
    ) -> "AtlasMultistepScheduler":
        """
        A scheduler with nodes and coefficients for a model, from its own fine trajectories; no back-propagation.

        A pipeline is called as it will be used, with a scheduler in place of its own. A teacher of order 4 solves
        ``num_trajectories`` from random noise. Nodes are placed on its trajectories without network calls, in several ways;
        for each, coefficients are regressed on the student's own states, and the best are moved a little. They are kept if
        they are better than the plain solver on a held-out third of the trajectories; otherwise a warning says so and that
        step count stays plain. ``scheduler.calibration_report`` has the cost and the expected errors.

        Args:
            model: a pipeline, or a function ``f(sample, timestep)`` that returns predictions of ``prediction_type`` and is
                called with ``batch_size`` samples at a time, in one order.
            num_inference_steps: step counts to make tables for, each at least 2.
            call: arguments of the pipeline's call, such as ``{"prompt": [...], "guidance_scale": 5, "height": 512}``; lists of
                prompts, labels and pictures are taken in turn, and tables serve others as well. With ``image`` and
                ``strength`` the tables are for image-to-image with that strength.
            prompts, guidance_scale: short for the same in ``call``; of a function, the guidance that it has.
            config: of the noise process, such as ``scheduler.config``; by default the pipeline's.
            sample_shape: of one sample, for a function.
            num_trajectories: at least 8.
            teacher_steps: network calls of one trajectory.
            budget: network calls in all, those of the teacher included; more are made where it does not allow two tables of
                every step count.
            batch_size: samples in one call; by default all, and 8 of a pipeline. The start noise does not depend on it.
            generator: of the seeds of the start noise, one a trajectory; by default seeded with 0.
            device: of the samples, for a function; by default the CPU.
            cache: folder for all that was computed, from which an interrupted calibration goes on.
            progress: show bars, and at first how long it will take.

        Raises:
            ValueError: for counts out of range, a pipeline whose call cannot be repeated with the same noise, a model that
                returns another shape, NaN or infinity, or a cache of another calibration.
        """
        from .calibration.calibrated import Settings, calibrated_scheduler

        folder = None if cache is None else Path(cache)
        settings = Settings(tuple(num_inference_steps), num_trajectories, teacher_steps, budget, folder, progress)
        return calibrated_scheduler(
            cls, model, call, prompts, guidance_scale, config, sample_shape, batch_size, generator, device, settings
        )

    @property
    def calibrated_steps(self) -> list[int]:
        """Step counts that there are tables for, from noise."""
        return sorted(steps for steps, begin in self._calibration.tables if not begin) if self._calibration else []

    def add_tables(self, other: "AtlasMultistepScheduler") -> None:
        """
        Take the tables of a calibration for another guidance scale as well.

        Raises:
            ValueError: where there are none, or this scheduler has tables for that scale.
        """
        together = [*self._calibrations, *other._calibrations]
        scales = [calibration.guidance_scale for calibration in together]
        if not other._calibrations or None in scales or len({*scales}) < len(scales):
            raise ValueError(f"tables of one scheduler need guidance scales that differ, these have {scales}")
        self.register_to_config(calibration=[calibration.to_config() for calibration in together])
        self._setup()

    def set_guidance_scale(self, guidance_scale: float) -> None:
        """
        Use the tables whose guidance scale is nearest, from the next ``set_timesteps`` on; ``AtlasPipeline`` does so for its
        calls. At first they are those that were made first.
        """
        if len(self._calibrations) > 1:
            self._calibration = min(self._calibrations, key=lambda c: abs(math.log((c.guidance_scale or 1) / guidance_scale)))
            self._plan = None

    def check_guidance_scale(self, guidance_scale: float) -> None:
        """Warn where the steps in use are calibrated for another guidance scale."""
        calibration = self._calibration
        if calibration is None or self._table_in_use is None or calibration.guidance_scale is None:
            return
        if not math.isclose(guidance_scale, calibration.guidance_scale, rel_tol=SAME_GUIDANCE):
            warnings.warn(
                f"the steps are calibrated for guidance_scale={calibration.guidance_scale:g}, the call has {guidance_scale:g}; "
                "calibrate for it, or switch the tables off by calibration=None",
                stacklevel=3,
            )

    @property
    def process_sigma_hats(self) -> list[float]:
        """σ̂ at the first, middle and last training timestep, by which tables know their process."""
        process = self.process
        inner = [process.level_at(0).sigma_hat, process.level_at(len(process) // 2).sigma_hat]
        return [*inner, self.largest_sigma_hat]

    @property
    def largest_sigma_hat(self) -> float:
        """σ̂ of the noisiest level of training; of a flow, where it is infinite, so large that nothing is left of the data."""
        return min(self.process.ends[0].sigma_hat, NOISE_ALONE)

    @property
    def levels(self) -> list[NoiseLevel]:
        """Noise levels of the network calls that ``set_timesteps`` chose."""
        return self._grid.source

    def nodes(self, sigma_hats: Sequence[float]) -> TimeGrid:
        """Network calls at these σ̂, the last of which steps to clean data."""
        return grid_of(self.process, [*sigma_hats, 0.0])

    @property
    def init_noise_sigma(self) -> float:
        """Scale of the start noise: below 1 where the first calibrated node is below the noisiest level."""
        table = self._table_in_use
        return 1.0 if table is None else table.start * radius(self._grid.source[0], 1.0)

    @property
    def _table_in_use(self) -> StepTable | None:
        return getattr(self._run.grid, "table", None)

    def _build_grid(self, request: Request) -> TimeGrid:
        even, c = super()._build_grid(request), self.config
        steps = self.process.open_steps(request, whatever=c.use_angle_nodes is True)
        if steps is None and c.use_angle_nodes is None:
            logger.info("the sigmas or timesteps given are uneven and kept; use_angle_nodes=True lays nodes of its own")
        if steps is None or c.use_angle_nodes is False:
            return even
        calibration = self._calibration if self.calibrated_steps else None
        if calibration is not None and request.timesteps is None and self._from_noise(request, even):
            table = table_of(calibration, steps, 0, even)
            if table is not None:
                return Nodes(**vars(self.nodes(table.sigmas)), even=even, table=table)
            warnings.warn(f"{steps} steps are not calibrated, only {self.calibrated_steps}; plain nodes are used", stacklevel=5)
        if c.angle_power is None or grid_option(c):
            return even
        return self._nodes_from(0, even, clock=1.0 if request.timesteps is None else even.shift)

    def _from_noise(self, request: Request, even: TimeGrid) -> bool:
        """Whether a trajectory starts where tables do."""
        return request.sigmas is None or math.isclose(even.source[0].sigma, self.process.ends[0].sigma)

    def _nodes_from(self, begin: int, even: TimeGrid, clock: float) -> Nodes:
        """The nodes of an angle from the level of an even grid's call ``begin`` on."""
        power = self.config.angle_power * (1 + lean(even) / 5)
        return nodes_from(self.process, begin, even, clock, self._scale_of(even), power)

    def _scale_of(self, grid: TimeGrid) -> float:
        """c of a grid, which a flow's shift towards noise raises."""
        scale = self.config.angle_scale or SCALE * math.sqrt(self.process.middle.sigma_hat)
        return scale * (1 + lean(grid))

    def set_begin_index(self, begin_index: int = 0) -> None:
        """
        Start at ``timesteps[begin_index]`` (image-to-image). Nodes of uneven spacing are laid anew from the noise level that
        an even grid has there, so that a strength means the same with every grid; ``timesteps`` changes in place.
        """
        super().set_begin_index(begin_index)
        grid, table = self._grid, None
        if begin_index and self._calibration is not None:
            table = table_of(self._calibration, len(grid.source), begin_index, getattr(grid, "even", grid))
        if begin_index and (table is not None or isinstance(grid, Nodes)):
            self._lay_from(begin_index, getattr(grid, "even", grid), table)

    def _lay_from(self, begin: int, even: TimeGrid, table: StepTable | None) -> None:
        """The calls from ``begin`` on: those of a table, or from the level of the even grid."""
        laid = self._nodes_from(begin, even, getattr(self._grid, "clock", 1.0)) if table is None else self.nodes(table.sigmas)
        lists = {name: getattr(self._grid, name)[:begin] + getattr(laid, name) for name in ("timesteps", "source", "target")}
        run = self._run
        grid = run.grid = Nodes(**{**vars(laid), **lists, "even": even, "table": table, "begin": begin})
        run.levels = as_tensor(grid.source, torch.float64).T
        run.timesteps[begin:] = torch.tensor(laid.timesteps)
        run.sigmas[begin:-1] = torch.tensor([self.process.sigma(level) for level in laid.source])

    def _reset(self) -> None:
        self._history = VelocityHistory()

    @network_step
    def step(
        self,
        model_output: torch.Tensor,
        timestep: torch.Tensor | int,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        per_token_timesteps: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> AtlasSchedulerOutput | tuple[torch.Tensor, ...]:
        """
        One step of the formula above.

        Args:
            model_output: the network's prediction at ``timestep``, ``(batch, channels, height, width)``.
            timestep: an element of ``self.timesteps``.
            sample: ``x``, same shape; half precision is computed in float32.
            generator: taken from pipelines that pass one; the step draws no noise.
            per_token_timesteps: timesteps of tokens at levels of their own (LTX), ``(batch, tokens)``; ``model_output`` then
                has its sign changed, as in Diffusers.
            return_dict: return an output object instead of ``(prev_sample, pred_original_sample)``; a flow has no second one.
        """
        run, index = self._advance(timestep)
        grid, history = run.planned(), run.history
        level, target = grid.source[index], grid.target[index]
        x, output = self._to_working_dtype(sample), self._to_working_dtype(model_output)
        first, planned, order = getattr(grid, "begin", 0), self._table_in_use, self.config.multistep_order
        table = planned if history.calls == index - first else None
        c = self._scale_of(grid) if table is None else 1.0
        here = angle(level, c)
        room = history.make_room(here, order if planned is None else None)
        history.remember(self.velocity(output, x, level, c, None if torch.is_grad_enabled() else room), here)

        if table is None:
            scale, weights = history.adams_bashforth(angle(target, c), order)
        else:
            scale, weights = table.scales[index - first], table.weights[index - first]
        r, r_next = radius(level, c), radius(target, c)
        prev = x * ((1 + scale) * r_next / r)
        for weight, velocity in zip(weights, history.velocities[-len(weights) :]):
            prev.add_(velocity.tensor, alpha=weight * velocity.factor * r_next)
        return self._output(prev, partial(self.predict_data, output, x, level), sample.dtype, return_dict)

    def velocity(
        self, output: torch.Tensor, x: torch.Tensor, level: NoiseLevel, c: float = 1.0, room: torch.Tensor | None = None
    ) -> ScaledVelocity:
        """``v`` of a network's output at a level, that of its data prediction where that is clipped; in ``room`` if given."""
        kind = self.config.prediction_type
        if self._clips:
            kind, output = "sample", self.predict_data(output, x, level)
        on_x, on_output = velocity_coefficients(kind, level, c)
        return ScaledVelocity(torch.add(output, x, alpha=on_x / on_output, out=room), on_output)
