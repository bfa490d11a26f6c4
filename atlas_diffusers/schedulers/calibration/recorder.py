"""A scheduler that takes the place of a pipeline's own, so that whoever drives the pipeline chooses levels and samples."""

import torch

from ..scheduling_atlas_multistep import AtlasMultistepScheduler
from ..scheduling_base import AtlasSchedulerOutput


class CallsDiffer(BaseException):
    """Ends a call that would make another number of network calls."""

    def __init__(self, calls: int):
        self.calls = calls


class Recorder(AtlasMultistepScheduler):
    """
    A scheduler whose nodes are given and whose steps are answered by whoever drives it.

    Attributes:
        given, start, answer: to be set before a call: σ̂ of the nodes, ``init_noise_sigma``, and what steps return as
            ``f(output, sample)``.
        allows: ``f(calls)``, whether a call may go on that will make so many network calls.
        begin: where the last call started (image-to-image).
        scaled: whether a pipeline asked for ``init_noise_sigma``, by which it then multiplies its noise.
    """

    def _setup(self) -> None:
        super()._setup()
        self.given, self.start, self.answer, self.allows = [], 1.0, None, None
        self.begin, self.scaled = 0, False

    def __deepcopy__(self, memo) -> "Recorder":
        return self

    @property
    def init_noise_sigma(self) -> float:
        self.scaled = True
        return self.start

    def set_timesteps(self, num_inference_steps=None, device=None, timesteps=None, sigmas=None) -> None:
        asked = next(value for value in (num_inference_steps, timesteps, sigmas) if value is not None)
        self.num_inference_steps, self.begin = asked if isinstance(asked, int) else len(asked), 0
        self._grid = self.nodes(self.given)
        # image-to-image leaves the first of its timesteps out
        times = self._grid.timesteps[:1] * (self.num_inference_steps - len(self.given)) + self._grid.timesteps
        self.timesteps = torch.tensor(times, dtype=torch.float32, device=device)
        self.sigmas = torch.tensor([level.sigma for level in self._grid.source], dtype=torch.float32)

    def set_begin_index(self, begin_index: int = 0) -> None:
        self.begin, calls = begin_index, self.num_inference_steps - begin_index
        if not self.allows(calls):
            raise CallsDiffer(calls)

    def step(self, model_output, timestep, sample, return_dict: bool = True, generator=None):
        sample = self.answer(model_output, sample)
        return AtlasSchedulerOutput(sample) if return_dict else (sample,)
