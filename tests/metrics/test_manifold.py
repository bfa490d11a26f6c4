import math

import pytest
import torch
from conftest import seeded
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas_diffusers.metrics import manifold_overlap

# Radii to the nearest other point: 1 1 2 7 1 1 and 1 1 6.5 22 30 35.
REAL = torch.tensor([0, 1, 3, 10, 100, 101.0])[:, None]
GENERATED = torch.tensor([0.5, 1.5, 8, 30, 60, 95])[:, None]


def written_out(real, generated, k):
    """The four measures with one ball at a time, exact for integers."""

    def distance(p, q):
        return sum((a - b) ** 2 for a, b in zip(p, q))

    def radii(points):
        return [sorted(distance(p, q) for j, q in enumerate(points) if j != i)[k - 1] for i, p in enumerate(points)]

    inside = [[distance(r, g) <= radius for g in generated] for r, radius in zip(real, radii(real))]
    recalled = [any(distance(r, g) <= radius for g, radius in zip(generated, radii(generated))) for r in real]
    n, m = len(real), len(generated)
    precision = sum(any(row[j] for row in inside) for j in range(m)) / m
    return precision, sum(recalled) / n, sum(map(sum, inside)) / (k * m), sum(map(any, inside)) / n


def test_points_on_a_line_by_hand():
    # 0.5 lies in the balls of 0 and 1, 1.5 in those of 1 and 3, 8 in that of 10; 30, 60 and 95 in none.
    # All real points lie in balls of generated ones, 100 and 101 in that of 95, but their own balls are empty.
    assert manifold_overlap(REAL, GENERATED, neighbours=1) == pytest.approx((3 / 6, 6 / 6, 5 / 6, 4 / 6))
    # The other way round recall is precision, 1.5's ball [0.5, 2.5] holds 1, and 30's [8, 52] holds 10.
    assert manifold_overlap(GENERATED, REAL, neighbours=1) == pytest.approx((6 / 6, 3 / 6, 8 / 6, 5 / 6))


def test_a_collapsed_generator_is_precise_and_covers_little():
    real = torch.arange(10.0)[:, None]
    generated = torch.full((20, 1), 4.0)
    # Closed balls of radius 1, those at the ends too: 4 lies in three of ten; a generated ball is the point 4 alone.
    assert manifold_overlap(real, generated, neighbours=1) == pytest.approx((1, 1 / 10, 3, 3 / 10))


def test_sets_far_apart_do_not_overlap():
    assert manifold_overlap(REAL, GENERATED + 1e4, neighbours=2) == (0, 0, 0, 0)


@settings(max_examples=50, deadline=None)
@given(st.data(), st.integers(1, 3), st.integers(1, 3))
def test_against_the_written_out_balls_with_ties_and_duplicates(data, d, k):
    points = st.lists(st.tuples(*[st.integers(0, 4)] * d), min_size=k + 1, max_size=12)
    real, generated = data.draw(points), data.draw(points)
    result = manifold_overlap(torch.tensor(real).float(), torch.tensor(generated).float(), neighbours=k)
    assert result == pytest.approx(written_out(real, generated, k), abs=1e-12)


@pytest.mark.parametrize("scale, shift", [(1, 0), (1e-3, 5), (1e3, -1e4)])
def test_a_copy_of_the_real_points(scale, shift):
    real = scale * torch.randn(60, 32, generator=seeded(), dtype=torch.float64) + shift
    copy = real[torch.randperm(60, generator=seeded(1))]
    # Each ball holds its centre and k neighbours, the k-th exactly on its rim.
    assert manifold_overlap(real, copy, neighbours=5) == pytest.approx((1, 1, 6 / 5, 1))


def test_order_does_not_matter():
    real, generated = torch.randn(70, 48, generator=seeded()), torch.randn(50, 48, generator=seeded(1)) * 1.1
    orders = [torch.randperm(n, generator=seeded(2)) for n in (70, 50)]
    assert manifold_overlap(real[orders[0]], generated[orders[1]]) == manifold_overlap(real, generated)


def test_two_samples_of_one_distribution_have_the_expected_density_and_coverage():
    n, k, repeats = 40, 3, 300
    pairs = [[torch.randn(n, 2, generator=seeded(2 * i + side)) for side in (0, 1)] for i in range(repeats)]
    values = torch.tensor([manifold_overlap(*pair, neighbours=k) for pair in pairs])
    missed = math.prod((n - i) / (2 * n - i) for i in range(1, k + 1))
    errors = values.std(0) / repeats**0.5
    assert abs(values[:, 2].mean() - 1) < 4 * errors[2]
    assert abs(values[:, 3].mean() - (1 - missed)) < 4 * errors[3]
    assert abs(values[:, 0].mean() - values[:, 1].mean()) < 4 * (errors[0] + errors[1])


def test_too_few_points_are_named():
    with pytest.raises(ValueError, match="generated has 5 points; expected at least 6"):
        manifold_overlap(torch.zeros(9, 2), torch.zeros(5, 2))
    with pytest.raises(ValueError, match="neighbours=0"):
        manifold_overlap(torch.zeros(9, 2), torch.zeros(9, 2), neighbours=0)
