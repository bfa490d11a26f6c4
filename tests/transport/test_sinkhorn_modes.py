"""The ways to run the solver: chunked, batched, warm, without reads by the host, with relaxed marginals."""

import math

import pytest
import torch
from conftest import seeded
from oracles import cloud, dense_plan
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from atlas_diffusers.transport import entropic_transport, extrapolate_potentials
from atlas_diffusers.transport.solver import Solver


class Reads(TorchFunctionMode):
    """Counts values that the host reads."""

    readers = ("tolist", "item", "__bool__", "__float__", "__int__", "__index__", "nonzero")
    count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count += getattr(function, "__name__", "") in self.readers
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("epsilon", [5.0, 0.5, 0.03])
@pytest.mark.parametrize("max_bytes", [1, 1500])
def test_chunks_are_the_stored_kernel(epsilon, max_bytes):
    x, y = cloud(20), cloud(25, seed=1) + 1
    stored = entropic_transport(x, y, epsilon, tolerance=1e-10)
    chunked = entropic_transport(x, y, epsilon, tolerance=1e-10, max_bytes=max_bytes)
    torch.testing.assert_close(chunked.plan, stored.plan, rtol=0, atol=1e-9)


def test_chunks_stay_within_their_memory():
    x, y = cloud(3000, 2).float(), cloud(3000, 2, seed=1).float()
    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel() * result.itemsize)
            return result

    with Largest():
        entropic_transport(x, y, 1.0, tolerance=1e-2, max_bytes=2**20)
    assert largest <= 2**20


def test_without_reads_nothing_is_read():
    x, y = cloud(30), cloud(40, seed=1)
    with Reads() as reads:
        blind = entropic_transport(x, y, 1.0, tolerance=1e-8, max_iterations=25, check_every=None)
    assert reads.count == 0
    seeing = entropic_transport(x, y, 1.0, tolerance=1e-8)
    torch.testing.assert_close(blind.plan, seeing.plan, rtol=0, atol=1e-8)
    assert blind.converged and blind.iterations == 25
    with Reads() as reads:
        entropic_transport(x, y, 1.0, tolerance=1e-8)
    assert reads.count > 0


def test_without_reads_batches_weights_and_zeros_work():
    x, y = torch.stack([cloud(30), cloud(30, seed=2)]), cloud(40, seed=1)
    b = torch.rand(40, generator=seeded(3), dtype=torch.float64)
    b[:5] = 0
    with Reads() as reads:
        blind = entropic_transport(x, y, 0.7, b=b / b.sum(), tolerance=1e-7, max_iterations=40, check_every=None)
    assert reads.count == 0
    seeing = entropic_transport(x, y, 0.7, b=b / b.sum(), tolerance=1e-7)
    torch.testing.assert_close(blind.plan, seeing.plan, rtol=0, atol=1e-7)


def test_rare_reads_give_the_same_plan():
    x, y = cloud(50), cloud(60, seed=1)
    often = entropic_transport(x, y, 0.1, tolerance=1e-8)
    rarely = entropic_transport(x, y, 0.1, tolerance=1e-8, check_every=7)
    torch.testing.assert_close(rarely.plan, often.plan, rtol=0, atol=1e-8)
    assert rarely.iterations % 7 == 0 and rarely.iterations < often.iterations + 14


def test_batches_are_loops_and_drop_what_has_converged():
    x, y = torch.stack([cloud(200, 8, seed) for seed in range(4)]), cloud(190, 8, seed=9)
    epsilon = torch.tensor([30.0, 3.0, 0.5, 0.3], dtype=torch.float64)
    together = entropic_transport(x, y, epsilon, tolerance=1e-6)
    alone = [entropic_transport(x[i], y, epsilon[i], tolerance=1e-6) for i in range(4)]
    for i in range(4):
        torch.testing.assert_close(together.plan[i], alone[i].plan, rtol=0, atol=1e-6)
        assert together.cost[i].item() == pytest.approx(alone[i].cost.item(), rel=1e-6)
    # all four members at the pace of the slowest would take 2.5 times as many products
    assert together.kernel_applications < 0.6 * 4 * 2 * max(output.kernel_applications / 2 for output in alone)


def test_leading_dimensions_come_back():
    x, y = cloud(2 * 3 * 10).view(2, 3, 10, 3), cloud(3 * 8, seed=1).view(3, 8, 3)
    output = entropic_transport(x, y, 1.0)
    shapes = {"f": (2, 3, 10), "g": (2, 3, 8), "plan": (2, 3, 10, 8), "cost": (2, 3), "transport_cost": (2, 3)}
    shapes |= {"row_error": (2, 3), "column_error": (2, 3), "effective_size": (2, 3, 10), "epsilon": (2, 3)}
    assert {name: tuple(getattr(output, name).shape) for name in shapes} == shapes
    assert output.barycentric_map().shape == (2, 3, 10, 3)
    assert output.barycentric_map(cloud(7)).shape == (2, 3, 7, 3)
    torch.testing.assert_close(output.plan[1, 2], entropic_transport(x[1, 2], y[2], 1.0).plan, rtol=0, atol=1e-5)


def test_warm_starts_save_products():
    x, y = cloud(700, 16), cloud(600, 16, seed=1)
    cold = entropic_transport(x, y, 1.5, tolerance=1e-5)
    moved = x + 0.01 * cloud(700, 16, seed=2)
    warm = entropic_transport(moved, y, 1.5, tolerance=1e-5, init=cold.potentials)
    from_columns = entropic_transport(moved, y, 1.5, tolerance=1e-5, init=(None, cold.g))
    again = entropic_transport(x, y, 1.5, tolerance=1e-5, init=(None, cold.g))
    assert warm.kernel_applications < 0.75 * cold.kernel_applications
    assert from_columns.kernel_applications < 0.75 * cold.kernel_applications
    assert again.iterations == 1
    torch.testing.assert_close(from_columns.plan, warm.plan, rtol=0, atol=1e-5)


def test_a_useless_start_does_no_harm():
    x, y = cloud(60, 2), cloud(60, 2, seed=1)
    start = (1e3 * cloud(60, 1)[:, 0], 1e3 * cloud(60, 1, seed=1)[:, 0])
    for epsilon in (1.0, 1e-2, 1e-4):
        output = entropic_transport(x, y, epsilon, tolerance=1e-5, init=start, max_iterations=4000)
        assert output.converged
        torch.testing.assert_close(output.plan, entropic_transport(x, y, epsilon, tolerance=1e-5).plan, rtol=0, atol=1e-5)


def test_potentials_are_extrapolated_linearly():
    g = [torch.tensor([1.0, 0.0]), torch.tensor([2.0, -1.0])]
    assert extrapolate_potentials([], [], 1.0) is None
    assert extrapolate_potentials(g[:1], [0.5], 9.0) is g[0]
    torch.testing.assert_close(extrapolate_potentials(g, [0.0, 2.0], 3.0), torch.tensor([2.5, -1.5]))
    torch.testing.assert_close(extrapolate_potentials(g, [0.0, 2.0], 2.0), g[1])


@pytest.mark.parametrize("rho", [(0.4, None), (None, 2.0), (0.3, 5.0), 1.0])
@pytest.mark.parametrize("totals", [(1.0, 1.0), (1.0, 1.7)])
def test_relaxed_marginals(rho, totals):
    """Against the plain log-domain iteration, each side with its own penalty."""
    x, y, epsilon = cloud(12), cloud(9, seed=1) + 1, 0.6
    a, b = (torch.rand(k, generator=seeded(k), dtype=torch.float64) + 0.1 for k in (12, 9))
    a, b = totals[0] * a / a.sum(), totals[1] * b / b.sum()
    output = entropic_transport(x, y, epsilon, a, b, rho=rho, tolerance=1e-10)
    shares = [1.0 if r is None else r / (r + epsilon) for r in (rho if isinstance(rho, tuple) else (rho, rho))]
    cost = torch.cdist(x, y).square() / epsilon
    plan = dense_plan(cost, 1.0, a, b, 2000, shares)
    torch.testing.assert_close(output.plan, plan, rtol=0, atol=1e-9)
    # duality: the optimal value is that of the primal problem
    pair = rho if isinstance(rho, tuple) else (rho, rho)
    divergence = lambda p, q: (torch.special.xlogy(p, p / q) - p + q).sum()  # noqa: E731
    value = (plan * cost).sum() * epsilon + epsilon * divergence(plan, a[:, None] * b)
    for penalty, marginal, weights in zip(pair, (plan.sum(1), plan.sum(0)), (a, b)):
        value = value if penalty is None else value + penalty * divergence(marginal, weights)
    assert output.cost.item() == pytest.approx(value.item(), rel=1e-8)
    assert output.column_error.item() < 1e-12


def test_a_large_penalty_is_a_marginal():
    x, y = cloud(30), cloud(25, seed=1)
    exact = entropic_transport(x, y, 0.5, tolerance=1e-7).plan
    relaxed = entropic_transport(x, y, 0.5, rho=1e7, tolerance=1e-7).plan
    torch.testing.assert_close(relaxed, exact, rtol=0, atol=1e-7)
    assert math.isinf(entropic_transport(x, y, 0.5).rho[0])


def test_zero_weights_are_absent_points_with_potentials():
    x, y = cloud(30), cloud(20, seed=1)
    x[:3] *= 1e6  # points without weight must not disturb the precision
    a = torch.ones(30, dtype=torch.float64)
    a[:10] = 0
    a /= a.sum()
    output = entropic_transport(x, y, 0.4, a, tolerance=1e-8)
    alone = entropic_transport(x[10:], y, 0.4, tolerance=1e-8)
    torch.testing.assert_close(output.plan[10:], alone.plan, rtol=0, atol=1e-9)
    assert output.plan[:10].max() == 0 or output.plan[:10].max() < 1e-200
    f = -0.4 * torch.logsumexp((output.g - torch.cdist(x, y).square()) / 0.4 - math.log(20), 1)
    torch.testing.assert_close(output.f[3:10], f[3:10], rtol=1e-8, atol=1e-8)
    assert output.f.isfinite().all() and output.barycentric_map().isfinite().all()
    assert output.cost.item() == pytest.approx(alone.cost.item(), rel=1e-7)


@pytest.mark.parametrize("rho", [(None, 1e5), (1e5, None), 1e6])
@pytest.mark.parametrize("constant", [0.0, 1e6, 1e12])
def test_a_start_that_is_off_by_a_constant(rho, constant):
    """Relaxed marginals fix the constant between the potentials, exactly and at once, however far the start has it."""
    x, y = torch.randn(60, 5, generator=seeded(1)), torch.randn(50, 5, generator=seeded(2))
    expected = entropic_transport(x, y, 3.0, rho=rho, tolerance=1e-6)
    start = expected.g + constant + torch.randn(50, generator=seeded(3)).double()
    output = entropic_transport(x, y, 3.0, rho=rho, tolerance=1e-6, init=(None, start))
    measured = (output.marginals[0] - output.a).abs().sum()
    torch.testing.assert_close(output.row_error, measured, rtol=0, atol=1e-4)
    torch.testing.assert_close(output.plan, expected.plan, rtol=0, atol=1e-7)
    assert output.iterations <= 20


@pytest.mark.parametrize("epsilon", [5.0, 0.3, 0.02, 1e-3])
@pytest.mark.parametrize("tolerance", [1e-3, 1e-8])
def test_the_fused_loop_of_small_problems_has_the_plan_of_the_general_one(epsilon, tolerance):
    """The general loop serves batches: a batch of one, and weights of very different size, in either precision."""
    x, y = cloud(60, 2), cloud(50, 2, seed=1) + 1
    a = torch.logspace(0, -6, 60, dtype=torch.float64)
    a = a / a.sum()
    fused = entropic_transport(x, y, epsilon, a, tolerance=tolerance, max_iterations=4000)
    general = entropic_transport(x.expand(2, -1, -1), y, epsilon, a, tolerance=tolerance, max_iterations=4000)
    assert fused.converged and general.converged
    assert (fused.marginals[0] - a).abs().sum() <= 1.05 * tolerance and fused.column_error <= 0.2 * tolerance
    # plans within the tolerance of the marginals; along Sinkhorn's slowest direction more remains the smaller ε is
    assert (fused.plan - general.plan[0]).abs().sum() <= max(4, 2 / epsilon) * tolerance
    assert fused.row_error.item() <= tolerance


@pytest.mark.parametrize("n, during", [(40, 1), (400, 2)])
def test_small_problems_take_one_thread_and_give_the_others_back(n, during, monkeypatch):
    used = []
    monkeypatch.setattr(Solver, "solve", lambda self, init: used.append(torch.get_num_threads()) or 1 / 0)
    torch.set_num_threads(2)
    try:
        with pytest.raises(ZeroDivisionError):
            entropic_transport(cloud(n), cloud(n, seed=1), 1.0)
        assert used == [during] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("rho", [0.1, 1.0])
@pytest.mark.parametrize("distance", [30.0, 1000.0])
def test_relaxed_problems_of_far_clouds_start_near_their_end(rho, distance):
    """No mass goes so far, at the cost of 2ρ for the marginals and ε for the plan: from potentials of one mean that is seen."""
    x, y = cloud(20), cloud(15, seed=1) + distance
    output = entropic_transport(x, y, 0.5, rho=rho, tolerance=1e-9)
    assert output.converged and output.iterations <= 2
    assert output.cost.item() == pytest.approx(2 * rho + 0.5, rel=1e-9)
