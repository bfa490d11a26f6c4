"""One-to-one pairs of large clouds, against the exact assignment."""

import pytest
import torch
from conftest import seeded
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas_diffusers.transport import pair_one_to_one


def cost(x, y, pairs):
    return (x - y[pairs]).square().sum(1).mean().item()


@pytest.mark.parametrize("dimension, excess", [(2, 0.02), (16, 0.12), (64, 0.1)])
def test_pairs_cost_little_more_than_the_best(dimension, excess):
    """Within a share of what the best assignment saves over chance."""
    scipy = pytest.importorskip("scipy.optimize")
    x = torch.randn(1024, dimension, generator=seeded())
    y = 1 + torch.randn(1024, dimension, generator=seeded(1)) * torch.linspace(0.5, 2, dimension)
    squares = torch.cdist(x, y).square()
    best = squares[scipy.linear_sum_assignment(squares.numpy())].mean().item()
    found = cost(x, y, pair_one_to_one(x, y))
    assert best - 1e-4 <= found <= best + excess * 2 * (squares.mean().item() - best)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 999), st.integers(1, 300), st.integers(1, 5))
def test_every_point_has_one_partner(seed, n, dimension):
    x, y = torch.randn(2, n, dimension, generator=seeded(seed))
    assert torch.equal(pair_one_to_one(x, y).sort().values, torch.arange(n))


def test_a_line_is_sorted_and_equal_clouds_find_themselves():
    x, y = torch.randn(257, 1, generator=seeded()), torch.randn(257, 1, generator=seeded(1))
    pairs = pair_one_to_one(x, y)
    best = (x[:, 0].sort().values - y[:, 0].sort().values).square().mean().item()
    assert cost(x, y, pairs) == pytest.approx(best, rel=1e-3)
    points = torch.randn(256, 3, generator=seeded(2))
    order = torch.randperm(256, generator=seeded(3))
    assert cost(points, points[order], pair_one_to_one(points, points[order])) < 0.01 * 6  # of what chance costs, 2 a dimension
    assert torch.equal(pair_one_to_one(torch.ones(6, 2), torch.ones(6, 2)).sort().values, torch.arange(6))


def test_clouds_of_different_sizes_are_refused():
    with pytest.raises(ValueError, match=r"one shape, got \(3, 2\) and \(4, 2\)"):
        pair_one_to_one(torch.zeros(3, 2), torch.zeros(4, 2))
