"""Distances: exact zeros, accuracy far from the origin and in many dimensions, the median bandwidth."""

import math

import pytest
import torch
from oracles import points
from oracles import squared_distances as oracle

from atlas_diffusers.kernels import median_bandwidth, squared_distances


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dim", [1, 2, 16, 17, 64, 4096])
def test_identical_points_have_distance_exactly_zero(dim, dtype):
    x = points(40, dim, dtype=dtype) * 3 + 5
    shuffled = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    assert (squared_distances(x, x).diagonal() == 0).all()
    assert (squared_distances(x, x[shuffled])[shuffled, torch.arange(40)] == 0).all()
    assert ((squared_distances(x, x) == 0).sum()) == 40


@pytest.mark.parametrize("dim", [2, 16, 17, 64, 3072])
@pytest.mark.parametrize("offset", [0.0, 100.0, 1e4])
def test_float32_accuracy(dim, offset):
    """Relative error against float64 differences of the same float32 points, wherever the cloud is."""
    x, y = (points(60, dim, seed=seed, dtype=torch.float32) + offset for seed in (0, 1))
    true = oracle(x, y)
    assert ((squared_distances(x, y) - true) / true).abs().max() < 2e-6


@pytest.mark.parametrize("clusters", [2, 12])
@pytest.mark.parametrize("dim", [2, 64, 3072])
def test_tight_clusters_keep_their_inner_distances(dim, clusters):
    """Clusters a thousand radii apart: |x|² + |y|² − 2x·y would be noise within them. Two, and many."""
    centres = points(clusters, dim, seed=3)
    x, y = ((centres[torch.arange(50) % clusters] + 1e-3 * points(50, dim, seed=seed)).float() for seed in (0, 1))
    true = oracle(x, y)
    assert ((squared_distances(x, y) - true) / true).abs().max() < 3e-5


def test_clouds_far_apart_and_batches():
    x, y = points(2, 3, 5, 40), points(6, 40, seed=1) + 1e3
    torch.testing.assert_close(squared_distances(x, y), oracle(x, y), rtol=1e-12, atol=0)
    x = torch.cat([x, (x[:, :, :1] + 1e-6)], 2)
    torch.testing.assert_close(squared_distances(x, x), oracle(x, x), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dim", [3, 20])
def test_derivative_at_coinciding_points_is_zero(dim):
    x = points(4, dim).requires_grad_()
    squared_distances(x, x.detach()).diagonal().sum().backward()
    assert (x.grad == 0).all()


def test_median_bandwidth():
    x, y = torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0], [4.0], [10.0]])
    assert median_bandwidth(x, y) == 4  # 1, 3, 4, 9, 10; the pair at 0 left out
    assert median_bandwidth(x * 3, y * 3) == 12
    # |x − y|² is 2 χ²_d: the median of 100 dimensions is 2·99.334
    x, y = points(3000, 100), points(2000, 100, seed=1)
    assert median_bandwidth(x, y) == pytest.approx(math.sqrt(2 * 99.334), rel=0.005)
    assert median_bandwidth(x, y) == median_bandwidth(x, y)
    assert median_bandwidth(x, y, generator=torch.Generator().manual_seed(5)) != median_bandwidth(x, y)
    with pytest.raises(ValueError, match="the 3 points of x and 3 of y coincide"):
        median_bandwidth(torch.ones(3, 2), torch.ones(3, 2))
