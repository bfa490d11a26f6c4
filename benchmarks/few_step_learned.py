"""
Solvers that are trained by back-propagation through the network, as peers of ``few_step.py --learned``; in the coordinates of
``v = cos θ ε − sin θ x_0``, with σ̂ of the calls learned by all of them, the first at the noisiest level:

| name | step | reference |
|---|---|---|
| LD3 | Adams-Bashforth of order 3 on the learned times | arXiv 2405.15506 |
| BNS | ``x_{n+1} = a_n x_0 + Σ_j b_nj v_j`` | arXiv 2403.01329 |
| GS | ``x_{n+1} = Σ_j a_nj x_j + Σ_j b_nj v_j`` | arXiv 2510.17699 |

All start as the uncalibrated few-step solver's nodes with Adams-Bashforth weights, and minimise the mean RMS distance to a
teacher's ends by Adam with a cosine schedule. A forward call counts one, its backward pass two.
"""

import math

import torch
from few_step_problems import Network, Problem

KINDS = ("LD3", "BNS", "GS")
BATCH, RATES = 8, {"LD3": 2e-2, "BNS": 2e-2, "GS": 5e-3}  # of a few tried, the best for each
ORDER = 3


def adams_bashforth(angles: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Weights of the last calls' velocities, differentiable in the angles."""
    offsets, step = angles - angles[-1], target - angles[-1]
    powers = torch.arange(len(angles), dtype=angles.dtype)
    matrix = torch.stack([offsets**k if k else torch.ones_like(offsets) for k in range(len(angles))])
    return torch.linalg.solve(matrix, step ** (powers + 1) / (powers + 1))


class LearnedSolver(torch.nn.Module):
    """A solver of ``KINDS`` that starts with the given σ̂."""

    def __init__(self, kind: str, sigmas: list[float]):
        super().__init__()
        self.kind, calls = kind, len(sigmas)
        logs = torch.tensor(sigmas, dtype=torch.float64).log()
        self.first, self.inner = logs[:1], torch.nn.Parameter(logs[1:])
        angles = torch.cat([logs.exp().atan(), torch.zeros(1, dtype=torch.float64)])
        weights = torch.zeros(calls, calls, dtype=torch.float64)
        for n in range(calls):
            low = max(0, n + 1 - ORDER)
            weights[n, low : n + 1] = adams_bashforth(angles[low : n + 1], angles[n + 1])
        # sums over all earlier calls: relative to the first state, the weights of all steps so far
        on_states = torch.zeros(calls, calls + 1, dtype=torch.float64)
        if kind == "BNS":
            weights = weights.cumsum(0)
            on_states[:, 0] = 1
        else:
            on_states[torch.arange(calls), torch.arange(calls)] = 1
        trained = kind != "LD3"
        self.weights = torch.nn.Parameter(weights, requires_grad=trained)
        self.on_states = torch.nn.Parameter(on_states, requires_grad=trained)

    def forward(self, network: Network, x: torch.Tensor) -> torch.Tensor:
        sigmas = torch.cat([self.first, self.inner]).exp()
        angles = torch.cat([sigmas.atan(), torch.zeros(1, dtype=torch.float64)])
        states, velocities = [x], []
        for n, sigma in enumerate(sigmas):
            alpha = 1 / (1 + sigma**2).sqrt()
            noise = network.at(states[n], sigma)
            velocities.append((noise - alpha * sigma * states[n]) / alpha)
            if self.kind == "LD3":
                low = max(0, n + 1 - ORDER)
                terms = zip(adams_bashforth(angles[low : n + 1], angles[n + 1]), velocities[low:])
                states.append(states[n] + sum(weight * v for weight, v in terms))
                continue
            used = range(1) if self.kind == "BNS" else range(n + 1)
            parts = [self.on_states[n, j] * states[j] for j in used]
            states.append(sum(parts) + sum(self.weights[n, j] * velocities[j] for j in range(n + 1)))
        return states[-1]


def train(kind: str, network: Network, sigmas: list[float], noise, ends, calls: int) -> LearnedSolver:
    """Minimise the distance to ``ends``, for as many steps as ``calls`` samples through the network allow."""
    solver = LearnedSolver(kind, sigmas)
    steps = max(1, calls // (3 * len(sigmas) * BATCH))
    optimiser = torch.optim.Adam([p for p in solver.parameters() if p.requires_grad], RATES[kind])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        rows = torch.randperm(len(noise), generator=generator)[:BATCH]
        loss = (solver(network, noise[rows]) - ends[rows]).square().mean(1).sqrt().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return solver


def learned_error(kind: str, problem: Problem, training: Problem, sigmas, start, ends, noise, truth, calls: int) -> float:
    """Error of a solver trained on another problem's labels and noise, or infinity where it diverged."""
    with torch.enable_grad():
        solver = train(kind, Network(training), sigmas, start, ends, calls)
    found = float((solver(Network(problem), noise) - truth).square().mean(1).sqrt().mean())
    return found if math.isfinite(found) else math.inf
