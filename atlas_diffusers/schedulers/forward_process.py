"""From clean data to noisy samples, at the levels of training or of the steps that were chosen."""

import torch

from ..schedules import NoiseProcess
from .position import StepPosition


class ForwardProcess(StepPosition):
    """The part of a sampler that adds noise."""

    process: NoiseProcess

    def levels_at(self, timesteps: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        α and σ at one timestep a sample, shaped to broadcast over ``like``; fractional timesteps are interpolated.

        Args:
            timesteps: ``(batch,)`` or ``(1,)``, in ``[0, T)``.
            like: gives device, dtype and number of dimensions.
        """
        return self._shaped(self.process.levels_at(timesteps.to(like.device)), like)

    @staticmethod
    def _shaped(levels: tuple[torch.Tensor, torch.Tensor], like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (-1,) + (1,) * (like.ndim - 1)
        return levels[0].to(like.dtype).view(shape), levels[1].to(like.dtype).view(shape)

    def _sample_levels(self, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """α and σ of samples: of the step where a timestep is in ``self.timesteps``, otherwise of the training process."""
        alphas, sigmas = self.process.sample_levels_at(timesteps)
        run = self._run
        if run.levels is None:
            return alphas, sigmas
        match = timesteps[:, None] == run.timesteps.to(timesteps.device)
        at, found = match.float().argmax(1) + run.first, match.any(1)
        of_step = run.levels.to(timesteps.device)
        return torch.where(found, of_step[0, at], alphas), torch.where(found, of_step[1, at], sigmas)

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """``α_t x_0 + σ_t ε`` in the sampler's coordinates, one timestep a sample, ``(batch,)``."""
        levels = self._sample_levels(timesteps.to(original_samples.device))
        alpha, sigma = self._shaped(levels, original_samples)
        return alpha * original_samples + sigma * noise

    def get_velocity(self, sample: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """The learned velocity, one timestep a sample: ``α_t ε − σ_t x_0`` (arXiv 2202.00512), on a flow ``ε − x_0``."""
        alpha, sigma = self.levels_at(timesteps, sample)
        return self.process.velocity(sample, noise, alpha, sigma)

    def scale_noise(
        self, sample: torch.Tensor, timestep: torch.Tensor | float | None = None, noise: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        :meth:`add_noise` as flow pipelines call it: at the level of ``timestep`` or, without one, at the next step or at the
        one that ``set_begin_index`` chose.
        """
        if noise is None:
            raise ValueError("scale_noise() needs noise=...")
        if timestep is None:
            timestep = self.timesteps[self.step_index or self.begin_index or 0]
        return self.add_noise(sample, noise, torch.as_tensor(timestep).reshape(-1))
