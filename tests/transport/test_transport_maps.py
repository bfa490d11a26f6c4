"""Maps and divergences between Gaussians, on quadrature grids, against Janati et al. 2020 (arXiv 2006.02572)."""

import math

import pytest
import torch
from conftest import seeded

from atlas_diffusers.transport import debiased_map, entropic_transport, richardson_map, sinkhorn_divergence


def gaussian(mean, std, n=301):
    """Points and weights of a quadrature of N(mean, std²) in one dimension."""
    points = torch.linspace(mean - 6 * std, mean + 6 * std, n, dtype=torch.float64)[:, None]
    weights = (-(points[:, 0] - mean).square() / (2 * std**2)).exp()
    return points, weights / weights.sum()


def correlated(covariance, mean=(0.0, 0.0), n=33):
    """The same in two dimensions, on the grid of the principal axes."""
    values, vectors = torch.linalg.eigh(torch.tensor(covariance, dtype=torch.float64))
    axis = torch.linspace(-4.5, 4.5, n, dtype=torch.float64)
    standard = torch.cartesian_prod(axis, axis)
    weights = (-standard.square().sum(1) / 2).exp()
    points = (standard * values.sqrt()) @ vectors.T + torch.tensor(mean, dtype=torch.float64)
    return points, weights / weights.sum()


def root(matrix):
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def cross_covariance(first, second, epsilon):
    """E (x − m)(y − m')ᵀ of the entropic plan."""
    half, unit = root(first), torch.eye(len(first), dtype=torch.float64)
    inner = root(4 * half @ second @ half + (epsilon / 2) ** 2 * unit)
    return half @ inner @ torch.linalg.inv(half) / 2 - epsilon / 4 * unit


def value(distance, first, second, epsilon):
    """<P, C> and <P, C> + ε KL(P | a bᵀ)."""
    cross = cross_covariance(first, second, epsilon)
    transport = distance**2 + (first + second - 2 * cross).trace()
    unit = torch.eye(len(first), dtype=torch.float64)
    entropy = -torch.logdet(unit - torch.linalg.solve(first, cross) @ torch.linalg.solve(second, cross.T)) / 2
    return transport.item(), (transport + epsilon * entropy).item()


def divergence(distance, first, second, epsilon):
    same = value(0.0, first, first, epsilon)[1] + value(0.0, second, second, epsilon)[1]
    return value(distance, first, second, epsilon)[1] - same / 2


def variance(std):
    return torch.tensor([[std**2]], dtype=torch.float64)


FIRST, SECOND = [[1.0, 0.4], [0.4, 0.5]], [[0.6, -0.3], [-0.3, 1.2]]


@pytest.mark.parametrize("epsilon", [0.2, 1.5])
def test_correlated_gaussians(epsilon):
    (x, a), (y, b) = correlated(FIRST), correlated(SECOND, mean=(1.0, -2.0))
    first, second = (torch.tensor(c, dtype=torch.float64) for c in (FIRST, SECOND))
    output = entropic_transport(x, y, epsilon, a, b, tolerance=1e-8)
    cross = cross_covariance(first, second, epsilon)
    mean = b @ y
    torch.testing.assert_close((x.T * a) @ (output.barycentric_map() - mean), cross, rtol=0, atol=2e-3)
    transport, total = value(5**0.5, first, second, epsilon)
    assert output.transport_cost.item() == pytest.approx(transport, rel=1e-3)
    assert output.cost.item() == pytest.approx(total, rel=1e-3)
    # ∇f = 2 (x − T(x)): the potential is the quadratic of the closed-form map
    slope = cross.T @ torch.linalg.inv(first)
    centred = x[a > 1e-4]
    quadratic = (centred @ (torch.eye(2, dtype=torch.float64) - slope) * centred).sum(1) - 2 * centred @ mean
    difference = output.f[a > 1e-4] - quadratic
    assert (difference - difference.mean()).abs().max() < 0.02


@pytest.mark.parametrize("s, t, mean, epsilon", [(1.0, 2.0, 0.5, 0.3), (1.0, 0.5, -1.0, 2.0), (1.0, 1.0, 0.0, 0.05)])
def test_potentials_have_the_curvature_of_the_closed_form(s, t, mean, epsilon):
    (x, a), (y, b) = gaussian(0.0, s), gaussian(mean, t)
    output = entropic_transport(x, y, epsilon, a, b, tolerance=1e-9)
    slope = cross_covariance(variance(s), variance(t), epsilon).item() / s**2
    step = (x[1] - x[0]).item()
    curvature = (output.f[2:] - 2 * output.f[1:-1] + output.f[:-2]) / step**2
    torch.testing.assert_close(curvature[120:180], torch.full((60,), 2 - 2 * slope, dtype=torch.float64), rtol=0, atol=1e-4)
    new = torch.tensor([[-0.7], [0.3]], dtype=torch.float64)  # out of sample
    torch.testing.assert_close(output.barycentric_map(new), mean + slope * new, rtol=0, atol=1e-6)
    dual = (output.a * output.f).sum() + (output.b * output.g).sum()
    assert dual.item() == pytest.approx(output.cost.item(), rel=1e-10)


def map_errors(relative):
    """Relative squared errors of the plain, Richardson and debiased maps between N(0, 1) and N(1, 4)."""
    (x, a), (y, b) = gaussian(0.0, 1.0), gaussian(1.0, 2.0)
    epsilon, options = relative * 6.0, {"a": a, "b": b, "tolerance": 1e-9}
    exact = 1 + 2 * x
    maps = {
        "plain": entropic_transport(x, y, epsilon, **options).barycentric_map(),
        "Richardson": richardson_map(x, y, epsilon, minimum_effective_size=0, **options).points,
        "debiased": debiased_map(x, y, epsilon, **options),
    }
    return {name: ((mapped - exact).square()[:, 0] @ a).item() / 4 for name, mapped in maps.items()}


def test_less_biased_maps_between_gaussians():
    errors, halved = map_errors(0.05), map_errors(0.025)
    assert errors["Richardson"] < 0.1 * errors["plain"]
    assert errors["debiased"] < 0.1 * errors["plain"]
    # squared errors: first order falls by 4, second order by 16
    assert errors["plain"] / halved["plain"] == pytest.approx(4, rel=0.15)
    assert errors["Richardson"] / halved["Richardson"] == pytest.approx(16, rel=0.25)


def test_extrapolation_is_gated_by_the_effective_size():
    x, y = (torch.randn(300, 8, generator=seeded(k), dtype=torch.float64) for k in (1, 2))
    narrow, wide = (richardson_map(x, y, epsilon, tolerance=1e-7) for epsilon in (0.5, 20.0))
    maps = {e: entropic_transport(x, y, e, tolerance=1e-7).barycentric_map() for e in (0.5, 20.0, 40.0)}
    assert not narrow.extrapolated and narrow.effective_size < 50
    torch.testing.assert_close(narrow.points, maps[0.5], rtol=0, atol=1e-4)
    assert wide.extrapolated and wide.effective_size > 50
    torch.testing.assert_close(wide.points, 2 * maps[20.0] - maps[40.0], rtol=0, atol=1e-4)


def test_effective_size_counts_points():
    x, y = torch.zeros(3, 2), torch.randn(40, 2, generator=seeded(1))
    sizes = entropic_transport(x, y, 1.0).effective_size
    torch.testing.assert_close(sizes, torch.full_like(sizes, 40.0), rtol=40 * 2.0**-24, atol=0)
    line = torch.arange(20.0)[:, None] * 100
    sizes = entropic_transport(line, line, 1.0).effective_size
    torch.testing.assert_close(sizes, torch.ones_like(sizes))


def test_divergence_between_gaussians():
    (x, a), (y, b) = gaussian(0.0, 1.0), gaussian(1.0, 2.0)
    for epsilon in (0.3, 3.0):
        measured = sinkhorn_divergence(x, y, epsilon, a, b, tolerance=1e-9).item()
        assert measured == pytest.approx(divergence(1.0, variance(1.0), variance(2.0), epsilon), rel=1e-6)


def test_extrapolated_divergence_is_nearer_to_the_distance():
    (x, a), (y, b) = gaussian(0.0, 1.0), gaussian(1.0, 2.0)
    epsilon, exact = 0.5, 2.0
    plain = sinkhorn_divergence(x, y, epsilon, a, b, tolerance=1e-9).item()
    better = sinkhorn_divergence(x, y, epsilon, a, b, extrapolate=True, tolerance=1e-9).item()
    twice = 2 * plain - sinkhorn_divergence(x, y, 2 * epsilon, a, b, tolerance=1e-9).item()
    assert abs(better - exact) < 0.1 * abs(plain - exact)
    assert abs(twice - exact) > abs(plain - exact)  # the weights of the plain cost are worse than nothing


def test_a_divergence_of_weighted_clouds_has_no_direction():
    """Each cloud is compared with itself by its own weights."""
    x, y = (torch.randn(30, 2, generator=seeded(seed), dtype=torch.float64) for seed in (1, 2))
    a, b = (torch.rand(30, generator=seeded(seed), dtype=torch.float64) + 0.05 for seed in (3, 4))
    a, b = a / a.sum(), b / b.sum()
    there = sinkhorn_divergence(x, y + 1, 0.5, a, b, tolerance=1e-9).item()
    assert there == pytest.approx(sinkhorn_divergence(y + 1, x, 0.5, b, a, tolerance=1e-9).item(), rel=1e-6)
    assert there > 0.1 and abs(sinkhorn_divergence(y, y, 0.5, b, b, tolerance=1e-9).item()) < 1e-7


def test_divergence_of_equal_clouds_is_zero():
    x = torch.randn(50, 3, generator=seeded(1), dtype=torch.float64)
    assert abs(sinkhorn_divergence(x, x[torch.randperm(50, generator=seeded(2))], 0.5, tolerance=1e-9).item()) < 1e-8
    shifted = sinkhorn_divergence(x, x + 2, 0.5, tolerance=1e-9).item()
    assert shifted == pytest.approx(12.0, rel=1e-6) and math.isclose(shifted, 12.0, rel_tol=1e-6)
