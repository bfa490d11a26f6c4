"""The one sampling loop: from a denoiser and a scheduler to samples."""

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

Predict = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass
class SamplingState:
    """
    What a callback sees after a step, and may replace.

    Args:
        index: of the step.
        timestep: where the step began.
        sample: where it ended.
        denoiser: of the next step.
        stopped: set it to end here.
    """

    index: int
    timestep: torch.Tensor
    sample: torch.Tensor
    denoiser: Any
    stopped: bool = False


def step_arguments(scheduler: Any, **given: Any) -> dict[str, Any]:
    """Those of some arguments that the scheduler's ``step`` knows."""
    known = inspect.signature(scheduler.step).parameters
    return {name: value for name, value in given.items() if name in known}


def set_begin_index(scheduler: Any, index: int) -> None:
    """Tell the scheduler where sampling starts; Diffusers' PNDM cannot be told and need not be."""
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(index)


def sample(
    denoiser: Predict,
    scheduler: Any,
    x: torch.Tensor,
    *,
    begin: int = 0,
    first: int = 0,
    corrector: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Predict], torch.Tensor] | None = None,
    callback: Callable[[SamplingState], None] | None = None,
    progress: Callable[[int], AbstractContextManager] | None = None,
    **arguments: Any,
) -> torch.Tensor:
    """
    Follow a scheduler from a noisy sample to a clean one.

    Args:
        denoiser: gives predictions, ``denoiser(x, t)``.
        scheduler: one whose steps are set, used by this call alone.
        x: the sample at ``timesteps[begin]``, (batch, ...).
        begin: index of the first timestep.
        first: number of the first step, for callbacks.
        corrector: called after every step but the last as ``corrector(x, before, now, denoiser)``, gives the corrected x.
        callback: called after every step.
        progress: makes a bar for a number of steps, a context with ``update()``.
        arguments: of ``scheduler.step``, where it takes them.

    Returns:
        The sample after the last step.

    Raises:
        ValueError: when the denoiser gives NaN or infinity, with the number of the step.
    """
    steps, known = scheduler.timesteps[begin:], step_arguments(scheduler, **arguments)
    set_begin_index(scheduler, begin)
    healthy, state = [], SamplingState(first, steps[0], x, denoiser)
    with nullcontext() if progress is None else progress(-(-len(steps) // scheduler.order)) as bar:
        for index, t in enumerate(steps):
            prediction = state.denoiser(state.sample, t)
            healthy.append(prediction.isfinite().all())
            state.sample = scheduler.step(prediction, t, state.sample, **known, return_dict=False)[0]
            if corrector is not None and index + 1 < len(steps):
                state.sample = corrector(state.sample, t, steps[index + 1], state.denoiser)
            if callback is not None:
                state.index, state.timestep = first + index, t
                callback(state)
            if bar is not None and index % scheduler.order == 0:
                bar.update()
            last = state.stopped or index == len(steps) - 1
            if last or state.sample.device.type == "cpu":
                _stop_where_unhealthy(healthy, index)
                healthy.clear()
            if last:
                break
    return state.sample


def _stop_where_unhealthy(flags: list[torch.Tensor], index: int) -> None:
    """``ValueError`` unless all flags hold, the last of which is that of step ``index``."""
    values = torch.stack(flags).tolist()
    if not all(values):
        step = index + 1 - len(values) + values.index(False)
        raise ValueError(f"the network returned NaN or infinity at step {step + 1} of sampling")
