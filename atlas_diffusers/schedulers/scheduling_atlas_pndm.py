"""PNDM: DDIM's transfer with a noise prediction combined from several network calls."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import cast

import numpy as np
import torch

from ..schedules import NoiseLevel, data_coefficients, noise_coefficients
from ..schedules.time_grid import TimeGrid
from .network_step import network_step
from .options import SchedulerOptions, Unpack, takes_options
from .pndm_calls import PNDMCalls, plms_calls, runge_kutta_calls
from .position import Run
from .scheduling_base import AtlasSchedulerOutput, BaseScheduler

LARGEST_NOISE = 1000.0  # σ/α from which Runge-Kutta steps can start
ADAMS_BASHFORTH = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


@dataclass
class _History:
    """Predictions of the last steps, oldest first, and what a step with several calls keeps between them."""

    predictions: list[torch.Tensor] = field(default_factory=list)
    partial: torch.Tensor | None = None
    start: torch.Tensor | None = None
    predicted: torch.Tensor | None = None
    calls: int = 0


def _calls(run: Run) -> PNDMCalls:
    """The grid of a run, as :meth:`AtlasPNDMScheduler._network_calls` made it."""
    return cast(PNDMCalls, run.planned())


class AtlasPNDMScheduler(BaseScheduler):
    r"""
    PNDM, from level ``(α, σ)`` to ``(α', σ')``:

        x' = α' x_0 + σ' ε̄,    x_0 = (x − σ ε̄)/α

    with ε̄ from Adams-Bashforth of the last four calls (PLMS), after three Runge-Kutta steps of four calls each, or after a
    predictor and a corrector where ``skip_prk_steps``. Liu et al. 2022 (arXiv 2202.09778). Order 2 on an even spacing of
    the timesteps. Outputs of ``v_prediction`` are combined as they are and read at the level of the step, as in Diffusers,
    which costs one order. A callback that changes the sample between the calls of one step moves the point it started from.

    Args:
        skip_prk_steps: start without Runge-Kutta steps, as Stable Diffusion does. The predictor and the corrector are then
            the first two calls of a trajectory, wherever it begins, as in Diffusers.
        set_alpha_to_one: end at clean data; otherwise at training timestep 0.
        options: see :class:`BaseScheduler`.
    """

    @takes_options
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        *,
        skip_prk_steps: bool = False,
        set_alpha_to_one: bool = False,
        timestep_spacing: str = "leading",
        clip_sample: bool = False,
        **options: Unpack[SchedulerOptions],
    ):
        self._setup()

    @property
    def _averaged(self) -> str:
        """The prediction type that is averaged over calls."""
        own, kinds = self.config.prediction_type, self.process.averaged
        return own if own in kinds and not self._clips else kinds[0]

    @property
    def _zero_signal(self) -> bool:
        return self.config.prediction_type == "v_prediction" and not self._clips

    def _final_level(self) -> NoiseLevel:
        return super()._final_level() if self.config.set_alpha_to_one else self.process.level_at(0)

    def _reset(self) -> None:
        self._history = _History()

    def _network_calls(self, grid: TimeGrid, steps: int) -> PNDMCalls:
        stride = self.config.num_train_timesteps // steps if grid.spaced else None
        if self.config.skip_prk_steps:
            return plms_calls(grid, stride, self.process, self._final_level())
        if self._averaged == "epsilon" and grid.source[0].sigma_hat > LARGEST_NOISE:
            warnings.warn(
                f"PNDM's Runge-Kutta steps average noise predictions, and from σ/α = {grid.source[0].sigma_hat:.0f} their "
                "differences ruin the sample, as in Diffusers; take skip_prk_steps=True, timestep_spacing='leading' or "
                "AtlasMultistepScheduler",
                stacklevel=4,
            )
        return runge_kutta_calls(grid, stride, self.process, self._final_level())

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
        One network call's part of the formula above.

        Args:
            model_output: the network's prediction at ``timestep``, ``(batch, channels, height, width)``.
            timestep: an element of ``self.timesteps``.
            sample: the last step's result, same shape; half precision is computed in float32.
            generator: taken from pipelines that pass one; the step draws no noise.
            per_token_timesteps: timesteps of tokens at levels of their own (LTX), ``(batch, tokens)``; ``model_output`` then
                has its sign changed, as in Diffusers.
            return_dict: return an output object instead of ``(prev_sample, pred_original_sample)``; a flow has no second one.
        """
        run, index = self._advance(timestep)
        return self._take(_calls(run), index, model_output, sample, return_dict)

    @network_step
    def step_prk(
        self, model_output: torch.Tensor, timestep: torch.Tensor | int, sample: torch.Tensor, return_dict: bool = True
    ) -> AtlasSchedulerOutput | tuple[torch.Tensor, ...]:
        """
        The next call of a Runge-Kutta step, which :meth:`step` would take; a timestep of one's own moves the call's target,
        as in Diffusers.
        """
        grid, index, t = _calls(self._run), self.counter, int(timestep)
        if index >= grid.runge_kutta:
            raise ValueError(f"step_prk() was called more often than the {grid.runge_kutta} calls of prk_timesteps")
        if grid.stride is not None and t != grid.timesteps[index]:
            end = t if index % 2 else t - grid.stride // 2
            grid = replace(grid, target=[*grid.target[:index], self.process.level_at(end) if end >= 0 else self._final_level()])
        self._run.step_index = index + 1
        return self._take(grid, index, model_output, sample, return_dict)

    @network_step
    def step_plms(
        self, model_output: torch.Tensor, timestep: torch.Tensor | int, sample: torch.Tensor, return_dict: bool = True
    ) -> AtlasSchedulerOutput | tuple[torch.Tensor, ...]:
        """A call of the multistep part, which :meth:`step` would take; on an even spacing from any training timestep."""
        run, grid, index, t = self._run, _calls(self._run), 0, int(timestep)
        if len(self.ets) < grid.runge_kutta // 4:
            raise ValueError(f"step_plms() needs the {grid.runge_kutta // 4} predictions that step_prk() leaves in ets")
        if grid.stride is None or t in grid.timesteps[grid.runge_kutta :]:
            index = run.index_of(timestep)
        else:
            here = TimeGrid([t], [self.process.level_at(t)], [self._final_level()], grid.dtype)
            grid = plms_calls(here, grid.stride, self.process, self._final_level())
        run.step_index = index + 1
        return self._take(grid, index, model_output, sample, return_dict)

    @property
    def ets(self) -> list[torch.Tensor]:
        """The last predictions, oldest first, at most four."""
        return self._history.predictions

    @ets.setter
    def ets(self, predictions: list[torch.Tensor]) -> None:
        self._history.predictions = predictions

    @property
    def counter(self) -> int:
        """Calls since ``set_timesteps``."""
        return self._history.calls

    @counter.setter
    def counter(self, calls: int) -> None:
        self._history.calls = calls

    @property
    def prk_timesteps(self) -> np.ndarray | None:
        """Timesteps of the Runge-Kutta calls."""
        run = self._run
        return None if run.grid is None else np.array(run.grid.timesteps[: _calls(run).runge_kutta])

    @property
    def plms_timesteps(self) -> np.ndarray | None:
        """Timesteps of the calls of the multistep part."""
        run = self._run
        return None if run.grid is None else np.array(run.grid.timesteps[_calls(run).runge_kutta :])

    def _take(
        self, grid: PNDMCalls, index: int, model_output: torch.Tensor, sample: torch.Tensor, return_dict: bool
    ) -> AtlasSchedulerOutput | tuple[torch.Tensor, ...]:
        x, output = self._to_working_dtype(sample), self._to_working_dtype(model_output)
        kind, level = self._averaged, grid.source[index]
        if kind != self.config.prediction_type or self._clips:
            output = self.process.output(kind, self.predict_data(output, x, level), x, level)
        start, source, target, mean = self._combine_calls(grid, index, x, output)

        prev = self.process.step(kind, mean, start, source, target)
        result = self._output(prev, partial(self.process.data, kind, mean, start, source), sample.dtype, return_dict)
        self._history.predicted = self._to_working_dtype(result[0])
        return result

    def _combine_calls(
        self, grid: PNDMCalls, index: int, x: torch.Tensor, prediction: torch.Tensor
    ) -> tuple[torch.Tensor, NoiseLevel, NoiseLevel, torch.Tensor]:
        """Where the transfer starts, its two levels, and the mean prediction along it."""
        history, source, target = self._history, grid.start[index], grid.target[index]
        history.calls += 1
        if index < grid.runge_kutta:
            return self._runge_kutta(grid, index, x, prediction)
        if self.config.skip_prk_steps and history.calls == 2:
            source, target = grid.backward[index]
            return self._start(x, source, target), source, target, (prediction + history.predictions[-1]) / 2
        history.start = x
        history.predictions = [*history.predictions[-3:], prediction]
        weights = ADAMS_BASHFORTH[len(history.predictions)]
        mean = prediction if len(weights) == 1 else prediction * weights[0]
        for weight, past in zip(weights[1:], history.predictions[-2::-1]):
            mean.add_(past, alpha=weight)
        return x, source, target, mean

    def _runge_kutta(
        self, grid: PNDMCalls, index: int, x: torch.Tensor, prediction: torch.Tensor
    ) -> tuple[torch.Tensor, NoiseLevel, NoiseLevel, torch.Tensor]:
        history, source, target = self._history, grid.start[index], grid.target[index]
        stage = index % 4
        if stage == 0:
            history.start, history.partial = x, prediction / 6
            history.predictions = [*history.predictions[-3:], prediction]
            return x, source, target, prediction
        if history.start is None:  # a trajectory that begins inside a step goes on to the next call's level
            return x, grid.source[index], grid.source[index + 1], prediction
        start = self._start(x, source, grid.source[index])
        if stage == 3:
            return start, source, target, torch.add(history.partial, prediction, alpha=1 / 6)
        history.partial.add_(prediction, alpha=1 / 3)
        return start, source, target, prediction

    def _start(self, x: torch.Tensor, source: NoiseLevel, called: NoiseLevel) -> torch.Tensor:
        """The start of the present step, moved so that its transfer with the same prediction ends where a callback put it."""
        history, kind = self._history, self._averaged
        data, noise = data_coefficients(kind, *source)[0], noise_coefficients(kind, *source)[0]
        change = (x - history.predicted) / (called.alpha * data + called.sigma * noise)
        history.start = history.start + change
        return history.start
