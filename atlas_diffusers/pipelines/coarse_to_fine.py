"""Noisy steps at a lower resolution."""

import copy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers.utils.torch_utils import randn_tensor

from ..schedulers import BaseScheduler
from ..schedules import NoiseLevel
from .bridging import noise_level
from .denoising import DenoisingRun
from .latents import set_begin_index

COARSE_SHARE = 0.5
LARGEST_SIGMA = 1e3


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
    if len(steps) < 2 * levels:
        raise ValueError(f"hierarchical sampling over {levels} resolutions needs at least {2 * levels} steps, got {len(steps)}")
    sigmas = [min(noise_level(scheduler, torch.tensor(t)).sigma_hat, LARGEST_SIGMA) for t in steps] + [0.0]
    ends = [round(COARSE_SHARE * len(steps) * k / (levels - 1)) for k in range(levels)] + [len(steps)]
    return [
        Stage(halvings, [sigma / 2**halvings for sigma in sigmas[begin : end + 1]])
        for halvings, begin, end in zip(reversed(range(levels)), ends, ends[1:])
    ]


def lift(x: torch.Tensor, sigma: float, generator=None) -> torch.Tensor:
    """
    From ``y_0 + (σ/2) ε`` to ``x_0 + σ ε`` of twice the resolution, x_0 the picture y_0 with every pixel doubled: the noise is
    white again once the detail that averaging cannot see gets its own.

    Args:
        x: (batch, channels, height, width), in coordinates where the signal has weight 1.
        sigma: σ̂ of the fine sample.
        generator: draws the detail.
    """
    large = F.interpolate(x, scale_factor=2, mode="nearest")
    noise = randn_tensor(large.shape, generator, x.device, x.dtype)
    return large + sigma * (noise - F.interpolate(F.avg_pool2d(noise, 2), scale_factor=2, mode="nearest"))


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
