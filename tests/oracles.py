"""What the tests compare with: closed forms of the process x_t = α x_0 + σ ε of Gaussian data, dense kernels and plans."""

from dataclasses import dataclass

import numpy as np
import torch

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction", "flow_prediction")


def prediction(prediction_type, data, noise, alpha, sigma):
    """What a network of this type predicts when its data and noise predictions are ``data`` and ``noise``."""
    return {
        "epsilon": noise,
        "sample": data,
        "v_prediction": alpha * noise - sigma * data,
        "flow_prediction": noise - data,
    }[prediction_type]


@dataclass(frozen=True)
class Gaussian:
    """Data distributed as N(mean, std²), for which every quantity of the process has a closed form."""

    mean: float = 2.0
    std: float = 0.5

    def data_prediction(self, x, alpha, sigma):
        """E[x_0 | x_t = x]."""
        gain = alpha * self.std**2 / (alpha**2 * self.std**2 + sigma**2)
        return self.mean + gain * (x - alpha * self.mean)

    def network(self, prediction_type, x, alpha, sigma):
        """The exact network output of a prediction type."""
        data = self.data_prediction(x, alpha, sigma)
        return prediction(prediction_type, data, (x - alpha * data) / sigma, alpha, sigma)

    def flow(self, z, alpha, sigma):
        """The probability-flow ODE's solution at a level; ``z`` names the trajectory."""
        return alpha * self.mean + (alpha**2 * self.std**2 + sigma**2) ** 0.5 * z

    def ancestral_moments(self, alphas_cumprod, timesteps):
        """Mean and standard deviation of DDPM's output (variance `fixed_small`) started at N(0, 1)."""
        levels = [*np.asarray(alphas_cumprod, dtype=np.float64)[np.asarray(timesteps)], 1.0]
        mean, variance = 0.0, 1.0
        for now, after in zip(levels, levels[1:]):
            alpha, beta = now**0.5, 1 - now / after
            on_data, on_sample = after**0.5 * beta / (1 - now), (now / after) ** 0.5 * (1 - after) / (1 - now)
            gain = alpha * self.std**2 / (now * self.std**2 + 1 - now)
            mean = on_data * (self.mean + gain * (mean - alpha * self.mean)) + on_sample * mean
            variance = (on_data * gain + on_sample) ** 2 * variance + beta * (1 - after) / (1 - now)
        return mean, variance**0.5


def order_of_convergence(steps, errors):
    """p of error ~ steps^-p, by least squares."""
    return -np.polyfit(np.log(steps), np.log(errors), 1)[0]


def points(*shape, seed=0, dtype=torch.float64):
    """Standard normal numbers, the same for every dtype."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def cloud(n, d=3, seed=0):
    """n standard normal points."""
    return points(n, d, seed=seed)


def squared_distances(x, y):
    """Of points (..., n, d) and (..., m, d), in float64 from their differences."""
    return (x.double()[..., :, None, :] - y.double()[..., None, :, :]).square().sum(-1)


def kernel_matrix(squared, kernel, epsilon, factors=(1.0,)):
    """A kernel of squared distances, averaged over bandwidths."""
    values = {
        "gaussian": lambda e: torch.exp(-squared / (2 * e**2)),
        "laplacian": lambda e: torch.exp(-squared.sqrt() / e),
        "cauchy": lambda e: 1 / (1 + squared / e**2),
    }[kernel]
    return torch.stack([values(epsilon * factor) for factor in factors]).mean(0)


def dense_plan(cost, epsilon, a, b, iterations=5000, shares=(1.0, 1.0)):
    """Sinkhorn's plan of a cost matrix by plain iterations in logarithms; shares ρ/(ρ + ε) below 1 relax a marginal."""
    cost, f, g = cost / epsilon, torch.zeros_like(a), torch.zeros_like(b)
    for _ in range(iterations):
        before = f
        f = -torch.logsumexp(g + b.log() - cost, 1) * shares[0]
        g = -torch.logsumexp(f[:, None] + a.log()[:, None] - cost, 0) * shares[1]
        if (f - before).abs().max() <= 4 * torch.finfo(f.dtype).eps * f.abs().max():
            break  # what is left is rounding
    return a[:, None] * b * (f[:, None] + g - cost).exp()
