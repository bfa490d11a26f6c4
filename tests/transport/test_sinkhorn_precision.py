"""The error that is promised is the error of the true plan, in float64, whatever the precision of the solver."""

import math
import warnings

import pytest
import torch
from conftest import seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from atlas_diffusers.transport import entropic_transport


def rings(n, m, shift=0.0):
    """Points on eight blobs around a disc: (n, 2) and (m, 2), far from Gaussian."""
    generator = seeded(n)
    angle = torch.randint(0, 8, (n,), generator=generator) * math.pi / 4
    x = 5 * torch.stack([angle.cos(), angle.sin()], 1) + 0.3 * torch.randn(n, 2, generator=generator)
    y = torch.rand(m, 2, generator=generator) * 3 + shift
    return x.double(), y.double()


def mean_cost(x, y):
    return ((x - x.mean(0)).square().sum(1).mean() + (y - y.mean(0)).square().sum(1).mean()).item()


def true_errors(output, x, y):
    """L1 errors of rows and columns of the plan that the potentials define, dense in float64."""
    x, y = x.double(), y.double()
    log_plan = (output.f[:, None] + output.g - torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square())
    plan = output.a[:, None] * output.b * (log_plan / output.epsilon).exp()
    return (plan.sum(1) - output.a).abs().sum().item(), (plan.sum(0) - output.b).abs().sum().item()


@pytest.mark.parametrize("relative", [3.0, 0.3, 0.03, 0.01, 1e-3, 1e-4])
@pytest.mark.parametrize("dtype, tolerance", [(32, 1e-3), (32, 1e-5), (64, 1e-3), (64, 1e-7)])
def test_error_is_the_true_one(relative, tolerance, dtype):
    dtype = {32: torch.float32, 64: torch.float64}[dtype]
    x, y = (z.to(dtype) for z in rings(90, 70))
    output = entropic_transport(x, y, relative * mean_cost(x, y), tolerance=tolerance, max_iterations=4000)
    rows, columns = true_errors(output, x, y)
    assert output.converged
    assert rows <= 1.05 * tolerance and columns <= 0.2 * tolerance
    assert rows == pytest.approx(output.row_error.item(), abs=0.2 * tolerance)


@pytest.mark.parametrize("dimension", [3, 300])
def test_error_is_the_true_one_in_any_dimension(dimension):
    x = torch.randn(60, dimension, generator=seeded(1))
    y = torch.randn(80, dimension, generator=seeded(2)) * torch.linspace(0.2, 1.5, dimension) + 1
    for relative, tolerance in ((1.0, 1e-6), (0.05, 1e-6), (0.05, 1e-4)):
        output = entropic_transport(x, y, relative * mean_cost(x, y), tolerance=tolerance)
        assert max(true_errors(output, x, y)) <= 1.05 * tolerance


def test_far_apart_clouds_in_single_precision():
    x, y = (z.float() for z in rings(60, 60, shift=1e4))
    output = entropic_transport(x, y, 0.1 * mean_cost(x, y), tolerance=1e-4)
    assert max(true_errors(output, x, y)) <= 1.1e-4
    near = entropic_transport(x, y - y.mean(0), 0.1 * mean_cost(x, y), tolerance=1e-4)
    torch.testing.assert_close(output.plan, near.plan, rtol=0, atol=1e-5)


def test_far_points_in_single_precision_keep_their_scale():
    x, y = (1e15 * z.float() for z in rings(30, 30))
    output = entropic_transport(x, y, 0.1 * mean_cost(x.double(), y.double()), tolerance=1e-4)
    small = entropic_transport(x / 1e15, y / 1e15, 0.1 * mean_cost(*rings(30, 30)), tolerance=1e-4)
    torch.testing.assert_close(output.plan, small.plan, rtol=0, atol=1e-5)


@pytest.mark.parametrize("relative", [1e-2, 1e-3, 1e-4])
def test_cost_bounds_the_unregularised_one(relative):
    """0 ≤ <P, C> − EMD ≤ ε log n for uniform weights."""
    x, y = rings(64, 64)
    cost = torch.cdist(x, y).square()
    rows, columns = linear_sum_assignment(cost.numpy())
    exact = cost[rows, columns].mean().item()
    epsilon = relative * mean_cost(x, y)
    excess = entropic_transport(x, y, epsilon, tolerance=1e-7, max_iterations=10_000).transport_cost.item() - exact
    assert -1e-6 <= excess <= epsilon * math.log(64)


def test_large_epsilon_gives_the_product_plan():
    x, y = rings(20, 30)
    plan = entropic_transport(x, y, 1e6 * mean_cost(x, y), tolerance=1e-9).plan
    torch.testing.assert_close(plan, torch.full_like(plan, 1 / 600), rtol=1e-5, atol=0)


def test_weights_of_very_different_size():
    x, y = rings(40, 30)
    weights = torch.logspace(0, -40, 40, dtype=torch.float64)
    weights = weights / weights.sum()
    output = entropic_transport(x.float(), y.float(), 0.1 * mean_cost(x, y), weights, tolerance=1e-4)
    assert max(true_errors(output, x.float(), y.float())) <= 1.1e-4
    assert output.f.isfinite().all()


def test_one_point_takes_everything():
    x, y = rings(1, 30)
    output = entropic_transport(x, y, 0.5)
    torch.testing.assert_close(output.plan, torch.full((1, 30), 1 / 30, dtype=torch.float64))
    torch.testing.assert_close(output.barycentric_map(), y.mean(0, keepdim=True))
    torch.testing.assert_close(entropic_transport(y, x, 0.5).plan, torch.full((30, 1), 1 / 30, dtype=torch.float64))
    assert entropic_transport(x, x, 1e-9).transport_cost.item() == 0


def test_an_unreachable_tolerance_warns_with_the_error():
    x, y = rings(50, 50)
    with pytest.warns(UserWarning, match=r"marginal error is \d\.\d+e-\d+, tolerance 1e-12") as caught:
        output = entropic_transport(x, y, 1e-2, tolerance=1e-12, max_iterations=5)
    assert caught[0].filename == __file__
    assert not output.converged and output.f.isfinite().all()
    assert f"{output.row_error.item():.2e}" in str(caught[0].message)


def test_iterations_do_not_lose_what_was_reached():
    """The error returned at a limit falls as the limit grows, restarts or not."""
    x, y = rings(80, 80)
    errors = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for limit in (2, 5, 10, 20, 40):
            output = entropic_transport(x, y, 0.01 * mean_cost(x, y), tolerance=1e-10, max_iterations=limit)
            assert true_errors(output, x, y)[0] == pytest.approx(output.row_error.item(), rel=1e-3)
            errors.append(output.row_error.item())
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-2 * errors[0]


def solve(x, y, epsilon, **options):
    """The output, and the warnings of the call."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        output = entropic_transport(x, y, epsilon, **options)
    return output, [str(warning.message) for warning in caught]


def plan_error(output):
    """The larger L1 error of the marginals of the plan that was returned."""
    plan = output.plan.double()
    return max((plan.sum(1) - output.a).abs().sum().item(), (plan.sum(0) - output.b).abs().sum().item())


@settings(max_examples=30, deadline=None)
@given(exponent=st.floats(-16, -8), seed=st.integers(0, 99), tolerance=st.sampled_from([1e-3, 1e-4, 1e-6]))
def test_the_error_of_a_tiny_epsilon_is_that_of_the_plan(exponent, seed, tolerance):
    """Where float64 potentials do not resolve ε, the output says so instead of the error that the iteration saw."""
    x, y = (torch.randn(n, 2, generator=seeded(seed + n), dtype=torch.float64) / 2 for n in (12, 9))
    output, messages = solve(x, y, 10**exponent, tolerance=tolerance, max_iterations=300)
    assert output.row_error.item() == pytest.approx(plan_error(output), rel=0.01, abs=0.1 * tolerance)
    assert output.converged == (not messages)


def test_used_up_precision_is_named():
    x, y = (torch.randn(n, 2, generator=seeded(n), dtype=torch.float64) / 2 for n in (40, 50))
    output, (message,) = solve(x, y, 1e-14)
    assert output.row_error.item() == pytest.approx(plan_error(output), rel=1e-6)
    assert f"has used up the precision of float64 potentials: the marginal error is {output.row_error.item():.2e}" in message
    assert solve(x, y, 1e-9)[1] == []


@pytest.mark.parametrize("scale", [1e3, 1e6, 1e9, 1e15])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("both", [False, True])
def test_far_starts_end_in_the_same_plan(scale, dtype, both):
    """Potentials beyond the range of any solution's, which left no digits for the plan."""
    x, y = (z.to(dtype) for z in rings(50, 40))
    epsilon = 0.05 * mean_cost(x, y)
    start = [scale * torch.randn(n, generator=seeded(n), dtype=torch.float64) for n in (50, 40)]
    output, messages = solve(x, y, epsilon, init=(start[0] if both else None, start[1]), tolerance=1e-5)
    assert messages == [] and plan_error(output) <= 1.1e-5 + (dtype is torch.float32) * 1e-4
    expected = entropic_transport(x, y, epsilon, tolerance=1e-5)
    torch.testing.assert_close(output.plan, expected.plan, rtol=0, atol=1e-5)
