"""What a calibration drives: a model along noise levels that are known beforehand, from start noise of its own."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ...schedules import NoiseLevel
from ..angle import radius
from ..scheduling_atlas_multistep import AtlasMultistepScheduler

Predict = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Step = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]


class Model(ABC):
    """
    Trajectories of a model, counted.

    States are ``x/r`` with ``r = √(σ² + α²)``, in variance preserving processes x itself, and velocities
    ``v = cos θ ε − sin θ x_0`` with θ = arctan(σ/α), both flattened to (trajectories, d).

    Args:
        scheduler: the uncalibrated solver; gives levels, and converts and clips predictions.
        count: trajectories in all.
        batch_size: of them at once.
    """

    shape: tuple[int, ...]  # of one sample
    seconds_per_call: float | None = None
    begin = 0  # steps that image-to-image leaves out
    top: float  # σ̂ at which trajectories start
    scales_noise: bool  # whether the start noise may be scaled, so that the first node may lie below ``top``
    shift: float | None  # of a flow's grid

    def __init__(self, scheduler: AtlasMultistepScheduler, count: int, batch_size: int):
        self.scheduler, self.count, self.batch_size = scheduler, count, batch_size
        self.calls = 0

    @abstractmethod
    def march(self, sigmas: Sequence[float], step: Step, start: float = 1.0, rows: slice = slice(None)) -> torch.Tensor:
        """
        Evaluate velocities along noise levels and return where the last step goes.

        Args:
            sigmas: σ̂ of the network calls.
            step: called as ``f(n, x, v)`` with state and velocity at the n-th level; returns the state at the next one.
            start: of the first state, as a multiple of the start noise.
            rows: which trajectories.
        """

    def parts(self, rows: slice = slice(None)) -> list[slice]:
        """The batches of some trajectories."""
        first, end, _ = rows.indices(self.count)
        return [slice(at, min(at + self.batch_size, end)) for at in range(first, end, self.batch_size)]

    @abstractmethod
    def plain(self, calls: int) -> torch.Tensor:
        """Where the uncalibrated solver goes in so many network calls, (trajectories, d)."""

    def velocity(self, output: torch.Tensor, sample: torch.Tensor, level: NoiseLevel) -> torch.Tensor:
        """v, (batch, d), of predictions and samples of the model's shape."""
        self.calls += len(sample)
        output = output.to(sample.dtype) * self.scheduler.process.output_sign
        tensor, factor = self.scheduler.velocity(output, sample, level)
        return (tensor * factor).flatten(1)


def start_noise(seeds: Sequence[int], shape: Sequence[int], device: Any, dtype: torch.dtype) -> torch.Tensor:
    """One seed a sample, as Diffusers draws it for a list of generators."""
    rows = [torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed), dtype=dtype) for seed in seeds]
    return torch.stack(rows).to(device)


def check_finite(velocity: torch.Tensor, timestep: float) -> None:
    if not velocity.isfinite().all():
        raise ValueError(f"the model returned NaN or infinity at timestep {timestep:g}")


class FunctionModel(Model):
    """
    A prediction function ``f(sample, timestep)``.

    Args:
        predict: the function.
        shape: of one sample.
        seeds: of the start noise, one a trajectory.
        device: of the samples.
    """

    scales_noise = True

    def __init__(
        self, predict: Predict, scheduler: AtlasMultistepScheduler, shape: Any, seeds: Any, batch_size: int, device: Any
    ):
        super().__init__(scheduler, len(seeds), batch_size)
        self.predict, self.shape, self.top = predict, tuple(shape), scheduler.largest_sigma_hat
        self.noise, self.shift = start_noise(seeds, shape, device, torch.float32).flatten(1), scheduler.process.shift

    @torch.no_grad()
    def march(self, sigmas: Sequence[float], step: Step, start: float = 1.0, rows: slice = slice(None)) -> torch.Tensor:
        nodes, x = self.scheduler.nodes(sigmas), self.noise[rows] * start
        for n, (timestep, level) in enumerate(zip(nodes.timesteps, nodes.source)):
            samples = x.unflatten(1, self.shape) * radius(level, 1.0)
            v = self.velocity(self._outputs(samples, timestep, rows), samples, level)
            check_finite(v, timestep)
            x = step(n, x, v)
        return x

    @torch.no_grad()
    def plain(self, calls: int) -> torch.Tensor:
        solver = copy.deepcopy(self.scheduler)
        solver.set_timesteps(calls)
        x = self.noise.unflatten(1, self.shape)
        for timestep in solver.timesteps:
            self.calls += len(x)
            x = solver.step(self._outputs(x, float(timestep)), timestep, x, return_dict=False)[0]
        return x.flatten(1)

    def _outputs(self, samples: torch.Tensor, timestep: float, rows: slice = slice(None)) -> torch.Tensor:
        """The function's predictions, batch by batch."""
        parts, t = self.parts(rows), torch.tensor(timestep, dtype=torch.float32, device=samples.device)
        outputs = [self.predict(batch, t) for batch in samples.split([part.stop - part.start for part in parts])]
        for part, output in zip(parts, outputs):
            shape = part.stop - part.start, *self.shape
            if output.shape != shape:
                raise ValueError(f"the model returned shape {tuple(output.shape)} for samples of shape {shape}")
        return torch.cat(outputs).to(samples.dtype)
