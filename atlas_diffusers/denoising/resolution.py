"""From a coarse sample to a fine one."""

import torch
import torch.nn.functional as F
from diffusers.utils.torch_utils import randn_tensor

LARGEST_SIGMA = 1e3  # stands for infinite noise, at zero signal


def lift(x: torch.Tensor, sigma: float, generator: torch.Generator | list[torch.Generator] | None = None) -> torch.Tensor:
    """
    From ``y_0 + (σ/2) ε`` to ``x_0 + σ ε`` of twice the resolution, x_0 the picture y_0 with every pixel doubled: the noise is
    white again once the detail that averaging cannot see gets its own (subspace diffusion, Jing et al. 2022, arXiv 2205.01490).

    Args:
        x: (batch, channels, height, width), in coordinates where the signal has weight 1.
        sigma: σ̂ of the fine sample.
        generator: draws the detail.
    """
    large = F.interpolate(x, scale_factor=2, mode="nearest")
    noise = randn_tensor(large.shape, generator, x.device, x.dtype)
    return large + sigma * (noise - F.interpolate(F.avg_pool2d(noise, 2), scale_factor=2, mode="nearest"))


def split_steps(count: int, levels: int, coarse_share: float = 0.5) -> list[tuple[int, int, int]]:
    """
    ``(halvings, begin, end)`` of each resolution, coarse first: the first share of the steps belongs to the coarse ones.

    Raises:
        ValueError: for fewer steps than twice the number of resolutions.
    """
    if levels == 1:
        return [(0, 0, count)]
    if count < 2 * levels:
        raise ValueError(f"hierarchical sampling over {levels} resolutions needs at least {2 * levels} steps, got {count}")
    ends = [round(coarse_share * count * k / (levels - 1)) for k in range(levels)] + [count]
    return list(zip(reversed(range(levels)), ends, ends[1:]))
