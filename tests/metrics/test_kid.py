import pytest
import torch
from conftest import seeded
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas_diffusers.metrics import kid


def normal(n, d, seed, mean=0.0, std=1.0):
    return mean + std * torch.randn(n, d, generator=seeded(seed), dtype=torch.float64)


def written_out(a, b):
    """MMD² with one kernel value at a time."""

    def k(x, y):
        return (float(x @ y) / len(x) + 1) ** 3

    def own(z):
        n = len(z)
        return sum(k(z[i], z[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))

    return own(a) + own(b) - 2 * sum(k(x, y) for x in a for y in b) / (len(a) * len(b))


def gaussian_mmd(one, other):
    """MMD² in 1-D: ``(xy + 1)³`` compares the moments 1, 2 and 3 with weights 3, 3 and 1."""
    (p, q), weights = ([(m, m**2 + s**2, m**3 + 3 * m * s**2) for m, s in (one, other)]), (3, 3, 1)
    return sum(w * (u - v) ** 2 for w, u, v in zip(weights, p, q))


@settings(max_examples=20, deadline=None)
@given(st.integers(3, 6), st.integers(3, 6), st.integers(1, 5), st.integers(0, 10_000))
def test_against_the_written_out_sums(m, n, d, seed):
    a, b = normal(m, d, seed), normal(n, d, seed + 1, mean=1)
    assert kid(a, b).mean == pytest.approx(written_out(a, b), rel=1e-10, abs=1e-10)


def test_standard_error_is_the_written_out_jackknife():
    a, b = normal(7, 3, 0), normal(5, 3, 1, mean=0.5)
    variance = 0
    for which, points in enumerate((a, b)):
        pairs = [[a, b] for _ in points]
        for i, pair in enumerate(pairs):
            pair[which] = torch.cat((points[:i], points[i + 1 :]))
        values = torch.tensor([written_out(*pair) for pair in pairs], dtype=torch.float64)
        variance += (len(points) - 1) / len(points) * float((values - values.mean()).square().sum())
    assert kid(a, b).standard_error == pytest.approx(variance**0.5, rel=1e-9)


@pytest.mark.parametrize("arguments", [{}, {"subsets": 12, "subset_size": 100}])
@pytest.mark.parametrize("one, other", [((0, 1), (0.5, 1)), ((0, 1), (0, 1.5)), ((1, 0.5), (-0.5, 0.7))])
def test_gaussians_against_the_closed_form(one, other, arguments):
    a, b = normal(1200, 1, 0, *one), normal(1500, 1, 1, *other)
    result = kid(a, b, **arguments)
    assert abs(result.mean - gaussian_mmd(one, other)) < 4 * result.standard_error
    assert result.mean > 5 * result.standard_error


@pytest.mark.parametrize("arguments", [{}, {"subsets": 5, "subset_size": 100}])
@pytest.mark.parametrize("seed", range(5))
def test_samples_of_the_same_gaussian_are_near_zero(seed, arguments):
    result = kid(normal(500, 64, seed), normal(600, 64, seed + 100), **arguments)
    assert abs(result.mean) < 5 * result.standard_error
    assert result.standard_error < 0.01


@pytest.mark.parametrize(
    "mean, arguments, low, high",
    [
        (1.0, {}, 0.75, 1.25),
        (0.0, {}, 0.6, 0.9),  # the jackknife is up to √2 too large for equal distributions
        (1.0, {"subsets": 4, "subset_size": 15}, 0.75, 1.25),
        (0.0, {"subsets": 4, "subset_size": 15}, 0.75, 1.25),
    ],
)
def test_standard_error_is_the_spread_of_repeated_estimates(mean, arguments, low, high):
    results = [kid(normal(60, 4, 2 * i), normal(60, 4, 2 * i + 1, mean=mean), **arguments) for i in range(150)]
    means, errors = torch.tensor(results).T
    assert low < float(means.std() / errors.square().mean().sqrt()) < high


def test_subsets_of_sorted_points_are_random_and_reproducible():
    a, b = normal(400, 1, 0).sort(0).values, normal(400, 1, 1).sort(0).values
    result = kid(a, b, subsets=4, subset_size=100)
    assert abs(result.mean) < 5 * result.standard_error
    assert kid(a, b, subsets=4, subset_size=100) == result
    assert kid(a, b, subsets=4, subset_size=100, generator=seeded(5)) != result


@pytest.mark.parametrize("subsets, size", [(1, 5), (2, 2), (3, 4)])
def test_blocks_that_do_not_fit_are_named(subsets, size):
    with pytest.raises(ValueError, match=f"subsets={subsets} of subset_size={size} from 11 and 20 points"):
        kid(normal(11, 2, 0), normal(20, 2, 1), subsets=subsets, subset_size=size)


def test_two_points_are_too_few():
    with pytest.raises(ValueError, match="features_b has 2 points; expected at least 3"):
        kid(normal(3, 2, 0), normal(2, 2, 1))
