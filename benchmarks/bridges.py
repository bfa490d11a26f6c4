"""Schrödinger bridges between two laws that are known by samples, against a bridge whose plan is known exactly.

    python benchmarks/bridges.py
    python benchmarks/bridges.py --samples 200000 --dimensions 2 16 --epsilons 0.1 --seeds 0
    python benchmarks/bridges.py --problem rotated --dimensions 16 --covariance full

The law of x is a Gaussian, the potential a mixture of five equal Gaussians on a sphere, as in the benchmark of Gushchin et al.
2023 (arXiv 2306.10161): y is drawn from the exact plan. ``rotated`` has covariances with eigenvalues from 0.1 to 1 along random
axes. Printed is cBW2-UVP, the Bures-Wasserstein distance between the laws of y given x, of plan and fit, in percent of half the
variance of y, averaged over test points (0 is exact, 100 a constant), median over seeds, and in brackets the median CPU seconds
on one thread.

Peers get the same samples: ``independent`` pairs, ``sinkhorn`` (our entropic transport between at most 4,000 points a side,
carried to new points by the potential of y), and ``LightSB`` (Korotin et al. 2023, arXiv 2310.01174, section 3: fifty diagonal
Gaussians, 10,000 steps of Adam on batches of 128).
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable

import torch

from atlas_diffusers.bridges import MixtureBridge
from atlas_diffusers.bridges.mixture_potential import MixturePotential
from atlas_diffusers.transport import entropic_transport

COMPONENTS, RADIUS, SPREAD = 5, 5.0, 0.5
VARIANCES = {0.1: 0.067, 1.0: 0.061, 10.0: 0.0092}  # of the potential's Gaussians, by epsilon
LEARNING_RATES = {0.1: 1e-3, 1.0: 3e-3, 10.0: 6e-2}
CLOUD = 4000
Moments = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class Problem:
    """An exact bridge: the Gaussian law of x, and y given x."""

    def __init__(self, kind: str, dimensions: int, epsilon: float, seed: int):
        g = torch.Generator().manual_seed(1000 * seed + dimensions)
        self.generator, self.dimensions, self.epsilon = g, dimensions, epsilon
        self.spread = SPREAD if kind == "sphere" else 1.0
        centres = torch.randn(COMPONENTS, dimensions, generator=g, dtype=torch.float64)
        centres *= (RADIUS if kind == "sphere" else 1.2 * math.sqrt(dimensions)) / centres.norm(dim=1, keepdim=True)
        if kind == "sphere":
            scatter = (0.1 * torch.randn(COMPONENTS, 1, 1, generator=g, dtype=torch.float64)).exp()
            variance = VARIANCES[epsilon] * scatter * torch.eye(dimensions, dtype=torch.float64)
        else:
            axes, _ = torch.linalg.qr(torch.randn(COMPONENTS, dimensions, dimensions, generator=g, dtype=torch.float64))
            values = 0.1 * 10 ** torch.rand(COMPONENTS, 1, dimensions, generator=g, dtype=torch.float64)
            variance = axes * values @ axes.mT
        # exp(xᵀy/ε) N(y; μ, Σ) exp(−|y|²/2ε): the potential of the benchmark is N(y; μ, Σ) for the kernel exp(−|x − y|²/2ε)
        inverse = torch.linalg.inv(variance)
        S = torch.linalg.inv(inverse + torch.eye(dimensions) / epsilon)
        mean = (S @ inverse @ centres[:, :, None])[:, :, 0]
        tilt = torch.einsum("ki,kij,kj->k", centres, inverse, centres) - torch.einsum(
            "ki,kij,kj->k", mean, torch.linalg.inv(S), mean
        )
        mass = (torch.logdet(S) - torch.logdet(variance) - tilt) / 2
        self.potential = MixturePotential(mass, mean, S, torch.zeros_like(mean), epsilon)

    def source(self, count: int) -> torch.Tensor:
        return self.spread * torch.randn(count, self.dimensions, generator=self.generator, dtype=torch.float64)

    def target(self, x: torch.Tensor) -> torch.Tensor:
        """Draws of y given x."""
        log_weights, means, S = self.potential.posterior(x, 0.0)
        chosen = torch.multinomial(log_weights.exp(), 1, generator=self.generator)[:, 0]
        noise = torch.randn(x.shape, generator=self.generator, dtype=x.dtype)
        moved = torch.empty_like(x)
        for k, factor in enumerate(torch.linalg.cholesky(S)):
            rows = chosen == k
            moved[rows] = means[rows, k] + noise[rows] @ factor.T
        return moved

    def moments(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return mixture_moments(self.potential, x)


def mixture_moments(potential: MixturePotential, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean (n, D) and covariance (n, D, D) of y given x."""
    log_weights, means, S = potential.posterior(x, 0.0)
    weights = log_weights.exp()
    mean = (weights[:, :, None] * means).sum(1)
    centred = (means - mean[:, None]) * weights.sqrt()[:, :, None]
    S = S if S.ndim == 3 else torch.diag_embed(S)
    return mean, torch.einsum("nk,kij->nij", weights, S) + centred.mT @ centred


def root(matrices: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(matrices)
    return vectors * values.clamp(min=0).sqrt()[..., None, :] @ vectors.mT


def conditional_error(found: Moments, problem: Problem, x: torch.Tensor, variance: float) -> float:
    """cBW2-UVP in percent at test points."""
    (mean, C), (exact_mean, exact_C) = found(x), problem.moments(x)
    R = root(exact_C)
    overlap = torch.linalg.eigvalsh(R @ C @ R).clamp(min=0).sqrt().sum(1)
    trace = (C + exact_C).diagonal(dim1=1, dim2=2).sum(1)
    distance = (mean - exact_mean).square().sum(1) / 2 + trace / 2 - overlap
    return (100 * distance.mean() / (variance / 2)).item()


def independent(x: torch.Tensor, y: torch.Tensor, epsilon: float) -> Moments:
    mean, C = y.mean(0), y.T.cov()
    return lambda query: (mean.expand_as(query), C.expand(len(query), *C.shape))


def sinkhorn_plan(x: torch.Tensor, y: torch.Tensor, epsilon: float) -> Moments:
    x, y = x[:CLOUD], y[:CLOUD]
    g = entropic_transport(x, y, 2 * epsilon, tolerance=1e-4, max_iterations=5000).g

    def moments(query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights = ((g - torch.cdist(query, y).square()) / (2 * epsilon)).softmax(1)
        mean = weights @ y
        return mean, torch.stack([(y - m).T @ ((y - m) * w[:, None]) for m, w in zip(mean, weights)])

    return moments


def light_sb(x: torch.Tensor, y: torch.Tensor, epsilon: float, count: int = 50, steps: int = 10_000) -> Moments:
    g = torch.Generator().manual_seed(0)
    x, y = x.float(), y.float()

    def batch(points: torch.Tensor, size: int) -> torch.Tensor:
        return points[torch.randint(len(points), (size,), generator=g)]

    mass = torch.full((count,), -math.log(count)) * epsilon
    centre, log_S = batch(y, count).clone(), torch.zeros(count, x.shape[1])
    for parameter in (mass, centre, log_S):
        parameter.requires_grad_()
    optimiser, uniform = torch.optim.Adam([mass, centre, log_S], lr=LEARNING_RATES[epsilon]), torch.full((128,), 1 / 128)

    def potential() -> MixturePotential:
        return MixturePotential(mass / epsilon, centre, epsilon * log_S.exp(), torch.zeros_like(centre), epsilon)

    for _ in range(steps):
        optimiser.zero_grad()
        potential().objective(batch(x, 128), batch(y, 128), uniform, uniform).backward()
        optimiser.step()
    found = potential()
    tensors = (found.log_mass, found.mean, found.covariance, found.origin)
    fitted = MixturePotential(*(v.detach().double() for v in tensors), epsilon)
    return lambda query: mixture_moments(fitted, query)


def mixture(covariance: str):
    def fit(x: torch.Tensor, y: torch.Tensor, epsilon: float) -> Moments:
        bridge = MixtureBridge(covariance=covariance).fit(x, y, epsilon)
        return lambda query: (bridge.mean(query), bridge.covariance(query))

    return fit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problem", choices=("sphere", "rotated"), default="sphere")
    parser.add_argument("--dimensions", type=int, nargs="+", default=[2, 16, 64, 128])
    parser.add_argument("--epsilons", type=float, nargs="+", default=[0.1, 1.0, 10.0], choices=sorted(VARIANCES))
    parser.add_argument("--samples", type=int, default=20_000, help="a side (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--covariance", choices=("diag", "full"), default="diag", help="of our fit")
    parser.add_argument("--peers", nargs="*", default=["independent", "sinkhorn", "LightSB"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    known = {"independent": independent, "sinkhorn": sinkhorn_plan, "LightSB": light_sb}
    solvers = {"MixtureBridge": mixture(args.covariance), **{name: known[name] for name in args.peers}}
    print(f"{args.problem}, {args.samples} samples a side, seeds {args.seeds}: cBW2-UVP in % (CPU seconds)")
    print("| epsilon | D | " + " | ".join(solvers) + " |")
    print("|---|---|" + "---|" * len(solvers))
    for epsilon in args.epsilons:
        for dimensions in args.dimensions:
            errors, seconds = {name: [] for name in solvers}, {name: [] for name in solvers}
            for seed in args.seeds:
                problem = Problem(args.problem, dimensions, epsilon, seed)
                x, y = problem.source(args.samples), problem.target(problem.source(args.samples))
                query, variance = problem.source(100), y.var(0).sum().item()
                for name, solve in solvers.items():
                    start = time.process_time()
                    found = solve(x, y, epsilon)
                    seconds[name].append(time.process_time() - start)
                    errors[name].append(conditional_error(found, problem, query, variance))
            cells = [f"{statistics.median(errors[n]):.3f} ({statistics.median(seconds[n]):.1f})" for n in solvers]
            print(f"| {epsilon:g} | {dimensions} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
