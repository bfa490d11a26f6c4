"""Entropic transport against closed forms, dense iterations and the invariances that the plan must have."""

import math

import pytest
import torch
from conftest import seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import cloud, dense_plan

from atlas_diffusers.kernels import DirectKernel, GridKernel
from atlas_diffusers.transport import debiased_map, entropic_transport, sinkhorn


def grid_gaussian(mean, std, n=500):
    points = torch.linspace(mean - 7 * std, mean + 7 * std, n, dtype=torch.float64)
    weights = torch.exp(-((points - mean) ** 2) / (2 * std**2))
    return points[:, None], weights / weights.sum()


@pytest.mark.parametrize("s, t, mean, epsilon", [(1.0, 2.0, 0.5, 0.3), (1.0, 0.5, -1.0, 2.0), (1.0, 1.0, 0.0, 0.05)])
def test_gaussian_plans_have_the_closed_form(s, t, mean, epsilon):
    """Cross-covariance, map and value of Janati et al. 2020 (arXiv 2006.02572)."""
    (x, a), (y, b) = grid_gaussian(0.0, s), grid_gaussian(mean, t)
    output = entropic_transport(x, y, epsilon, a, b, tolerance=1e-10)
    cross = (math.sqrt(4 * s**2 * t**2 + epsilon**2 / 4) - epsilon / 2) / 2
    plan = output.plan
    assert (plan * x * (y.T - mean)).sum().item() == pytest.approx(cross, abs=1e-6)
    middle = slice(150, 350)
    expected = mean + cross / s**2 * x
    torch.testing.assert_close(output.barycentric_map()[middle], expected[middle], rtol=0, atol=1e-5)
    entropy = -0.5 * math.log(1 - (cross / (s * t)) ** 2)
    value = mean**2 + s**2 + t**2 - 2 * cross + epsilon * entropy
    assert output.cost.item() == pytest.approx(value, abs=1e-6)
    assert output.transport_cost.item() == pytest.approx(mean**2 + s**2 + t**2 - 2 * cross, abs=1e-6)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("epsilon", [0.3, 3.0])
def test_plan_is_the_dense_one(epsilon, weighted):
    x, y = cloud(25), cloud(18, seed=1) + 1
    a, b = (torch.rand(k, generator=seeded(k), dtype=torch.float64) + 0.1 for k in (25, 18))
    a, b = (a / a.sum(), b / b.sum()) if weighted else (torch.full_like(a, 1 / 25), torch.full_like(b, 1 / 18))
    output = entropic_transport(x, y, epsilon, a, b, tolerance=1e-10)
    torch.testing.assert_close(output.plan, dense_plan(torch.cdist(x, y).square(), epsilon, a, b), rtol=0, atol=1e-7)


@pytest.mark.parametrize("rho", [0.5, 5.0])
def test_relaxed_marginals_are_the_dense_ones(rho):
    x, y, epsilon = cloud(25), cloud(18, seed=1) + 1, 0.8
    a, b = torch.full((25,), 1 / 25, dtype=torch.float64), torch.full((18,), 1 / 18, dtype=torch.float64)
    output = entropic_transport(x, y, epsilon, rho=rho, tolerance=1e-9)
    expected = dense_plan(torch.cdist(x, y).square(), epsilon, a, b, shares=[rho / (rho + epsilon)] * 2)
    torch.testing.assert_close(output.plan, expected, rtol=0, atol=1e-8)


def test_on_a_line_small_epsilon_sorts():
    x, y = cloud(40, 1), cloud(40, 1, seed=1) * 2
    plan = entropic_transport(x, y, 1e-3, tolerance=1e-6, max_iterations=20_000).plan
    order = torch.empty(40, dtype=torch.long)
    order[x[:, 0].argsort()] = y[:, 0].argsort()
    moved = (x - y[order]).square().mean().item()
    assert (plan * torch.cdist(x, y).square()).sum().item() == pytest.approx(moved, abs=1e-3 * math.log(40))


def test_invariances():
    x, y, epsilon = cloud(20), cloud(15, seed=1) + 1, 0.7
    plan = entropic_transport(x, y, epsilon, tolerance=1e-9).plan
    shift, mix = cloud(1, seed=2) * 100, torch.randperm(20, generator=seeded(3))
    rotation = torch.linalg.qr(cloud(3, seed=4))[0]
    for name, other in {
        "translation of both": entropic_transport(x + shift, y + shift, epsilon, tolerance=1e-9).plan,
        "translation of one": entropic_transport(x, y + shift, epsilon, tolerance=1e-9).plan,
        "rotation": entropic_transport(x @ rotation, y @ rotation, epsilon, tolerance=1e-9).plan,
        "scale": entropic_transport(1e3 * x, 1e3 * y, 1e6 * epsilon, tolerance=1e-9).plan,
        "swap": entropic_transport(y, x, epsilon, tolerance=1e-9).plan.T,
        "permutation": entropic_transport(x[mix], y, epsilon, tolerance=1e-9).plan[mix.argsort()],
    }.items():
        torch.testing.assert_close(other, plan, rtol=0, atol=1e-8, msg=name)


def test_duplicates_share_their_mass_and_zeros_have_none():
    x, y = cloud(20), cloud(15, seed=1)
    plan = entropic_transport(x, y, 0.7, tolerance=1e-9).plan
    weights = torch.full((21,), 1 / 20, dtype=torch.float64)
    weights[0] = weights[20] = 1 / 40
    doubled = entropic_transport(torch.cat([x, x[:1]]), y, 0.7, weights, tolerance=1e-9).plan
    torch.testing.assert_close(doubled[0] + doubled[20], plan[0], rtol=0, atol=1e-9)
    weights[0], weights[20] = 0.0, 1 / 20
    moved = entropic_transport(torch.cat([x, x[:1]]), y, 0.7, weights, tolerance=1e-9).plan
    torch.testing.assert_close(moved[20], plan[0], rtol=0, atol=1e-9)
    assert moved[0].max() < 1e-200


def test_batches_are_single_problems():
    x, y = torch.stack([cloud(20, seed=s) for s in range(3)]), torch.stack([cloud(15, seed=s + 9) for s in range(3)])
    epsilon = torch.tensor([0.1, 1.0, 10.0], dtype=torch.float64)
    together = entropic_transport(x, y, epsilon, tolerance=1e-9).plan
    for i in range(3):
        alone = entropic_transport(x[i], y[i], epsilon[i].item(), tolerance=1e-9).plan
        torch.testing.assert_close(together[i], alone, rtol=0, atol=1e-8)


def test_gradients_are_those_of_finite_differences():
    x, y = cloud(6, 2), cloud(5, 2, seed=1)
    target = cloud(6, 2, seed=2)

    def loss(x):
        output = entropic_transport(x, y, 0.5, tolerance=1e-12, differentiable=True)
        return (output.barycentric_map() * target).sum() + output.cost.sum()

    point = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(point), point)
    direction, h = cloud(6, 2, seed=3), 1e-5
    difference = (loss(x + h * direction) - loss(x - h * direction)) / (2 * h)
    torch.testing.assert_close((gradient * direction).sum(), difference.detach(), rtol=1e-5, atol=1e-7)


def test_operators_agree_with_points():
    side = torch.arange(6, dtype=torch.float64)
    points = torch.cartesian_prod(side, side)
    a = torch.rand(36, generator=seeded(1), dtype=torch.float64)
    b = torch.rand(36, generator=seeded(2), dtype=torch.float64)
    a, b = a / a.sum(), b / b.sum()
    expected = entropic_transport(points, points, 2 * 1.3**2, a, b, tolerance=1e-9).plan
    for operator in (DirectKernel(points, points, epsilon=1.3), GridKernel((6, 6), epsilon=1.3)):
        torch.testing.assert_close(sinkhorn(operator, a, b, tolerance=1e-9).plan.to(expected), expected, rtol=0, atol=1e-7)


def test_a_warm_start_is_nearly_free():
    x, y = cloud(400, 16), cloud(400, 16, seed=1)
    cold = entropic_transport(x, y, 2.0, tolerance=1e-6)
    warm = entropic_transport(x, y, 2.0, tolerance=1e-6, init=cold.potentials)
    assert warm.iterations == 1 and warm.kernel_applications < cold.kernel_applications


def test_the_debiased_map_of_a_cloud_to_itself_is_the_identity():
    x = cloud(50, 2)
    torch.testing.assert_close(debiased_map(x, x, 0.5), x, rtol=0, atol=2e-3)


def test_an_unfinished_solution_says_so():
    with pytest.warns(UserWarning, match="marginal"):
        output = entropic_transport(cloud(50), cloud(50, seed=1), 1e-3, tolerance=1e-9, max_iterations=3)
    assert not output.converged


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 15),
    m=st.integers(1, 15),
    log_epsilon=st.floats(-6, 3),
    far=st.sampled_from([0.0, 1.0, 1e4]),
    single=st.booleans(),
    duplicates=st.booleans(),
    zeros=st.booleans(),
    seed=st.integers(0, 1000),
)
@pytest.mark.filterwarnings("ignore:.*marginal.*:UserWarning")
def test_never_nan(n, m, log_epsilon, far, single, duplicates, zeros, seed):
    x, y = cloud(n, 2, seed), cloud(m, 2, seed + 1) + far
    if duplicates:
        x[:] = x[0]
    b = torch.ones(m, dtype=torch.float64)
    if zeros and m > 1:
        b[0] = 0
    x, y = (x.float(), y.float()) if single else (x, y)
    mean_cost = torch.cdist(x, y).square().mean().item() or 1.0
    output = entropic_transport(x, y, 10**log_epsilon * mean_cost, b=b / b.sum(), tolerance=1e-3, max_iterations=200)
    assert output.f.isfinite().all() and output.g.isfinite().all()
    assert output.plan.isfinite().all() and output.cost.isfinite().all()
    assert output.plan.sum().item() == pytest.approx(1, abs=0.05) or not output.converged
