"""Noisy steps at a lower resolution."""

import copy
from typing import NamedTuple

import torch

from ..denoising import lift, split_steps
from ..denoising.resolution import LARGEST_SIGMA
from ..schedulers import BaseScheduler
from ..schedules import NoiseLevel
from .bridging import noise_level
from .denoising import DenoisingRun
from .latents import set_begin_index


class Stage(NamedTuple):
    """Steps at one resolution: it is halved ``halvings`` times, and the steps go through ``sigmas`` (σ̂ there)."""

    halvings: int
    sigmas: list[float]


def plan_stages(scheduler, levels: int) -> list[Stage]:
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


class CoarseToFineMixin:
    """Hierarchical sampling of a pipeline whose network was trained at several resolutions."""

    def _coarse_to_fine(
        self, run: DenoisingRun, batch: int, height: int, width: int, generator, fixed: dict
    ) -> torch.Tensor:
        """Clean latents; ``fixed`` has inputs that cannot be combined with it, by name."""
        levels = self._resolutions(run, height, width, fixed)
        stages = plan_stages(run.scheduler, levels)
        exploding = noise_level(run.scheduler, run.scheduler.timesteps[0]).alpha == 1
        device, dtype, done, x = self._execution_device, self.unet.dtype, 0, None
        for stage in stages:
            scheduler = run.scheduler = copy.deepcopy(self.scheduler)
            scheduler.set_timesteps(sigmas=stage.sigmas, device=device)
            set_begin_index(scheduler, 0)
            if x is None:
                size = height >> stage.halvings, width >> stage.halvings
                x = self.prepare_latents(batch, *size, dtype, device, generator, None, scheduler)
            else:
                fine = stage.sigmas[0]
                before, after = (1.0, 1.0) if exploding else (NoiseLevel.from_sigma_hat(s).alpha for s in (fine / 2, fine))
                x = after * lift(x / before, fine, generator)
            x = self._denoise(run, x, first=done)
            done += len(scheduler.timesteps)
        return x

    def _resolutions(self, run: DenoisingRun, height: int, width: int, fixed: dict) -> int:
        """How many there are, or ``ValueError`` with the reason why it cannot be."""
        levels = self.unet.config.get("num_resolutions", 1)
        if levels < 2:
            raise ValueError(
                "hierarchical=True needs a network trained at several resolutions (num_resolutions of a recipe); this one has "
                f"num_resolutions={levels}"
            )
        if not isinstance(run.scheduler, BaseScheduler):
            raise ValueError(f"hierarchical=True needs a scheduler of this package, got {type(run.scheduler).__name__}")
        if given := [name for name, value in fixed.items() if value is not None]:
            raise ValueError(f"hierarchical=True cannot be combined with {', '.join(given)}")
        multiple = self.vae_scale_factor * self.unet.size_multiple * 2 ** (levels - 1)
        if height % multiple or width % multiple:
            raise ValueError(f"hierarchical=True: height={height} and width={width} must be multiples of {multiple}")
        return levels
