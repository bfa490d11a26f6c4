"""From what a network says to what the formula of a step expects."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

SAME = 1e-6  # difference of two sigmas of one level

Step = TypeVar("Step", bound=Callable[..., Any])


def network_step(step: Step) -> Step:
    """
    Decorate the ``step`` of a sampler: the output of an inverted flow changes its sign, and with ``per_token_timesteps`` (LTX)
    tokens may be at levels of their own.
    """

    @functools.wraps(step)
    def stepped(
        self, model_output: Any, timestep: Any, sample: Any, *args: Any, per_token_timesteps: Any = None, **kwargs: Any
    ):
        if self.process.output_sign < 0:
            model_output = -model_output
        if per_token_timesteps is None:
            return step(self, model_output, timestep, sample, *args, **kwargs)
        return _step_tokens(self, step, model_output, timestep, sample, per_token_timesteps, args, kwargs)

    wrapper: Any = stepped
    return wrapper


def _step_tokens(
    self,
    step: Callable,
    model_output: torch.Tensor,
    timestep: Any,
    sample: torch.Tensor,
    tokens: torch.Tensor,
    args: Any,
    kwargs: Any,
):
    """
    As in Diffusers, the network's output is that of a flow with its sign changed, and a token that waits at a level below the
    step's goes from there straight to the next sigma. To the sampler it is shown on its line, at the level of the step.
    """
    if self.config.prediction_type != "flow_prediction":
        raise ValueError(f"per_token_timesteps need prediction_type='flow_prediction', not {self.config.prediction_type!r}")
    velocity = -self._to_working_dtype(model_output)
    x, sigmas = self._to_working_dtype(sample), self.sigmas.to(sample.device)
    here = self.process.sigma(self._grid.source[self.index_for_timestep(timestep)])
    now = (tokens.to(x.dtype) / len(self.process))[..., None]
    below = torch.where(sigmas < now - SAME, sigmas, 0.0).amax(-1, keepdim=True)  # the next sigma of each token
    waiting = (now - here).abs() > SAME
    shown = torch.where(waiting, x + (here - now) * velocity, x)
    result = step(self, velocity, timestep, shown.to(sample.dtype), *args, **kwargs)
    straight = (x + (below - now) * velocity).to(sample.dtype)
    if isinstance(result, tuple):
        return (torch.where(waiting, straight, result[0]), *result[1:])
    result.prev_sample = torch.where(waiting, straight, result.prev_sample)
    return result
