import math

import pytest
import torch
from conftest import seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import energy_distance as scipy_energy_distance

from atlas_diffusers.metrics import energy_distance


def normal(n, d, seed, mean=0.0):
    return mean + torch.randn(n, d, generator=seeded(seed), dtype=torch.float64)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 5), st.integers(0, 10_000))
def test_against_the_written_out_sums(n, m, d, seed):
    x, y = normal(n, d, seed), normal(m, d, seed + 1, mean=1)

    def mean_distance(a, b):
        return sum(math.dist(p, q) for p in a.tolist() for q in b.tolist()) / (len(a) * len(b))

    expected = 2 * mean_distance(x, y) - mean_distance(x, x) - mean_distance(y, y)
    assert energy_distance(x, y) == pytest.approx(expected, rel=1e-10, abs=1e-10)


def test_one_dimension_against_scipy():
    x, y = normal(200, 1, 0), normal(300, 1, 1, mean=0.7)
    assert energy_distance(x, y) == pytest.approx(scipy_energy_distance(x[:, 0], y[:, 0]) ** 2, rel=1e-10)


@pytest.mark.parametrize("shift", [0.3, 1.0, 4.0])
def test_shifted_gaussians_against_the_closed_form(shift):
    quantiles = torch.special.ndtri((torch.arange(2000, dtype=torch.float64) + 0.5) / 2000)[:, None]
    between = 2 / math.sqrt(math.pi) * math.exp(-(shift**2) / 4) + shift * math.erf(shift / 2)
    assert energy_distance(quantiles, quantiles + shift) == pytest.approx(2 * between - 4 / math.sqrt(math.pi), rel=2e-3)


def test_two_samples_of_one_distribution_have_the_stated_mean():
    n, m, repeats = 20, 30, 300
    values = torch.tensor([energy_distance(normal(n, 1, 2 * i), normal(m, 1, 2 * i + 1)) for i in range(repeats)])
    expected = 2 / math.sqrt(math.pi) * (1 / n + 1 / m)
    assert abs(float(values.mean()) - expected) < 4 * float(values.std()) / repeats**0.5
    assert float(values.min()) > 0


def test_equal_sets_in_another_order_are_zero_apart():
    x = torch.randn(100, 1280, generator=seeded())
    assert abs(energy_distance(x, x[torch.randperm(100, generator=seeded(1))])) < 1e-9 * 50  # the mean distance


def test_symmetric_and_moved_along():
    x, y = normal(50, 3, 0), normal(40, 3, 1, mean=0.5)
    value = energy_distance(x, y)
    assert energy_distance(y, x) == pytest.approx(value, rel=1e-12)
    assert energy_distance(3 * x + 1e5, 3 * y + 1e5) == pytest.approx(3 * value, rel=1e-6)
