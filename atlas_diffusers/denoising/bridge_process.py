"""A learned diffusion between data sets: its paths as steps of a scheduler, and the velocity of its flow."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers.utils.torch_utils import randn_tensor

from .sampling import Predict


class BridgeSteps:
    """
    :func:`~atlas_diffusers.bridges.brownian.follow` as a scheduler of the sampling loop, which calls its network at every
    timestep: a step predicts, and the next corrects it.

    Args:
        sigma: σ of the diffusion.
        times: shares of the time left, falling to 0.
        horizon: the network's time at the start.
        device: of the samples.
    """

    order = 2

    def __init__(self, sigma: float, times: Sequence[float], horizon: int, device: torch.device):
        self.sigma, self.times, self._index, self._drift = sigma, times, 0, None
        called = [times[0], *(time for time in times[1:-1] for _ in range(2))]
        self.timesteps = horizon * torch.tensor(called, device=device)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = False,
    ) -> tuple[torch.Tensor]:
        """The next point; the last step draws no noise."""
        left, after = self.times[self._index : self._index + 2]
        if self._drift is not None:
            drift, self._drift, self._index = self._drift, None, self._index + 1
            return (sample + (left - after) / 2 * (model_output / after**0.5 - drift),)
        drift = model_output / left**0.5
        sample = sample + (left - after) * drift
        if after:
            self._drift = drift
            noise = randn_tensor(sample.shape, generator, sample.device, sample.dtype)
            sample = sample + self.sigma * (left - after) ** 0.5 * noise
        return (sample,)


@dataclass(frozen=True)
class BridgeFlow:
    r"""
    ``dx/ds = ½ (d_b/√(1 − s) − d_f/√s)``, the velocity that has the same laws as the diffusion, from the displacements d of the
    networks forward (time left s) and backward (time left 1 − s). Song et al. 2020 (arXiv 2011.13456), section 4.3.

    Args:
        forward, backward: displacements of ``(x, t)`` with t the time left.
        horizon: t at the start.
        margin: s is kept this far from 0 and 1, where a term is infinite.
    """

    forward: Predict
    backward: Predict
    horizon: int
    margin: float

    def __call__(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The velocity at timestep t."""
        s = (t / self.horizon).clamp(self.margin, 1 - self.margin)
        forward, backward = self.forward(x, self.horizon * s), self.backward(x, self.horizon * (1 - s))
        return (backward / (1 - s).sqrt() - forward / s.sqrt()) / 2
