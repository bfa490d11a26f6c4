"""
Training a Schrödinger bridge from eight Gaussians to two moons, beside torchcfm: ``python benchmarks/bridge_training.py``.

The peer is torchcfm's ``SchrodingerBridgeConditionalFlowMatcher`` (σ = 1, exact transport in every batch); ours is
``brownian_bridge`` on pairs of ``PlanSampler`` at ε = 2σ², with stratified times and an average of the weights, as
``train.py`` has them. Data, network (three hidden layers of ``--width``), batch 256, AdamW, learning rate 2e-3, number of
steps and seeds are the same. W2 is POT's exact distance between 2,048 samples of the learned flow (Euler, 100 steps) and new
data, both made with the same seed; the floor is W2 between two sets of data. Runs alternate; times are of the process. Needs
the packages torchcfm and POT.
"""

import argparse
import math
import statistics
from functools import partial
from time import process_time

import torch
from diffusers.training_utils import EMAModel
from torch import nn

from atlas_diffusers.training import PlanSampler, brownian_bridge

BATCH, RATE, SIGMA = 256, 2e-3, 1.0


def eight_gaussians(n: int, generator: torch.Generator) -> torch.Tensor:
    """Centres on a circle of radius 5, variance 0.1."""
    angles = torch.randint(0, 8, (n,), generator=generator) * (math.pi / 4)
    centres = 5 * torch.stack([angles.cos(), angles.sin()], 1)
    return centres + 0.1**0.5 * torch.randn(n, 2, generator=generator)


def moons(n: int, generator: torch.Generator) -> torch.Tensor:
    """Two half circles of radius 3, noise 0.2 of the radius, around the origin."""
    upper, angle = torch.rand(n, generator=generator) < 0.5, math.pi * torch.rand(n, generator=generator)
    circle = torch.stack([angle.cos(), angle.sin()], 1)
    points = torch.where(upper[:, None], circle, torch.tensor([1.0, 0.5]) - circle)
    return 3 * (points + 0.2 * torch.randn(n, 2, generator=generator)) - 1


def network(width: int, seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [nn.Linear(3, width), nn.SELU(), nn.Linear(width, width), nn.SELU(), nn.Linear(width, width), nn.SELU()]
        return nn.Sequential(*layers, nn.Linear(width, 2))


class Ours:
    name = "atlas_diffusers"

    def __init__(self, generator: torch.Generator, model: nn.Module):
        draws = (partial(data, generator=generator) for data in (eight_gaussians, moons))
        self.generator, self.model = generator, model
        self.pairs = PlanSampler(*draws, 2 * SIGMA**2, generator=generator)
        self.average = EMAModel(model.parameters(), decay=0.999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)

    def times(self) -> torch.Tensor:
        return (torch.randperm(BATCH, generator=self.generator) + torch.rand(1, generator=self.generator)) / BATCH

    def bridge(self, x0, x1, t, noise):
        return brownian_bridge(x0, x1, t, SIGMA, noise)

    def after_step(self) -> None:
        self.average.step(self.model.parameters())

    def finish(self) -> None:
        self.average.copy_to(self.model.parameters())


class Theirs:
    name = "torchcfm"

    def __init__(self, generator: torch.Generator, model: nn.Module):
        import numpy
        from torchcfm.conditional_flow_matching import SchrodingerBridgeConditionalFlowMatcher

        self.matcher = SchrodingerBridgeConditionalFlowMatcher(sigma=SIGMA, ot_method="exact")
        numpy.random.seed(generator.initial_seed())  # where it draws its pairs from
        self.generator = generator

    def pairs(self, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.matcher.ot_sampler.sample_plan(eight_gaussians(n, self.generator), moons(n, self.generator))

    def times(self) -> torch.Tensor:
        return torch.rand(BATCH, generator=self.generator)

    def bridge(self, x0, x1, t, noise):
        x = self.matcher.sample_xt(x0, x1, t, noise)
        return x, self.matcher.compute_conditional_flow(x0, x1, t, x)

    def after_step(self) -> None:
        pass

    finish = after_step


def train(kind: type, seed: int, steps: int, width: int) -> tuple[nn.Module, float, float]:
    """The network, and seconds in all and in drawing pairs."""
    generator = torch.Generator().manual_seed(seed)
    model = network(width, seed)
    method = kind(generator, model)
    optimizer = torch.optim.AdamW(model.parameters(), RATE)
    start, coupling = process_time(), 0.0
    for _ in range(steps):
        before = process_time()
        x0, x1 = method.pairs(BATCH)
        coupling += process_time() - before
        t = method.times()
        x, u = method.bridge(x0, x1, t, torch.randn(x0.shape, generator=generator))
        loss = (model(torch.cat([x, t[:, None]], 1)) - u).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        method.after_step()
    method.finish()
    return model, process_time() - start, coupling


@torch.no_grad()
def flow(model: nn.Module, x: torch.Tensor, steps: int = 100) -> torch.Tensor:
    for n in range(steps):
        x = x + model(torch.cat([x, torch.full((len(x), 1), n / steps)], 1)) / steps
    return x


def wasserstein(x: torch.Tensor, y: torch.Tensor) -> float:
    import ot

    weights = [[1 / len(z)] * len(z) for z in (x, y)]
    return ot.emd2(*weights, ot.dist(x.double().numpy(), y.double().numpy()), numItermax=10**7) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--width", type=int, default=64)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| seed | method | W2 | floor | s | of which pairs |\n|---|---|---|---|---|---|")
    found = {kind: [] for kind in (Ours, Theirs)}
    for seed in arguments.seeds:
        generator = torch.Generator().manual_seed(10_000 + seed)
        start, data, others = eight_gaussians(2048, generator), moons(2048, generator), moons(2048, generator)
        for kind in found if seed % 2 else reversed(found):
            model, seconds, coupling = train(kind, seed, arguments.steps, arguments.width)
            found[kind].append((wasserstein(flow(model, start), data), seconds))
            cells = [f"{found[kind][-1][0]:.3f}", f"{wasserstein(others, data):.3f}", f"{seconds:.1f}", f"{coupling:.1f}"]
            print(f"| {seed} | {kind.name} | {' | '.join(cells)} |", flush=True)
    for kind, rows in found.items():
        w2, seconds = (statistics.fmean(column) for column in zip(*rows))
        print(f"{kind.name:16s} mean W2 {w2:.3f}, mean time {seconds:.1f} s")


if __name__ == "__main__":
    main()
