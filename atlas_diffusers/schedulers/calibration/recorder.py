"""A scheduler that takes the place of a pipeline's own, so that whoever drives the pipeline chooses levels and samples."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from ...schedules.levels import CLEAN
from ...schedules.time_grid import Request, TimeGrid, as_tensor
from ..position import Run
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

    given: list[float]
    answer: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    allows: Callable[[int], bool]
    even: TimeGrid

    def _setup(self) -> None:
        super()._setup()
        self.start, self.begin, self.scaled = 1.0, 0, False

    def __deepcopy__(self, memo: dict[int, object]) -> "Recorder":
        return self

    @property
    def init_noise_sigma(self) -> float:
        self.scaled = True
        return self.start

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        self.even, self.begin = BaseScheduler._build_grid(self, Request(num_inference_steps, timesteps, sigmas, mu)), 0
        steps, nodes = len(self.even.source), self.nodes(self.given)
        skipped = steps - len(self.given)  # image-to-image leaves the first of its timesteps out
        lists = {name: getattr(nodes, name) for name in ("timesteps", "source", "target")}
        grid = replace(nodes, **{name: values[:1] * skipped + values for name, values in lists.items()})
        levels = as_tensor(grid.source, torch.float64).T
        times = torch.tensor(grid.timesteps, dtype=torch.float32, device=device)
        numbers = torch.tensor([self.process.sigma(level) for level in (*grid.source, CLEAN)], dtype=torch.float32)
        self._runs.start(Run(grid, times, numbers, levels, steps))

    def set_begin_index(self, begin_index: int = 0) -> None:
        self.begin, calls = begin_index, len(self._grid.source) - begin_index
        if not self.allows(calls):
            raise CallsDiffer(calls)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: torch.Tensor | int,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        per_token_timesteps: torch.Tensor | None = None,
        return_dict: bool = True,
    ):
        if per_token_timesteps is not None:
            raise ValueError("tokens at levels of their own cannot be calibrated")
        sample = self.answer(model_output, sample)
        return AtlasSchedulerOutput(sample) if return_dict else (sample,)


class Observed(AtlasMultistepScheduler):
    """The solver itself; ``end`` is what its last step returned, and ``calls`` counts samples."""

    end: torch.Tensor

    def _setup(self) -> None:
        super()._setup()
        self.calls = 0

    def __deepcopy__(self, memo: dict[int, object]) -> "Observed":
        return self

    def step(
        self,
        model_output: torch.Tensor,
        timestep: torch.Tensor | int,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        per_token_timesteps: torch.Tensor | None = None,
        return_dict: bool = True,
    ):
        result = super().step(model_output, timestep, sample, generator, per_token_timesteps, return_dict)
        self.end, self.calls = result[0], self.calls + len(sample)
        return result
