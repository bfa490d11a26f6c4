"""Noisy steps at a lower resolution."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from ..schedules import NoiseLevel
from .denoiser import Denoiser
from .process import SchedulerProcess, noise_level
from .resolution import LARGEST_SIGMA, lift, split_steps
from .sampling import SamplingState, sample


class Stage(NamedTuple):
    """Steps at one resolution: it is halved ``halvings`` times, and the steps go through ``sigmas`` (σ̂ there)."""

    halvings: int
    sigmas: list[float]


def plan_stages(scheduler: Any, levels: int) -> list[Stage]:
    r"""
    Distribute the steps of a scheduler over resolutions, coarse first.

    Averaging 2×2 pixels keeps the picture and halves the noise, so a coarse step runs at ``σ̂' = σ̂/2``: the network sees a
    smaller picture at its own noise level (subspace diffusion, Jing et al. 2022, arXiv 2205.01490). The first half of the
    steps is shared by the coarse resolutions.

    Args:
        scheduler: with its steps set.
        levels: number of resolutions.

    Raises:
        ValueError: for fewer steps than twice the number of resolutions.
    """
    steps = list(dict.fromkeys(scheduler.timesteps.tolist()))
    plan = split_steps(len(steps), levels)
    sigmas = [min(noise_level(scheduler, torch.tensor(t)).sigma_hat, LARGEST_SIGMA) for t in steps] + [0.0]
    return [Stage(halvings, [s / 2**halvings for s in sigmas[begin : end + 1]]) for halvings, begin, end in plan]


def set_stages(scheduler: Any, stages: list[Stage], device: torch.device) -> list[Any]:
    """A scheduler of its own for each stage, like ``scheduler`` and with the stage's steps set."""
    schedulers = [copy.deepcopy(scheduler) for _ in stages]
    for one, stage in zip(schedulers, stages):
        one.set_timesteps(sigmas=stage.sigmas, device=device)
    return schedulers


def sample_coarse_to_fine(
    denoiser: Denoiser,
    schedulers: list[Any],
    stages: list[Stage],
    x: torch.Tensor,
    generator: torch.Generator | list[torch.Generator] | None = None,
    callback: Callable[[SamplingState], None] | None = None,
    **options: Any,
) -> torch.Tensor:
    """
    Sample through the stages; between two, the sample is lifted to the next resolution.

    Args:
        denoiser: of the whole call; its process is replaced by that of each stage.
        schedulers: of the stages, see :func:`set_stages`.
        stages: resolutions and levels, see :func:`plan_stages`.
        x: start noise at the coarsest resolution.
        generator: draws the detail that is new at each resolution, and the noise of the steps.
        callback, options: as of :func:`~.sampling.sample`; one that stops gets what it saw, lifted to the full resolution.
    """
    done, state = 0, None

    def remember(now: SamplingState) -> None:
        nonlocal state
        state = now
        if callback is not None:
            callback(now)

    for stage, scheduler in zip(stages, schedulers):
        process = SchedulerProcess(scheduler)
        if done:
            x = _lifted(x, stage.sigmas[0], process.level(scheduler.timesteps[0]).alpha == 1, generator)
        own = replace(denoiser if state is None else state.denoiser, process=process)
        if state is None or not state.stopped:
            x = sample(own, scheduler, x, first=done, callback=remember, generator=generator, **options)
        done += len(scheduler.timesteps)
    return x


def _lifted(
    x: torch.Tensor, sigma: float, exploding: bool, generator: torch.Generator | list[torch.Generator] | None
) -> torch.Tensor:
    """A coarse sample at σ̂ = sigma/2 as a fine one at sigma, in the coordinates of the scheduler."""
    if exploding:
        return lift(x, sigma, generator)
    before, after = (NoiseLevel.from_sigma_hat(s).alpha for s in (sigma / 2, sigma))
    return after * lift(x / before, sigma, generator)
