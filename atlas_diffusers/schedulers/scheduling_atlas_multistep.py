"""The few-step solver: Adams-Bashforth in the angle of the noise level, with nodes and weights that can be calibrated."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..schedules import NoiseLevel, combine
from ..schedules.time_grid import Request, TimeGrid, grid_option, spaced_grid
from .adams_bashforth import adams_bashforth
from .calibration.tables import Calibration, StepTable
from .conversion import extend_config
from .scheduling_base import AtlasSchedulerOutput, BaseScheduler

SMALLEST_STEP = 1e-9  # in radians
SAME_GUIDANCE = 0.25  # relative difference that tables bear


def angle(level: NoiseLevel, scale: float) -> float:
    """``θ = arctan(σ/(cα))``, from 0 for clean data to π/2 for noise."""
    return math.atan2(level.sigma, scale * level.alpha)


def radius(level: NoiseLevel, scale: float) -> float:
    """``r = √(σ² + c²α²)``."""
    return math.hypot(level.sigma, scale * level.alpha)


@dataclass(frozen=True)
class _TableGrid(TimeGrid):
    table: StepTable | None = None


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
            it larger than data of a few dimensions.
        angle_power: p of the nodes ``θ_k = θ_max (1 − k/N)^p``; ``None`` places them by ``timestep_spacing``. A sigma grid,
            explicit timesteps and sigmas, and calibrated nodes take precedence.
        calibration: tables that :meth:`calibrate` made, as JSON.
        Others: see :class:`BaseScheduler`.

    Raises:
        ValueError: also for a calibration of another noise process or prediction type.
    """

    @extend_config
    def __init__(
        self,
        multistep_order: int = 3,
        angle_scale: float = 4.0,
        angle_power: float | None = 2.0,
        calibration: dict | None = None,
    ):
        pass

    def _setup(self) -> None:
        super()._setup()
        self._calibration = None
        if self.config.calibration is not None:
            self._calibration = Calibration.from_config(self.config.calibration)
            self._calibration.check(self.process, self.config.prediction_type)

    def _check_config(self) -> None:
        super()._check_config()
        c = self.config
        if c.multistep_order not in (1, 2, 3, 4):
            raise ValueError(f"multistep_order={c.multistep_order}; expected 1, 2, 3 or 4")
        if not 0 < c.angle_scale < math.inf:
            raise ValueError(f"angle_scale={c.angle_scale}; expected a positive number")
        if c.angle_power is not None and not c.angle_power > 0:
            raise ValueError(f"angle_power={c.angle_power}; expected a positive number or None")

    @classmethod
    def calibrate(
        cls,
        model,
        num_inference_steps: Sequence[int] = (5, 6, 8, 10),
        *,
        config: dict | None = None,
        sample_shape: Sequence[int] | None = None,
        num_trajectories: int = 48,
        teacher_steps: int = 48,
        batch_size: int | None = None,
        prompts: list[str] | None = None,
        guidance_scale: float | None = None,
        generator: torch.Generator | None = None,
        device: str | torch.device | None = None,
        cache: str | Path | None = None,
        progress: bool = True,
    ) -> "AtlasMultistepScheduler":
        """
        A scheduler with nodes and coefficients for a model, from its own fine trajectories; no back-propagation.

        A teacher of order 4 solves ``num_trajectories`` from random noise. Nodes are placed on its trajectories without
        network calls, in several ways; for each, coefficients are regressed on the student's own states, and the best are
        moved a little. They are kept if they are better than the plain solver on a held-out third of the trajectories;
        otherwise a warning says so and that step count stays plain. ``scheduler.calibration_report`` has the cost and the
        expected errors.

        Args:
            model: a pipeline with a ``unet``, or a function ``f(sample, timestep)`` that returns predictions of
                ``prediction_type``; it is called with ``batch_size`` samples at a time, in one order.
            num_inference_steps: step counts to make tables for, each at least 2.
            config: of the noise process, such as ``scheduler.config``; by default the pipeline's.
            sample_shape: of one sample, for a function.
            num_trajectories: at least 8.
            teacher_steps: network calls of one trajectory.
            batch_size: samples in one call; by default all.
            prompts: for a pipeline, taken in turn; tables serve other prompts as well.
            guidance_scale: that the pipeline will be used with.
            generator: of the start noise.
            device: of the samples; by default the pipeline's, or the CPU.
            cache: folder for the teacher's trajectories, from which an interrupted calibration goes on.
            progress: show bars.

        Raises:
            ValueError: for counts out of range, a model that returns another shape, NaN or infinity, or a cache of another
                calibration.
        """
        from .calibration.run import run_calibration

        return run_calibration(
            cls, model, tuple(num_inference_steps), config, sample_shape, num_trajectories, teacher_steps, batch_size,
            prompts, guidance_scale, generator, device, cache, progress,
        )  # fmt: skip

    @property
    def calibrated_steps(self) -> list[int]:
        """Step counts that there are tables for."""
        return sorted(self._calibration.tables) if self._calibration else []

    def check_guidance_scale(self, guidance_scale: float) -> None:
        """Warn where the steps in use are calibrated for another guidance scale."""
        calibration = self._calibration
        if self._table_in_use is None or calibration.guidance_scale is None:
            return
        if not math.isclose(guidance_scale, calibration.guidance_scale, rel_tol=SAME_GUIDANCE):
            warnings.warn(
                f"the steps are calibrated for guidance_scale={calibration.guidance_scale:g}, the call has {guidance_scale:g}; "
                "calibrate for it, or switch the tables off by calibration=None",
                stacklevel=3,
            )

    @property
    def init_noise_sigma(self) -> float:
        """Scale of the start noise: below 1 where the first calibrated node is below the noisiest level."""
        return 1.0 if self._table_in_use is None else self._table_in_use.start

    @property
    def _table_in_use(self) -> StepTable | None:
        return getattr(self._grid, "table", None)

    def _build_grid(self, request: Request) -> TimeGrid:
        request.check(self.config)
        steps = request.num_inference_steps
        if steps is None:
            return super()._build_grid(request)
        table = self._calibration.tables.get(steps) if self._calibration else None
        if table is not None:
            return _TableGrid(**vars(self._grid_of([*table.sigmas, 0.0])), table=table)
        if self._calibration and self._calibration.tables:
            warnings.warn(f"{steps} steps are not calibrated, only {self.calibrated_steps}; plain nodes are used", stacklevel=5)
        if self.config.angle_power is None or grid_option(self.config):
            return super()._build_grid(request)
        spaced_grid(self.config, steps, len(self.process))
        return self._grid_of([*self._placed(steps), self._final_level().sigma_hat])

    def _placed(self, steps: int) -> list[float]:
        """σ̂ of the nodes ``θ_max (1 − k/N)^p``; where the last would be below training timestep 0, it is that instead."""
        scale, power, last = self.config.angle_scale, self.config.angle_power, 0.0
        largest, smallest = (angle(level, scale) for level in self.process.ends)
        parts = [1 - k / steps for k in range(steps)]
        if steps > 1 and largest * parts[-1] ** power < smallest:
            parts, last = [1 - k / (steps - 1) for k in range(steps)], smallest
        return [scale * math.tan(last + (largest - last) * part**power) for part in parts]

    def _grid_of(self, sigma_hats: list[float]) -> TimeGrid:
        return self.process.grid_through([self.process.from_sigma_hat(sigma_hat) for sigma_hat in sigma_hats])

    def _reset(self) -> None:
        self._velocities: list[torch.Tensor] = []
        self._angles: list[float] = []

    def step(
        self,
        model_output: torch.Tensor,
        timestep: torch.Tensor | int,
        sample: torch.Tensor,
        return_dict: bool = True,
    ) -> AtlasSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """
        One step of the formula above.

        Args:
            model_output: the network's prediction at ``timestep``, ``(batch, channels, height, width)``.
            timestep: an element of ``self.timesteps``.
            sample: ``x``, same shape; half precision is computed in float32.
            return_dict: return an output object instead of ``(prev_sample, pred_original_sample)``.
        """
        index = self._advance(timestep)
        level, target = self._grid.source[index], self._grid.target[index]
        x, output = self._to_working_dtype(sample), self._to_working_dtype(model_output)
        data = self.predict_data(output, x, level)
        table = self._table_in_use if len(self._velocities) == index else None
        c = self.config.angle_scale if table is None else 1.0
        self._remember(self.velocity(output, x, data, level, c), angle(level, c))

        if table is None:
            scale, weights = self._adams_bashforth(angle(target, c))
        else:
            scale, weights = table.scales[index], table.weights[index]
        r, r_next = radius(level, c), radius(target, c)
        prev = x * ((1 + scale) * r_next / r)
        for weight, velocity in zip(weights, self._velocities[-len(weights) :]):
            prev = torch.add(prev, velocity, alpha=weight * r_next)
        return self._output(prev, data, sample.dtype, return_dict)

    def _remember(self, velocity: torch.Tensor, at: float) -> None:
        if self._angles and self._angles[-1] - at < SMALLEST_STEP:  # a flat part of the noise process
            self._velocities.pop()
            self._angles.pop()
        self._velocities.append(velocity)
        self._angles.append(at)

    def velocity(
        self, output: torch.Tensor, x: torch.Tensor, data: torch.Tensor, level: NoiseLevel, c: float = 1.0
    ) -> torch.Tensor:
        """``v`` of a network's output at a level, consistent with its data prediction, which may be clipped."""
        if c == 1 and self.config.prediction_type == "v_prediction" and not self._clips:
            return output
        r = radius(level, c)
        return combine(c * level.alpha / (r * level.sigma), x, -r / (c * level.sigma), data)

    def _adams_bashforth(self, target: float) -> tuple[float, list[float]]:
        """``a`` and the weights of the last velocities."""
        if target == 0 and len(self._angles) == 1:  # a single step ends at the data prediction
            return math.cos(self._angles[0]) - 1, [-math.sin(self._angles[0])]
        return 0.0, adams_bashforth(self._angles[-self.config.multistep_order :], target)
