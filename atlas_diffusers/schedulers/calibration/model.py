"""What a calibration drives: a model along noise levels that are known beforehand, from start noise of its own."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch

from ...schedules import NoiseLevel
from ...schedules.predictions import output_coefficients
from ..scheduling_atlas_multistep import AtlasMultistepScheduler, radius

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

    def plain(self, calls: int) -> torch.Tensor:
        """Where the uncalibrated solver goes in so many network calls."""
        solver = copy.deepcopy(self.scheduler)
        solver.set_timesteps(calls + self.begin)
        solver.set_begin_index(self.begin)
        timesteps, levels, kind = solver.timesteps[self.begin :], solver.levels[self.begin :], solver.config.prediction_type

        def step(n: int, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            alpha, sigma = levels[n]
            r = radius(levels[n], 1.0)
            data, noise = (alpha * x - sigma * v) / r, (sigma * x + alpha * v) / r
            on_noise, on_data = output_coefficients(kind, alpha, sigma)
            sample, output = (y.unflatten(1, self.shape) for y in (x * r, on_noise * noise + on_data * data))
            after = solver.step(output, timesteps[n], sample).prev_sample
            return after.flatten(1) / (radius(levels[n + 1], 1.0) if n + 1 < len(levels) else 1.0)

        return self.march([level.sigma_hat for level in levels], step)

    def velocity(self, output: torch.Tensor, sample: torch.Tensor, level: NoiseLevel) -> torch.Tensor:
        """v, (batch, d), of predictions and samples of the model's shape."""
        if output.shape != sample.shape:
            found = tuple(output.shape)
            raise ValueError(f"the model returned shape {found} for samples of shape {tuple(sample.shape)}")
        self.calls += len(sample)
        output = output.to(sample.dtype)
        data = self.scheduler.predict_data(output, sample, level)
        return self.scheduler.velocity(output, sample, data, level).flatten(1)


def start_noise(seeds: Sequence[int], shape: Sequence[int], device, dtype: torch.dtype) -> torch.Tensor:
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

    def __init__(self, predict: Predict, scheduler: AtlasMultistepScheduler, shape, seeds, batch_size: int, device):
        super().__init__(scheduler, len(seeds), batch_size)
        self.predict, self.shape, self.top = predict, tuple(shape), scheduler.process.ends[0].sigma_hat
        self.noise = start_noise(seeds, shape, device, torch.float32).flatten(1)

    @torch.no_grad()
    def march(self, sigmas: Sequence[float], step: Step, start: float = 1.0, rows: slice = slice(None)) -> torch.Tensor:
        nodes, parts = self.scheduler.nodes(sigmas), self.parts(rows)
        x = self.noise[rows] * start
        first = parts[0].start
        for n, (timestep, level) in enumerate(zip(nodes.timesteps, nodes.source)):
            t = torch.tensor(timestep, dtype=torch.float32, device=x.device)
            velocities = []
            for part in parts:
                sample = x[part.start - first : part.stop - first].unflatten(1, self.shape) * radius(level, 1.0)
                velocities.append(self.velocity(self.predict(sample, t), sample, level))
            v = torch.cat(velocities)
            check_finite(v, timestep)
            x = step(n, x, v)
        return x
