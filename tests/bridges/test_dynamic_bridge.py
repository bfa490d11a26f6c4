import math

import pytest
import torch
from conftest import seeded

from atlas_diffusers.bridges import DynamicBridge


def quantiles(mean, std, n):
    """n points with the distribution N(mean, std²) as evenly as can be, (n, 1)."""
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    return mean + std * math.sqrt(2) * torch.erfinv(2 * u - 1)[:, None]


def gaussian_bridge(m0, s0, m1, s1, sigma, t):
    """Mean and variance at time t, and slope of E[y | X_t] (Bunne et al. 2022, arXiv 2202.05722)."""
    cross = (math.sqrt(4 * s0**2 * s1**2 + sigma**4) - sigma**2) / 2
    variance = (1 - t) ** 2 * s0**2 + t**2 * s1**2 + 2 * t * (1 - t) * cross + t * (1 - t) * sigma**2
    covariance = (1 - t) * cross + t * s1**2
    return (1 - t) * m0 + t * m1, variance, covariance / variance


@pytest.mark.parametrize("sigma", [0.5, 1.0])
@pytest.mark.parametrize("t", [0.0, 0.3, 0.7])
def test_drift_is_that_of_the_gaussian_bridge(t, sigma):
    m0, s0, m1, s1 = 0.0, 1.0, 2.0, 0.6
    bridge = DynamicBridge(quantiles(m0, s0, 400), quantiles(m1, s1, 400), sigma)
    mean, variance, slope = gaussian_bridge(m0, s0, m1, s1, sigma, t)
    x = mean + math.sqrt(variance) * torch.linspace(-1.5, 1.5, 7, dtype=torch.float64)[:, None]
    expected = (m1 + slope * (x - mean) - x) / (1 - t)
    torch.testing.assert_close(bridge.drift(x, t), expected, rtol=0, atol=0.02)


def test_sampled_paths_have_the_marginals_of_the_gaussian_bridge():
    m0, s0, m1, s1, sigma, n = 0.0, 1.0, 2.0, 0.6, 0.8, 2000
    bridge = DynamicBridge(quantiles(m0, s0, n), quantiles(m1, s1, n), sigma, tolerance=1e-4)
    path = bridge.sample(50, generator=seeded(3))
    for index in (10, 25, 40, 50):
        mean, variance, _ = gaussian_bridge(m0, s0, m1, s1, sigma, index / 50)
        x = path[index]
        assert x.mean().item() == pytest.approx(mean, abs=5 * math.sqrt(variance / n))
        # Euler-Maruyama leaves a bias of the order of one step, σ²/50, beside the sampling error
        assert x.var().item() == pytest.approx(variance, abs=5 * variance * math.sqrt(2 / n) + 2 * sigma**2 / 50)


@pytest.mark.parametrize("call, message", [
    (lambda: DynamicBridge(torch.zeros(2, 1), torch.ones(2, 1), 0.0), "sigma=0.0"),
    (lambda: DynamicBridge(torch.zeros(2, 1), torch.ones(2, 1), 1.0).drift(torch.zeros(1, 1), 1.0), "t=1.0"),
    (lambda: DynamicBridge(torch.zeros(2, 1), torch.ones(2, 1), 1.0).sample(0), "num_steps=0"),
])  # fmt: skip
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
