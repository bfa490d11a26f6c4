"""A scheduler that takes the place of a pipeline's own, so that whoever drives the pipeline chooses levels and samples."""

import torch

from ...schedules.levels import CLEAN
from ...schedules.time_grid import Request
from ..scheduling_atlas_multistep import AtlasMultistepScheduler
from ..scheduling_base import AtlasSchedulerOutput, BaseScheduler


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
        even: the grid that the last call asked for.
        scaled: whether a pipeline asked for ``init_noise_sigma``, by which it then multiplies its noise.
    """

    def _setup(self) -> None:
        super()._setup()
        self.given, self.start, self.answer, self.allows = [], 1.0, None, None
        self.begin, self.scaled, self.even = 0, False, None

    def __deepcopy__(self, memo) -> "Recorder":
        return self

    @property
    def init_noise_sigma(self) -> float:
        self.scaled = True
        return self.start

    def set_timesteps(self, num_inference_steps=None, device=None, timesteps=None, sigmas=None, mu=None) -> None:
        self.even, self.begin = BaseScheduler._build_grid(self, Request(num_inference_steps, timesteps, sigmas, mu)), 0
        self.num_inference_steps, self._grid = len(self.even.source), self.nodes(self.given)
        # image-to-image leaves the first of its timesteps out
        skipped = self.num_inference_steps - len(self.given)
        times = self._grid.timesteps[:1] * skipped + self._grid.timesteps
        levels = [self.process.sigma(level) for level in (*self._grid.source[:1] * skipped, *self._grid.source, CLEAN)]
        self.timesteps = torch.tensor(times, dtype=torch.float32, device=device)
        self.sigmas = torch.tensor(levels, dtype=torch.float32)

    def set_begin_index(self, begin_index: int = 0) -> None:
        self.begin, calls = begin_index, self.num_inference_steps - begin_index
        if not self.allows(calls):
            raise CallsDiffer(calls)

    def step(self, model_output, timestep, sample, generator=None, per_token_timesteps=None, return_dict: bool = True):
        if per_token_timesteps is not None:
            raise ValueError("tokens at levels of their own cannot be calibrated")
        sample = self.answer(model_output, sample)
        return AtlasSchedulerOutput(sample) if return_dict else (sample,)


class Observed(AtlasMultistepScheduler):
    """The solver itself; ``end`` is what its last step returned, and ``calls`` counts samples."""

    def _setup(self) -> None:
        super()._setup()
        self.end, self.calls = None, 0

    def __deepcopy__(self, memo) -> "Observed":
        return self

    def step(self, model_output, timestep, sample, generator=None, per_token_timesteps=None, return_dict: bool = True):
        result = super().step(model_output, timestep, sample, generator, per_token_timesteps, return_dict)
        self.end, self.calls = result[0], self.calls + len(sample)
        return result
