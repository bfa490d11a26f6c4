"""Ways in for researchers: NumPy arrays, cost matrices, pictures; and what is said where input does not fit."""

import numpy as np
import pytest
import torch
from conftest import seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import cloud, dense_plan, squared_distances

from atlas_diffusers.bridges import DynamicBridge
from atlas_diffusers.kernels import KernelFunction, KernelOperator, make_kernel_operator, register_kernel
from atlas_diffusers.kernels.functions import KERNELS
from atlas_diffusers.transport import debiased_map, entropic_transport, richardson_map, sinkhorn, sinkhorn_divergence

X, Y = cloud(20), cloud(15, seed=1) + 1


def uniform(n):
    return torch.full((n,), 1 / n, dtype=torch.float64)


@pytest.mark.parametrize("epsilon", [5.0, 0.5, 0.03])
@pytest.mark.parametrize("max_bytes", [2**31, 1000])
def test_a_matrix_of_squared_distances_is_its_points(epsilon, max_bytes):
    matrix = entropic_transport(cost=squared_distances(X, Y), epsilon=epsilon, tolerance=1e-9, max_bytes=max_bytes)
    points = entropic_transport(X, Y, epsilon, tolerance=1e-9)
    torch.testing.assert_close(matrix.plan, points.plan, rtol=0, atol=1e-9)
    assert matrix.cost.item() == pytest.approx(points.cost.item(), rel=1e-9)
    assert matrix.transport_cost.item() == pytest.approx(points.transport_cost.item(), rel=1e-7)
    torch.testing.assert_close(matrix.project(Y), points.barycentric_map(), rtol=0, atol=1e-7)


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 12),
    m=st.integers(1, 12),
    exponent=st.floats(-1.5, 2),
    offset=st.sampled_from([0.0, -7.0, 1e3]),
    single=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_matrix_has_the_dense_plan(n, m, exponent, offset, single, seed):
    cost = torch.rand(n, m, generator=seeded(seed), dtype=torch.float64) + offset
    a, b = (torch.rand(k, generator=seeded(k), dtype=torch.float64) + 0.1 for k in (n, m))
    a, b = a / a.sum(), b / b.sum()
    cost = cost.float() if single else cost
    output = entropic_transport(cost=cost, epsilon=10**exponent, a=a, b=b, tolerance=1e-8, max_iterations=5000)
    expected = dense_plan(cost.double(), 10**exponent, a, b, iterations=20_000)
    assert output.plan.dtype is cost.dtype
    torch.testing.assert_close(output.plan.double(), expected, rtol=0, atol=1e-6)


def test_small_epsilon_is_the_assignment():
    from scipy.optimize import linear_sum_assignment

    cost = torch.rand(60, 60, generator=seeded(3), dtype=torch.float64)
    exact = cost[linear_sum_assignment(cost.numpy())].mean().item()
    output = entropic_transport(cost=cost, epsilon=1e-3, tolerance=1e-6, max_iterations=20_000)
    assert output.converged and -1e-6 <= output.transport_cost.item() - exact <= 1e-3 * np.log(60)


def test_batches_weights_and_gradients_of_matrices():
    cost = torch.rand(2, 7, 6, generator=seeded(4), dtype=torch.float64)
    b = torch.tensor([0, 1, 1, 1, 1, 1], dtype=torch.float64) / 5
    cost[:, :, 0] = 1e9  # a column without weight disturbs nothing
    together = entropic_transport(cost=cost, epsilon=torch.tensor([0.1, 1.0]), b=b, tolerance=1e-9)
    for member, epsilon in enumerate((0.1, 1.0)):
        expected = dense_plan(cost[member, :, 1:], epsilon, uniform(7), uniform(5))
        torch.testing.assert_close(together.plan[member, :, 1:], expected, rtol=0, atol=1e-8)
    point = cost[1, :, 1:].clone().requires_grad_()
    output = entropic_transport(cost=point, epsilon=0.7, tolerance=1e-12, differentiable=True)
    torch.testing.assert_close(torch.autograd.grad(output.cost, point)[0], output.plan.detach(), rtol=0, atol=1e-10)
    direction = torch.randn(7, 5, generator=seeded(5), dtype=torch.float64)

    def loss(c):
        return entropic_transport(cost=c, epsilon=0.7, tolerance=1e-12, differentiable=True).plan.square().sum()

    (gradient,) = torch.autograd.grad(loss(point), point)
    difference = (loss(point.detach() + 1e-5 * direction) - loss(point.detach() - 1e-5 * direction)) / 2e-5
    assert (gradient * direction).sum().item() == pytest.approx(difference.item(), rel=1e-5)


def test_arrays_are_answered_with_arrays():
    x, y = X.numpy(), Y.numpy()
    weights = np.arange(1.0, 16.0)
    arrays = entropic_transport(x, y, 0.7, None, weights / weights.sum(), tolerance=1e-9)
    tensors = entropic_transport(X, Y, 0.7, None, torch.from_numpy(weights / weights.sum()), tolerance=1e-9)
    for name in ("f", "g", "plan", "cost", "transport_cost", "row_error", "effective_size"):
        value = getattr(arrays, name)
        assert isinstance(value, np.ndarray | np.float64)
        np.testing.assert_array_equal(value, getattr(tensors, name).numpy())
    assert isinstance(arrays.marginals, tuple) and isinstance(arrays.marginals[0], np.ndarray)
    np.testing.assert_array_equal(arrays.barycentric_map(x[:3]), tensors.barycentric_map(X[:3]).numpy())
    np.testing.assert_array_equal(arrays.project(y), tensors.project(Y).numpy())
    assert arrays.converged is True and arrays.iterations == tensors.iterations
    again = entropic_transport(x, y, 0.7, None, weights / weights.sum(), tolerance=1e-8, init=arrays.potentials)
    assert again.iterations == 1
    matrix = entropic_transport(cost=squared_distances(X, Y).numpy(), epsilon=0.7, tolerance=1e-9)
    np.testing.assert_allclose(matrix.plan, entropic_transport(X, Y, 0.7, tolerance=1e-9).plan.numpy(), atol=1e-9)
    assert x[::-1].strides[0] < 0 and entropic_transport(x[::-1], y, 0.7).plan.shape == (20, 15)


def test_maps_and_bridges_of_arrays():
    x, y = X.numpy(), Y.numpy()
    np.testing.assert_array_equal(debiased_map(x, y, 0.7), debiased_map(X, Y, 0.7).numpy())
    np.testing.assert_array_equal(richardson_map(x, y, 0.7).points, richardson_map(X, Y, 0.7).points.numpy())
    assert sinkhorn_divergence(x, y, 0.7) == sinkhorn_divergence(X, Y, 0.7).item()
    arrays, tensors = DynamicBridge(x, y, 0.6), DynamicBridge(X, Y, 0.6)
    for name in ("drift", "endpoint"):
        np.testing.assert_array_equal(getattr(arrays, name)(x[:4], 0.3), getattr(tensors, name)(X[:4], 0.3).numpy())
    np.testing.assert_array_equal(arrays.sample(3, seeded(1)), tensors.sample(3, seeded(1)).numpy())
    assert isinstance(arrays.transport.plan, np.ndarray)


def test_a_bridge_between_pictures_has_pictures_on_its_paths():
    x, y = torch.randn(5, 3, 2, 2, generator=seeded(1)), torch.randn(6, 3, 2, 2, generator=seeded(2))
    pictures, points = DynamicBridge(x, y, 1.0), DynamicBridge(x.flatten(1), y.flatten(1), 1.0)
    path = pictures.sample(4, seeded(3))
    assert path.shape == (5, 5, 3, 2, 2)
    torch.testing.assert_close(path.flatten(2), points.sample(4, seeded(3)))


@pytest.mark.parametrize("arguments, options, match", [
    ((X.numpy(), Y, 1.0), {}, "as tensors or as arrays, not as both: x is a ndarray, y is a Tensor"),
    ((X.tolist(), Y, 1.0), {}, "points x must be a torch tensor or a numpy array, got list"),
    ((X.numpy(), Y.numpy().astype(int), 1.0), {}, "both be float32 or both float64; got torch.float64 and torch.int64"),
    ((X, Y), {}, "epsilon is missing"),
    ((X, None, 1.0), {}, r"expected points x and y, or a matrix `cost`; got \['x'\]"),
    ((X, Y, 1.0), {"cost": torch.zeros(3, 3)}, r"got \['x', 'y', 'cost'\]"),
    ((None, None, 1.0), {}, "got neither"),
    ((), {"cost": torch.zeros(3), "epsilon": 1.0}, r"cost must be \(..., n, m\), not empty, float32 or float64; got .*\(3,\)"),
    ((), {"cost": [[1.0]], "epsilon": 1.0}, "cost must be a torch tensor or a numpy array, got list"),
    ((), {"cost": torch.full((3, 3), torch.nan), "epsilon": 1.0}, "cost must be finite"),
    ((torch.zeros(4, 3, 8, 8), torch.zeros(5, 3, 8, 8), 1.0), {}, r"couple pictures \(n, c, h, w\) .* x.flatten\(1\)"),
    ((torch.zeros(4, 3, 8, 8), torch.zeros(4, 3, 8, 8), 1.0), {}, r"\(4, 3, 8, 8\) have four dimensions"),
], ids=str)  # fmt: skip
def test_what_does_not_fit_is_named(arguments, options, match):
    with pytest.raises(ValueError, match=match):
        entropic_transport(*arguments, **options)


@pytest.mark.parametrize("x, y, match", [
    (X.numpy(), Y, "as tensors or as arrays, not as both: ndarray and Tensor"),
    (X.tolist(), Y.tolist(), "of equal points; got list and list"),
    (X, Y[:, :2], r"of equal points; got \(20, 3\) and \(15, 2\)"),
])  # fmt: skip
def test_clouds_of_a_bridge_that_do_not_fit_are_named(x, y, match):
    with pytest.raises(ValueError, match=match):
        DynamicBridge(x, y, 1.0)


def test_new_points_need_a_cost_of_points():
    output = entropic_transport(cost=squared_distances(X, Y), epsilon=1.0)
    with pytest.raises(ValueError, match="has no points"):
        output.barycentric_map()


def test_operators_say_the_unit_of_their_cost():
    units = {"gaussian": 2 * 0.7**2, "laplacian": 0.7, "cauchy": 1.0}
    for kernel, unit in units.items():
        operator = make_kernel_operator(X, Y, kernel, 0.7)
        assert operator.cost_unit == operator.T.cost_unit == pytest.approx(unit)
        assert torch.equal(operator.points[1], Y) and torch.equal(operator.T.points[0], Y)
    assert make_kernel_operator(X, Y, "gaussian", 0.7, scale_factors=[1.0, 2.0]).cost_unit == 1.0
    assert KernelOperator.has_squared_distances.fget(operator) is False


def test_a_unit_that_is_not_said_is_warned_of(monkeypatch):
    monkeypatch.setattr("atlas_diffusers.kernels.functions.KERNELS", dict(KERNELS))
    register_kernel(KernelFunction("quartic", lambda squared, epsilon: -squared.square() / epsilon**4))
    operator = make_kernel_operator(X, Y, "quartic", 3.0)
    with pytest.warns(UserWarning, match="DirectKernel says no cost_unit: the cost of transport is −log K, and ε is 1"):
        output = sinkhorn(operator, tolerance=1e-9)
    assert output.epsilon.item() == 1
    expected = dense_plan(squared_distances(X, Y).square() / 81, 1.0, uniform(20), uniform(15))
    torch.testing.assert_close(output.plan, expected, rtol=0, atol=1e-9)
