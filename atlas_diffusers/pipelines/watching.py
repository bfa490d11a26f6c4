"""A pipeline's call, seen from outside: the data prediction of every step, whatever pipeline of Diffusers it is."""

import copy
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from ..denoising import SchedulerProcess
from .latents import decode_latents


def watched(pipeline: Any, scheduler: Any, seen: Callable[[torch.Tensor], None]) -> Any:
    """
    A pipeline that shares another's networks and nothing else, so that both may be called at once.

    Args:
        pipeline: any of Diffusers' or ours.
        scheduler: of the new one; not changed.
        seen: called at every network call's step with the data prediction ``x_0``, of the shape of the sample. What it raises
            ends the call.
    """
    cls = type(scheduler)

    class Watched(cls):
        @wraps(cls.step)
        def step(self, model_output: Any, timestep: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
            process = SchedulerProcess(self)
            prediction = model_output[:, : sample.shape[1]] if process.predicts_variance else model_output
            seen(process.data(prediction, sample, process.level(timestep)))
            return super().step(model_output, timestep, sample, *args, **kwargs)

    # under its own name: pipelines write down which class of which library they hold
    Watched.__name__, Watched.__qualname__, Watched.__module__ = cls.__name__, cls.__qualname__, cls.__module__
    other, own = copy.copy(pipeline), copy.deepcopy(scheduler)
    own.__class__ = Watched
    other.scheduler = own
    other.set_progress_bar_config(disable=True)
    return other


@torch.no_grad()
def pictures_of(pipeline: object, data: torch.Tensor) -> torch.Tensor | None:
    """Pictures (n, channels, height, width) in [-1, 1] of a data prediction, or ``None`` for latents without such a meaning."""
    vae: Any = getattr(pipeline, "vae", None)
    data = data.nan_to_num(0.0, 1.0, -1.0)
    if vae is not None:
        if data.ndim != 4 or data.shape[1] != vae.config.get("latent_channels"):
            return None
        data = decode_latents(vae, data.to(vae.dtype))
    return data.float().clamp(-1, 1).cpu() if data.ndim == 4 and data.shape[1] in (1, 3) else None
