"""Heun: a trapezoidal correction after every Euler step."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from ..schedules import combine
from ..schedules.time_grid import Request, TimeGrid
from .network_step import network_step
from .options import SigmaOptions, Unpack, takes_options
from .position import Run
from .scheduling_base import AtlasSchedulerOutput
from .scheduling_sigma_base import SigmaScheduler


@dataclass
class _History:
    """The predictor's derivative and result."""

    derivative: torch.Tensor | None = None
    predicted: torch.Tensor | None = None


class AtlasHeunScheduler(SigmaScheduler):
    r"""
    Heun, from ``σ`` to ``σ'`` in VE coordinates (where it is σ̂) or on a flow, in two calls, with ``d = (x − x_0)/σ``:

        x̃  = x + (σ' − σ) d                  (predictor, called at σ)
        x' = x̃ + (σ' − σ) (d̃ − d)/2          (corrector, called at σ')

    Karras et al. 2022, algorithm 1 (arXiv 2206.00364). Order 2; the step to σ = 0 has no corrector, so N steps take 2N − 1
    calls. A callback may change x̃: the correction is added to what it returns. As in Diffusers, a loop may also hand the
    scaled x̃ that the network saw to the corrector, which then goes on from x̃ itself.

    Args:
        beta_start, beta_end: defaults as in Diffusers' ``HeunDiscreteScheduler``.
        options: see :class:`SigmaScheduler`.
    """

    order = 2

    @takes_options
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        *,
        timestep_spacing: str = "linspace",
        clip_sample: bool = False,
        **options: Unpack[SigmaOptions],
    ):
        self._setup()

    def _first_run(self) -> Run:
        plan = self._make_plan(Request(num_inference_steps=len(self)), None, None)  # as in Diffusers
        return Run(plan.grid, plan.timesteps, plan.sigmas)

    def _reset(self) -> None:
        self._history = _History()

    def _network_calls(self, grid: TimeGrid, steps: int) -> TimeGrid:
        called = [(i + 1) // 2 for i in range(2 * steps - 1)]
        return TimeGrid(
            timesteps=[grid.timesteps[i] for i in called],
            source=[grid.source[i] for i in called],
            target=[grid.target[i // 2] for i in range(len(called))],
            dtype=grid.dtype,
        )

    @property
    def state_in_first_order(self) -> bool:
        """Whether the next call is a predictor."""
        return self._history.derivative is None

    @network_step
    def step(
        self,
        model_output: torch.Tensor,
        timestep: torch.Tensor | float,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        per_token_timesteps: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> AtlasSchedulerOutput | tuple[torch.Tensor, ...]:
        """
        A predictor or a corrector of the formula above, in turn.

        Args:
            model_output: the network's prediction at ``timestep``, ``(batch, channels, height, width)``.
            timestep: an element of ``self.timesteps``.
            sample: ``x`` or ``x̃``, same shape; half precision is computed in float32.
            generator: taken from pipelines that pass one; the step draws no noise.
            per_token_timesteps: timesteps of tokens at levels of their own (LTX), ``(batch, tokens)``; ``model_output`` then
                has its sign changed, as in Diffusers.
            return_dict: return an output object instead of ``(prev_sample, pred_original_sample)``; a flow has no second one.
        """
        run, index = self._advance(timestep)
        grid, history = run.planned(), run.history
        sigma, target = grid.source[index].sigma, grid.target[index].sigma
        x, output = self._to_working_dtype(sample), self._to_working_dtype(model_output)
        if self.config.prediction_type == self.process.averaged[0] and not self._clips:
            derivative, data = output, partial(self.predict_data, output, x, grid.source[index])
        else:
            data = self.predict_data(output, x, grid.source[index])
            derivative = combine(1 / sigma, x, -1 / sigma, data)
        if index % 2 == 0:
            if isinstance(data, torch.Tensor):
                prev = torch.lerp(data, x, target / sigma)
            else:
                prev = torch.add(x, output, alpha=target - sigma)
            history.derivative, history.predicted = derivative, prev
        else:
            # a trajectory that starts at a corrector has nothing to correct
            before = derivative if history.derivative is None else history.derivative
            start = history.predicted if sample is run.network_input and history.predicted is not None else x
            prev = torch.add(start, derivative - before, alpha=(sigma - grid.source[index - 1].sigma) / 2)
            history.derivative = history.predicted = None
        run.network_input = None
        return self._output(prev, data, sample.dtype, return_dict)
