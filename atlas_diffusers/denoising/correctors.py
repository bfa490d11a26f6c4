"""Corrector steps of predictor-corrector sampling."""

from collections.abc import Callable

import torch
from diffusers.utils.torch_utils import randn_tensor

from .process import SchedulerProcess


class LangevinCorrector:
    r"""
    Steps of Langevin dynamics that draw a sample towards the distribution of its noise level:

        x ← x + δ s + √(2δ) z,    δ = 2 (r ‖z‖/‖s‖)²,    s = (α x̂_0 − x)/σ²,

    with r the signal-to-noise ratio of a step. They undo part of the error of the steps before (Song et al. 2021,
    arXiv 2011.13456, algorithm 4); each costs a network call. The norms are those of one sample, so that it does not
    depend on its batch mates. Most useful for samplers of first order; one that extrapolates from former predictions, which
    a correction makes stale, gains at very few steps only.

    Args:
        scheduler: one whose steps are set, for any prediction type of ours.
        steps: Langevin steps after every step of the scheduler.
        snr: r; 0.16 in the paper.
        generator: draws z.

    Raises:
        ValueError: for fewer than one step, r that is not positive, a prediction type that is none of ours, and PNDM, whose
            steps share their network calls.
    """

    def __init__(
        self,
        scheduler: object,
        steps: int,
        snr: float = 0.16,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ):
        if steps < 1 or not snr > 0:
            raise ValueError(f"corrector_steps={steps}, corrector_snr={snr}; expected at least 1, and a positive number")
        if "PNDM" in type(scheduler).__name__:
            name = type(scheduler).__name__
            raise ValueError(f"corrector_steps={steps}: {name} combines the calls of steps that a corrector would part")
        self.process = SchedulerProcess(scheduler)
        _ = self.process.prediction_type
        self.steps, self.snr, self.generator = steps, snr, generator

    def __call__(self, x: torch.Tensor, before: torch.Tensor, now: torch.Tensor, predict: Callable) -> torch.Tensor:
        """``x`` at timestep ``now`` after the steps; unchanged inside a step of several calls, where ``now`` is ``before``."""
        level = self.process.level(now)
        if before == now or level.alpha == 0:
            return x
        for _ in range(self.steps):
            score = (level.alpha * self.process.data(predict(x, now), x, level) - x) / level.sigma**2
            z = randn_tensor(x.shape, self.generator, x.device, x.dtype)
            delta = 2 * (self.snr * _norm(z) / _norm(score)) ** 2
            x = x + delta * score + (2 * delta).sqrt() * z
        return x


def _norm(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(1).norm(dim=1).reshape(-1, *[1] * (x.ndim - 1))
