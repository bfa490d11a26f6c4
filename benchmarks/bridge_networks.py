"""Bridges between points by networks: bridge matching in one pass, and iterative Markovian fitting in several."""

from collections.abc import Callable

import torch
from bridge_problems import Moments, Problem
from diffusers.training_utils import EMAModel
from torch import nn

from atlas_diffusers.bridges.brownian import follow
from atlas_diffusers.training import MarkovianFitting, MixtureCoupling, PlanSampler, stratified_timesteps

WIDTH, BATCH, RATE, DECAY = 128, 256, 1e-3, 0.999
STEPS = 8000  # in all passes together
PATH_STEPS, DRAWS = 20, 200  # of a path, and paths from a test point
Pairs = Callable[[int], tuple[torch.Tensor, torch.Tensor]]


class PointNetwork(nn.Module):
    """Displacement of points (n, D) with the share r of the time left, (n,)."""

    def __init__(self, dimensions: int):
        super().__init__()
        widths = [dimensions + 2, WIDTH, WIDTH, WIDTH]
        layers = [layer for pair in zip(widths, widths[1:]) for layer in (nn.Linear(*pair), nn.SiLU())]
        self.layers = nn.Sequential(*layers, nn.Linear(WIDTH, dimensions))

    def forward(self, x: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
        return self.layers(torch.cat([x, left[:, None], left.sqrt()[:, None]], 1))


def couple(kind: str, x: torch.Tensor, y: torch.Tensor, epsilon: float, g: torch.Generator) -> Pairs:
    """Pairs of the first pass."""

    def some(points: torch.Tensor) -> Callable[[int], torch.Tensor]:
        return lambda count: points[torch.randint(len(points), (count,), generator=g)]

    if kind == "sinkhorn":
        return PlanSampler(some(x), some(y), 2 * epsilon, generator=g)
    if kind == "mixture":
        mixture = MixtureCoupling(x, y, epsilon**0.5)
        return lambda count: (points := some(x)(count), mixture(points, g))
    return lambda count: (some(x)(count), some(y)(count))


def matching(kind: str, passes: int) -> Callable[[Problem, torch.Tensor, torch.Tensor], Moments]:
    """A solver: networks fitted in some passes, started from pairs of a kind."""

    def fit(problem: Problem, x: torch.Tensor, y: torch.Tensor) -> Moments:
        g, x, y = torch.Generator().manual_seed(0), x.float(), y.float()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            networks = PointNetwork(x.shape[1]), PointNetwork(x.shape[1])
        fitting = MarkovianFitting(*networks, problem.epsilon**0.5, passes)
        parameters = [p for network in networks for p in network.parameters()]
        optimiser, pairs = torch.optim.AdamW(parameters, RATE), couple(kind, x, y, problem.epsilon, g)
        average = EMAModel(parameters, decay=DECAY, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
        for step in range(STEPS):
            number = step * passes // STEPS
            if number and number != (step - 1) * passes // STEPS:
                average.copy_to(parameters)
            if number == 0:
                source, target = pairs(BATCH)
            else:
                source, target = (points[torch.randint(len(points), (BATCH,), generator=g)] for points in (x, y))
            left = (stratified_timesteps(BATCH, 1000, g) + 0.5) / 1000
            optimiser.zero_grad()
            fitting.loss(number, source, target, left, lambda z: torch.randn(z.shape, generator=g)).backward()
            optimiser.step()
            average.step(parameters)
        average.copy_to(parameters)
        return sampled_moments(fitting, g)

    return fit


def sampled_moments(fitting: MarkovianFitting, g: torch.Generator) -> Moments:
    """Mean and covariance of y given x over paths; by chance off by about 1/``DRAWS`` of the variance given x."""

    @torch.no_grad()
    def moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        start = x.float().repeat_interleave(DRAWS, 0)
        forward = lambda z, left: fitting.forward(z, z.new_full((len(z),), left))  # noqa: E731
        end = follow(forward, start, fitting.sigma, PATH_STEPS, lambda z: torch.randn(z.shape, generator=g))
        end = end.double().view(len(x), DRAWS, -1)
        centred = end - end.mean(1, keepdim=True)
        return end.mean(1), centred.mT @ centred / (DRAWS - 1)

    return moments
