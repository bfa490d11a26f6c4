"""Sinkhorn through kernel operators: grids, low rank, other kernels."""

import pytest
import torch
from conftest import seeded
from oracles import cloud

from atlas_diffusers.kernels import DirectKernel, GridKernel, KernelOperator, NystromKernel, RandomFeatureKernel
from atlas_diffusers.transport import entropic_transport, sinkhorn


def blobs(size, seed):
    """A positive picture of total 1, (size²,)."""
    centres = torch.rand(4, 2, generator=seeded(seed), dtype=torch.float64) * size
    points = torch.cartesian_prod(*[torch.arange(size, dtype=torch.float64)] * 2)
    picture = (-torch.cdist(points, centres).square() / size).exp().sum(1) + 1e-4
    return picture / picture.sum()


def test_gaussian_direct_kernel_is_the_transport_of_its_points():
    x, y = cloud(30), cloud(20, seed=1)
    through, direct = sinkhorn(DirectKernel(x, y, epsilon=0.7)), entropic_transport(x, y, 2 * 0.7**2)
    assert torch.equal(through.f, direct.f) and torch.equal(through.plan, direct.plan)
    assert through.epsilon.item() == pytest.approx(0.98)
    batch = sinkhorn(DirectKernel(torch.stack([x, x + 1]), y, epsilon=0.7), tolerance=1e-7)
    exact = entropic_transport(x, y, 2 * 0.7**2, tolerance=1e-7)
    torch.testing.assert_close(batch.plan[1], exact.plan, rtol=0, atol=1e-6)


@pytest.mark.parametrize("bandwidth", [4.0, 1.0, 0.2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_grids_agree_with_their_points(bandwidth, dtype):
    """Down to a bandwidth where the kernel of distant pixels is 0, and products in the log domain take over."""
    size = 12
    points, a, b = torch.cartesian_prod(*[torch.arange(size, dtype=torch.float64)] * 2), blobs(size, 1), blobs(size, 2)
    operator = GridKernel((size, size), epsilon=bandwidth, dtype=dtype)
    output = sinkhorn(operator, a, b, tolerance=1e-7, max_iterations=4000)
    expected = entropic_transport(points, points, 2 * bandwidth**2, a, b, tolerance=1e-7, max_iterations=4000)
    assert output.converged and expected.converged
    assert output.cost.item() == pytest.approx(expected.cost.item(), rel=1e-6)
    assert output.transport_cost.item() == pytest.approx(expected.transport_cost.item(), rel=1e-5)
    torch.testing.assert_close(output.barycentric_map().double(), expected.barycentric_map(), rtol=0, atol=1e-3)
    torch.testing.assert_close(output.marginals[0], a, rtol=0, atol=1e-7)
    torch.testing.assert_close(output.marginals[1], b, rtol=0, atol=1e-12)


def test_black_pixels():
    size, (a, b) = 16, (blobs(16, 1), blobs(16, 2))
    a, b = (torch.where(w > w.mean(), w, 0) for w in (a, b))
    a, b = a / a.sum(), b / b.sum()
    for bandwidth in (2.0, 0.3):
        output = sinkhorn(GridKernel((size, size), epsilon=bandwidth), a, b, tolerance=1e-6, max_iterations=4000)
        assert output.converged and output.f.isfinite().all() and output.g.isfinite().all()
        assert (output.marginals[0] - a).abs().sum() <= 1.1e-6


@pytest.mark.parametrize("kernel, unit", [("laplacian", 0.4), ("cauchy", 1.0)])
def test_other_kernels_have_their_own_cost(kernel, unit):
    x, y = cloud(25), cloud(18, seed=1)
    operator = DirectKernel(x, y, kernel=kernel, epsilon=0.4)
    output = sinkhorn(operator, tolerance=1e-10)
    assert output.epsilon.item() == unit
    scaling, matrix = torch.ones(18, dtype=torch.float64), operator.dense()
    for _ in range(3000):
        other = 1 / 25 / (matrix @ scaling)
        scaling = 1 / 18 / (matrix.T @ other)
    plan = other[:, None] * matrix * scaling
    torch.testing.assert_close(output.plan, plan, rtol=0, atol=1e-10)
    cost = torch.cdist(x, y) if kernel == "laplacian" else -matrix.log()
    assert output.transport_cost.item() == pytest.approx((plan * cost).sum().item(), rel=1e-8)
    torch.testing.assert_close(output.project(y), 25 * plan @ y, rtol=0, atol=1e-7)


def test_unbalanced_through_an_operator_is_that_of_the_points():
    points, a, b = torch.cartesian_prod(*[torch.arange(6, dtype=torch.float64)] * 2), blobs(6, 1), 2 * blobs(6, 2)
    output = sinkhorn(GridKernel((6, 6), epsilon=1.2), a, b, rho=(3.0, None), tolerance=1e-9)
    expected = entropic_transport(points, points, 2 * 1.2**2, a, b, rho=(3.0, None), tolerance=1e-9)
    assert output.cost.item() == pytest.approx(expected.cost.item(), rel=1e-8)
    torch.testing.assert_close(output.f, expected.f, rtol=0, atol=1e-6)


def test_low_rank_kernels():
    x, y = cloud(300, 2), cloud(250, 2, seed=1)
    exact = entropic_transport(x, y, 2 * 3.0**2, tolerance=1e-8).barycentric_map()
    nystrom = sinkhorn(NystromKernel(x, y, epsilon=3.0, num_landmarks=100), tolerance=1e-8)
    assert nystrom.converged
    for mapped in (nystrom.project(y), nystrom.barycentric_map()):
        torch.testing.assert_close(mapped, exact, rtol=0, atol=1e-4)
    g = entropic_transport(x, y, 18.0, tolerance=1e-8).g
    torch.testing.assert_close(nystrom.g - nystrom.g.mean(), g - g.mean(), rtol=0, atol=1e-3)


def test_negative_entries_are_refused():
    x, y = cloud(40), cloud(30, seed=1)
    for operator in (
        NystromKernel(x, y, epsilon=0.05, num_landmarks=5),
        RandomFeatureKernel(x, y, epsilon=0.3, features="cosine"),
    ):
        if operator.is_positive:
            continue
        with pytest.raises(ValueError, match="negative"):
            sinkhorn(operator)
    assert not RandomFeatureKernel(x, y, epsilon=0.3, features="cosine").is_positive


def test_an_operator_without_logarithmic_products_says_when_its_kernel_is_too_narrow():
    class Narrow(KernelOperator):
        def __init__(self, matrix):
            super().__init__(tuple(matrix.shape), matrix.dtype, matrix.device)
            self.matrix = matrix

        def matvec(self, v):
            return self.matrix @ v

        def rmatvec(self, u):
            return self.matrix.T @ u

    distances = torch.cdist(cloud(20), cloud(20, seed=1) + 3).square()
    with pytest.warns(UserWarning, match="Narrow says no cost_unit"):
        broad = sinkhorn(Narrow((-distances / 2).exp()), tolerance=1e-9)
    assert broad.converged and broad.epsilon.item() == 1
    narrow = Narrow((-distances / 1e-3).exp())
    narrow.cost_unit = 1e-3
    with pytest.raises(ValueError, match="products with Narrow are zero or negative"):
        sinkhorn(narrow)


def test_warm_start_and_blind_mode():
    a, b = blobs(10, 1), blobs(10, 2)
    operator = GridKernel((10, 10), epsilon=1.0)
    cold = sinkhorn(operator, a, b, tolerance=1e-7)
    warm = sinkhorn(operator, a, b, tolerance=1e-7, init=(None, cold.g))
    assert warm.iterations == 1 < cold.iterations
    blind = sinkhorn(operator, a, b, tolerance=1e-7, max_iterations=2 * cold.iterations, check_every=None)
    torch.testing.assert_close(blind.f - blind.f.mean(), cold.f - cold.f.mean(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("scale", [1e3, 1e6, 1e12])
@pytest.mark.parametrize("make", [
    lambda: GridKernel((5, 6), epsilon=1.0),
    lambda: DirectKernel(cloud(30).float(), cloud(30, seed=1).float(), kernel="cauchy"),
    lambda: DirectKernel(cloud(30), cloud(30, seed=1), kernel="laplacian"),
], ids=["grid", "cauchy", "laplacian"])  # fmt: skip
def test_far_starts_end_in_the_same_plan(make, scale):
    operator, start = make(), scale * torch.randn(30, generator=seeded(3), dtype=torch.float64)
    expected = sinkhorn(operator, tolerance=1e-5).plan
    for init in ((None, start), (start, start.flip(0))):
        output = sinkhorn(operator, tolerance=1e-5, init=init)
        assert output.converged and output.measured_error.item() <= 2e-5
        torch.testing.assert_close(output.plan, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "options, match",
    [
        ({"differentiable": True}, "differentiable=True needs a gaussian DirectKernel, not GridKernel"),
        ({"a": torch.ones(5)}, r"weights a must have shape \(16,\), got \(5,\)"),
        ({"tolerance": 0.0}, "tolerance=0.0"),
    ],
)
def test_bad_input(options, match):
    with pytest.raises(ValueError, match=match):
        sinkhorn(GridKernel((4, 4)), **options)


def test_the_value_of_a_constant_kernel():
    """K = 1 couples independently, and the cost is the mean squared distance."""
    operator = GridKernel((3, 3), epsilon=1e8)
    output = sinkhorn(operator, tolerance=1e-12)
    torch.testing.assert_close(output.plan.double(), torch.full((9, 9), 1 / 81, dtype=torch.float64), rtol=1e-6, atol=0)
    assert output.transport_cost.item() == pytest.approx(2 * 2 * 2 / 3, rel=1e-4)
