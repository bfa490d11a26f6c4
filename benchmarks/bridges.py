"""Schrödinger bridges between two laws that are known by samples, against a bridge whose plan is known exactly.

    python benchmarks/bridges.py
    python benchmarks/bridges.py --samples 200000 --solvers MixtureBridge
    python benchmarks/bridges.py --problem rotated --dimensions 16 --solvers MixtureBridge full
    python benchmarks/bridges.py --dimensions 2 16 --solvers "sinkhorn, 1 pass" "sinkhorn, 4 passes"

Printed is cBW2-UVP / BW2-UVP, the Bures-Wasserstein distances between the laws of y given x and between the laws of y, of plan
and fit, in percent of half the variance of y (0 is exact, 100 a constant), medians over seeds, and in brackets the median CPU
seconds on one thread. See ``bridge_problems.py`` for the plans, after Gushchin et al. 2023 (arXiv 2306.10161).

Solvers get the same samples: ``MixtureBridge``; ``full``, the same with full covariances; ``independent`` pairs; ``sinkhorn``
(our entropic transport between at most 4,000 points a side, carried to new points by the potential of y); ``LightSB`` (Korotin
et al. 2023, arXiv 2310.01174, section 3: fifty diagonal Gaussians, 10,000 steps of Adam on batches of 128); and ``from truth``,
our refinement started at the exact potential: what is left of its error is that of the samples. ``COUPLING, N pass(es)`` are
networks of ``bridge_networks.py`` fitted in N passes of iterative Markovian fitting, started from pairs of the coupling.

With ``--cache FILE`` every result is kept there, and what it has is not computed again.
"""

import argparse
import json
import math
import statistics
import time
from pathlib import Path

import torch
from bridge_networks import matching
from bridge_problems import VARIANCES, Moments, Problem, errors, mixture_moments

from atlas_diffusers.bridges import MixtureBridge
from atlas_diffusers.bridges.mixture_fit import Cloud, closed_form_steps, refine
from atlas_diffusers.bridges.mixture_potential import MixturePotential
from atlas_diffusers.transport import entropic_transport

LEARNING_RATES = {0.1: 1e-3, 1.0: 3e-3, 10.0: 6e-2}
CLOUD, TEST_POINTS = 4000, 1000


def independent(problem: Problem, x: torch.Tensor, y: torch.Tensor) -> Moments:
    mean, C = y.mean(0), y.T.cov()
    return lambda query: (mean.expand_as(query), C.expand(len(query), *C.shape))


def sinkhorn_plan(problem: Problem, x: torch.Tensor, y: torch.Tensor) -> Moments:
    x, y, epsilon = x[:CLOUD], y[:CLOUD], problem.epsilon
    g = entropic_transport(x, y, 2 * epsilon, tolerance=1e-4, max_iterations=5000).g

    def moments(query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights = ((g - torch.cdist(query, y).square()) / (2 * epsilon)).softmax(1)
        mean = weights @ y
        return mean, torch.stack([(y - m).T @ ((y - m) * w[:, None]) for m, w in zip(mean, weights)])

    return moments


def light_sb(problem: Problem, x: torch.Tensor, y: torch.Tensor, count: int = 50, steps: int = 10_000) -> Moments:
    g, epsilon = torch.Generator().manual_seed(0), problem.epsilon
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


def from_truth(problem: Problem, x: torch.Tensor, y: torch.Tensor) -> Moments:
    p, clouds = problem.potential, (Cloud.of("x", x, None), Cloud.of("y", y, None))
    S = p.covariance.diagonal(dim1=1, dim2=2)
    diagonal = MixturePotential(p.log_mass, p.mean, S, p.origin, p.epsilon)
    if torch.equal(torch.diag_embed(S), p.covariance):
        fitted = refine(closed_form_steps(diagonal, *clouds, 15)[0], *clouds, 100)
    else:
        fitted, _ = closed_form_steps(p, *clouds, 60)
    return lambda query: mixture_moments(fitted, query)


def mixture(covariance: str):
    def fit(problem: Problem, x: torch.Tensor, y: torch.Tensor) -> Moments:
        bridge = MixtureBridge(covariance=covariance).fit(x, y, problem.epsilon)
        return lambda query: (bridge.mean(query), bridge.covariance(query))

    return fit


SOLVERS = {
    "MixtureBridge": mixture("diag"),
    "full": mixture("full"),
    "independent": independent,
    "sinkhorn": sinkhorn_plan,
    "LightSB": light_sb,
    "from truth": from_truth,
    **{f"{kind}, 1 pass": matching(kind, 1) for kind in ("independent", "sinkhorn", "mixture")},
    **{f"{kind}, 4 passes": matching(kind, 4) for kind in ("independent", "sinkhorn", "mixture")},
}


class Results:
    """Errors and seconds by cell, kept in a file of JSON lines if there is one."""

    def __init__(self, file: Path | None):
        self.file, self.known = file, {}
        if file is not None and file.is_file():
            self.known = {tuple(key): value for key, value in map(json.loads, file.read_text().splitlines())}

    def of(self, kind: str, samples: int, epsilon: float, dimensions: int, seed: int, solver: str) -> list[float]:
        """cBW2-UVP, BW2-UVP and CPU seconds."""
        key = (kind, samples, epsilon, dimensions, seed, solver)
        if key not in self.known:
            problem = Problem(kind, dimensions, epsilon, seed)
            x, y = problem.source(samples), problem.target(problem.source(samples))
            start = time.process_time()
            found = SOLVERS[solver](problem, x, y)
            seconds = time.process_time() - start
            self.known[key] = [*errors(found, problem, problem.source(TEST_POINTS), y.var(0).sum().item()), seconds]
            if self.file is not None:
                with self.file.open("a") as lines:
                    lines.write(json.dumps([key, self.known[key]]) + "\n")
        return self.known[key]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problem", choices=("sphere", "rotated"), default="sphere")
    parser.add_argument("--dimensions", type=int, nargs="+", default=[2, 16, 64, 128])
    parser.add_argument("--epsilons", type=float, nargs="+", default=[0.1, 1.0, 10.0], choices=sorted(VARIANCES))
    parser.add_argument("--samples", type=int, default=20_000, help="a side (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--solvers", nargs="+", choices=SOLVERS, default=["MixtureBridge", "independent", "sinkhorn", "LightSB"]
    )
    parser.add_argument("--cache", type=Path, help="file of results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = Results(args.cache)
    print(f"{args.problem}, {args.samples} samples a side, seeds {args.seeds}: cBW2-UVP / BW2-UVP in % (CPU seconds)")
    print("| epsilon | D | " + " | ".join(args.solvers) + " |")
    print("|---|---|" + "---|" * len(args.solvers))
    for epsilon in args.epsilons:
        for dimensions in args.dimensions:
            cells = []
            for solver in args.solvers:
                runs = [results.of(args.problem, args.samples, epsilon, dimensions, seed, solver) for seed in args.seeds]
                conditional, marginal, seconds = map(statistics.median, zip(*runs))
                cells.append(f"{conditional:.3f} / {marginal:.3f} ({seconds:.1f})")
            print(f"| {epsilon:g} | {dimensions} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
