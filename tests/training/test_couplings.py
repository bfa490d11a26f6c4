"""Pairs of noise and data, against the plan in closed form, and bridges, against the Brownian bridge's moments."""

import math

import pytest
import torch
from conftest import seeded
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas_diffusers.training import PlanSampler, brownian_bridge, sinkhorn_pairs


def test_pairs_of_gaussians_are_those_of_the_closed_form_plan():
    """Between N(0, 1) and N(m, s²) the plan is Gaussian with covariance √(s² + ε²/16) − ε/4 (Janati et al. 2020, |x − y|²)."""
    generator, shift, scale, epsilon = seeded(), 1.5, 0.7, 1.0
    x = torch.randn(1500, 1, generator=generator)
    y = shift + scale * torch.randn(1500, 1, generator=generator)
    drawn = torch.cat([x[sinkhorn_pairs(x, y, epsilon, generator, tolerance=1e-4)] for _ in range(20)])
    found = ((drawn - drawn.mean()) * (y.repeat(20, 1) - y.mean())).mean().item()
    assert found == pytest.approx(math.sqrt(scale**2 + epsilon**2 / 16) - epsilon / 4, abs=0.05)
    assert drawn.mean().item() == pytest.approx(x.mean().item(), abs=0.02)
    assert drawn.var().item() == pytest.approx(x.var().item(), rel=0.03)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 999), st.integers(2, 20))
def test_a_small_epsilon_sorts_points_on_a_line(seed, n):
    generator = seeded(seed)
    x = torch.arange(n, dtype=torch.float32)[torch.randperm(n, generator=generator), None]
    y = 3 * torch.arange(n, dtype=torch.float32)[torch.randperm(n, generator=generator), None] - 5
    pairs = sinkhorn_pairs(x, y, 1e-2, generator, tolerance=1e-3)
    assert torch.equal(x[pairs, 0].argsort(), y[:, 0].argsort())


def test_a_relative_epsilon_is_in_the_unit_of_the_mean_cost():
    x, y = torch.randn(2, 40, 3, 4, 4, generator=seeded())
    cost = torch.cdist(x.flatten(1), y.flatten(1)).square().mean().item()
    expected = sinkhorn_pairs(x, y, 0.05 * cost, seeded(1))
    assert len(expected.unique()) > 20
    assert torch.equal(sinkhorn_pairs(x, y, 0.05, seeded(1), relative=True), expected)


def test_a_pool_draws_its_plan_and_is_drawn_again():
    generator, draws = seeded(), []

    def source(n):
        draws.append(n)
        return torch.randn(n, 2, generator=generator)

    def target(n):
        return 4 + torch.randn(n, 2, generator=generator)

    sampler = PlanSampler(source, target, 2.0, pool=64, refresh=2, generator=generator)
    for _ in range(4):
        x, y = sampler(5)
        assert x.shape == y.shape == (5, 2)
    assert draws == [64, 64]
    x, y = sampler(40_000)
    expected = (math.sqrt(1 + 2.0**2 / 16) - 2.0 / 4) * 2  # as above, in each of two dimensions
    found = ((x - x.mean(0)) * (y - y.mean(0))).sum(1).mean().item()
    assert found == pytest.approx(expected, rel=0.35)  # of a pool of 64


@pytest.mark.parametrize("call, message", [
    (lambda: sinkhorn_pairs(torch.zeros(3, 2), torch.zeros(3, 2), 0.0), "epsilon"),
    (lambda: sinkhorn_pairs(torch.zeros(3, 2), torch.zeros(3, 4), 1.0), r"got \(3, 2\) and \(3, 4\)"),
    (lambda: PlanSampler(torch.zeros, torch.zeros, 1.0, pool=0), "pool=0"),
])  # fmt: skip
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_bridge_has_the_moments_and_the_velocity_of_its_formula():
    x0, x1 = torch.tensor([1.0, -2.0]).double(), torch.tensor([3.0, 0.5]).double()
    z = torch.randn(200_000, 2, generator=seeded(), dtype=torch.float64)
    t = torch.full((len(z),), 0.3, dtype=torch.float64)
    x, u = brownian_bridge(x0.expand_as(z), x1.expand_as(z), t, 0.8, z)
    torch.testing.assert_close(x.mean(0), 0.7 * x0 + 0.3 * x1, rtol=0, atol=0.01)
    torch.testing.assert_close(x.var(0), torch.full((2,), 0.64 * 0.21).double(), rtol=0.02, atol=0)
    step = 1e-6
    later = brownian_bridge(x0.expand_as(z), x1.expand_as(z), t + step, 0.8, z)[0]
    torch.testing.assert_close(u, (later - x) / step, rtol=0, atol=1e-5)  # along one bridge, its noise kept


def test_a_bridge_without_noise_is_a_straight_line():
    x0, x1 = torch.randn(2, 6, 3, generator=seeded())
    x, u = brownian_bridge(x0, x1, torch.linspace(0.1, 0.9, 6), 0.0, torch.ones(6, 3))
    torch.testing.assert_close(u, x1 - x0)
    torch.testing.assert_close(x[0], 0.9 * x0[0] + 0.1 * x1[0])
