"""PNDM: DDIM's transfer with a noise prediction combined from several network calls."""

from dataclasses import dataclass, field

import torch

from ..schedules import NoiseLevel, combine
from ..schedules.time_grid import TimeGrid
from .conversion import extend_config
from .network_step import network_step
from .pndm_calls import PNDMCalls, plms_calls, runge_kutta_calls
from .scheduling_base import AtlasSchedulerOutput, BaseScheduler

ADAMS_BASHFORTH = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


@dataclass
class _History:
    """Predictions of the last steps, newest first, and what a step with several calls keeps between them."""

    predictions: list[torch.Tensor] = field(default_factory=list)
    partial: torch.Tensor | None = None
    start: torch.Tensor | None = None
    predicted: torch.Tensor | None = None
    calls: int = 0


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
        Others: see :class:`BaseScheduler`.
    """

    @extend_config
    def __init__(self, skip_prk_steps: bool = False, set_alpha_to_one: bool = False):
        pass

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
        build = plms_calls if self.config.skip_prk_steps else runge_kutta_calls
        return build(grid, stride, self.process, self._final_level())

    @network_step
    def step(
        self,
        model_output: torch.Tensor,
        timestep: torch.Tensor | int,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        per_token_timesteps: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> AtlasSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """
        One network call's part of the formula above.

        Args:
            model_output: the network's prediction at ``timestep``, ``(batch, channels, height, width)``.
            timestep: an element of ``self.timesteps``.
            sample: the last step's result, same shape; half precision is computed in float32.
            generator: taken from pipelines that pass one; the step draws no noise.
            per_token_timesteps: timesteps of tokens at levels of their own (LTX), ``(batch, tokens)``; ``model_output`` then
                has its sign changed, as in Diffusers.
            return_dict: return an output object instead of ``(prev_sample, pred_original_sample)``.
        """
        index = self._advance(timestep)
        x, output = self._to_working_dtype(sample), self._to_working_dtype(model_output)
        kind, level = self._averaged, self._grid.source[index]
        if kind != self.config.prediction_type or self._clips:
            output = self.process.output(kind, self.predict_data(output, x, level), x, level)
        start, source, target, mean = self._combine_calls(index, x, output)

        data = self.process.data(kind, mean, start, source)
        prev = combine(target.alpha, data, target.sigma, self.process.noise(kind, mean, start, source))
        result = self._output(prev, data, sample.dtype, return_dict)
        self._history.predicted = self._to_working_dtype(result[0])
        return result

    def _combine_calls(
        self, index: int, x: torch.Tensor, prediction: torch.Tensor
    ) -> tuple[torch.Tensor, NoiseLevel, NoiseLevel, torch.Tensor]:
        """Where the transfer starts, its two levels, and the mean prediction along it."""
        history, source, target = self._history, self._grid.start[index], self._grid.target[index]
        history.calls += 1
        if index < self._grid.runge_kutta:
            return self._runge_kutta(index, x, prediction)
        if self.config.skip_prk_steps and history.calls == 2:
            source, target = self._grid.backward[index]
            return self._start(x, source, target), source, target, (prediction + history.predictions[0]) / 2
        history.start = x
        history.predictions = [prediction, *history.predictions[:3]]
        weights = ADAMS_BASHFORTH[len(history.predictions)]
        mean = prediction if len(weights) == 1 else prediction * weights[0]
        for weight, past in zip(weights[1:], history.predictions[1:]):
            mean.add_(past, alpha=weight)
        return x, source, target, mean

    def _runge_kutta(
        self, index: int, x: torch.Tensor, prediction: torch.Tensor
    ) -> tuple[torch.Tensor, NoiseLevel, NoiseLevel, torch.Tensor]:
        history, source, target = self._history, self._grid.start[index], self._grid.target[index]
        stage = index % 4
        if stage == 0:
            history.start, history.partial = x, prediction / 6
            history.predictions = [prediction, *history.predictions[:3]]
            return x, source, target, prediction
        if history.start is None:  # a trajectory that begins inside a step goes on to the next call's level
            return x, self._grid.source[index], self._grid.source[index + 1], prediction
        start = self._start(x, source, self._grid.source[index])
        if stage == 3:
            return start, source, target, torch.add(history.partial, prediction, alpha=1 / 6)
        history.partial.add_(prediction, alpha=1 / 3)
        return start, source, target, prediction

    def _start(self, x: torch.Tensor, source: NoiseLevel, called: NoiseLevel) -> torch.Tensor:
        """The start of the present step, moved by what a callback changed since."""
        history = self._history
        change = x - history.predicted
        history.start = torch.add(history.start, change, alpha=source.alpha / called.alpha)
        return history.start
