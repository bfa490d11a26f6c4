"""The automatic choice and its reason; options and names."""

import logging

import pytest
import torch

from atlas_diffusers.kernels import (
    DirectKernel,
    GridKernel,
    NystromKernel,
    RandomFeatureKernel,
    choice,
    make_kernel_operator,
    median_bandwidth,
)
from atlas_diffusers.kernels.grid import grid_points


def points(n, d, seed=0, dtype=torch.float32):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture
def small_limit(monkeypatch):
    """As if 100 x 100 were many points."""
    monkeypatch.setattr(choice, "DIRECT_LIMIT", 10_000)


def test_small_clouds_are_direct(caplog):
    with caplog.at_level(logging.INFO, logger="atlas_diffusers.kernels.choice"):
        K = make_kernel_operator(points(50, 3), points(60, 3, seed=1), "laplacian", 0.5)
    assert type(K) is DirectKernel and K.kernel == "laplacian" and K.epsilon == 0.5
    assert K.reason == "the kernel matrix fits: 1 MiB for 50 x 60, of max_bytes 1024 MiB"
    assert caplog.messages == [f"DirectKernel: {K.reason}"]


@pytest.mark.parametrize("kernel, how", [("gaussian", "axis by axis"), ("cauchy", "by FFT")])
def test_grids(kernel, how):
    grid = grid_points((6, 7), (0.5, 0.5)).float()
    K = make_kernel_operator(grid, grid.clone(), kernel, 0.8)
    assert type(K) is GridKernel and K.reason == f"the 42 points are a regular grid (6, 7): {how}"
    torch.testing.assert_close(K.dense(), DirectKernel(grid, grid, kernel, 0.8).dense())
    assert type(make_kernel_operator(grid, grid + 0.1)) is DirectKernel
    assert type(make_kernel_operator(grid.requires_grad_(), grid)) is DirectKernel


def test_many_points_and_a_broad_kernel_take_landmarks(small_limit, caplog):
    x, y = points(300, 2), points(200, 2, seed=1)
    with caplog.at_level(logging.INFO, logger="atlas_diffusers.kernels.choice"):
        K = make_kernel_operator(x, y, epsilon=2.0, num_landmarks=100)
    assert type(K) is NystromKernel and K.left.shape == (300, 100)
    assert "100 landmarks give relative error" in K.reason and K.reason in caplog.text
    true = DirectKernel(x.double(), y.double(), epsilon=2.0).dense()
    assert (K.dense() - true).norm() / true.norm() < 1e-5


def test_many_points_and_a_narrow_kernel_stay_exact(small_limit):
    x, y = points(300, 2), points(200, 2, seed=1)
    K = make_kernel_operator(x, y, epsilon=0.05, num_landmarks=50, max_bytes=100_000)
    assert type(K) is DirectKernel and K.max_bytes == 100_000
    assert "but 50 landmarks give relative error" in K.reason and "the limits are 0.01 and 0" in K.reason


def test_relative_error_alone_refuses_the_landmarks(small_limit):
    """Isotropic points in 64 dimensions at ε² of half the mean cost: positive everywhere, and some per cent wrong."""
    x, y = points(300, 64), points(200, 64, seed=1)
    K = make_kernel_operator(x, y, epsilon=8.0, num_landmarks=128)
    assert type(K) is DirectKernel and NystromKernel(x, y, epsilon=8.0, num_landmarks=128).is_positive


def test_negative_entries_alone_refuse_the_landmarks(small_limit, monkeypatch):
    monkeypatch.setattr(choice, "PROBE_TOLERANCE", 10.0)
    x, y = points(300, 2), points(200, 2, seed=1)
    assert make_kernel_operator(x, y, epsilon=0.3, num_landmarks=60).reason.endswith("the limits are 10.0 and 0")


def test_memory_budget():
    x, y = points(300, 2), points(200, 2, seed=1)
    K = make_kernel_operator(x, y, epsilon=2.0, max_bytes=239_999, num_landmarks=100)
    assert type(K) is NystromKernel
    K = make_kernel_operator(x, y, epsilon=2.0, max_bytes=150_000, num_landmarks=100)
    assert type(K) is DirectKernel and "so are the factors of 100 landmarks" in K.reason
    K = make_kernel_operator(points(20, 2), points(20, 2, seed=1), epsilon=2.0, max_bytes=100)
    assert type(K) is DirectKernel and "256 landmarks" in K.reason
    K = make_kernel_operator(x.expand(3, 300, 2), y, epsilon=2.0, max_bytes=300_000)
    assert type(K) is DirectKernel and K.batch_shape == (3,) and K.reason.startswith("the points are batched")


def test_long_and_thin_problems_are_direct():
    K = make_kernel_operator(points(20_000, 2), points(10, 2, seed=1))
    assert type(K) is DirectKernel


def test_asked_for():
    x, y = points(40, 2), points(30, 2, seed=1)
    settings = {"num_landmarks": 20, "num_features": 8, "features": "cosine", "orthogonal": False, "max_bytes": 1000}
    direct = make_kernel_operator(x, y, "cauchy", 2.0, "direct", **settings)
    assert type(direct) is DirectKernel and direct.max_bytes == 1000 and direct.reason == "asked for"
    rff = make_kernel_operator(x, y, "cauchy", 2.0, "rff", **settings)
    assert type(rff) is RandomFeatureKernel and rff.left.shape == (40, 16) and not rff.is_positive
    nystrom = make_kernel_operator(x, y, "cauchy", 2.0, "nystrom", scale_factors=[1, 2], **settings)
    assert type(nystrom) is NystromKernel and nystrom.left.shape == (40, 20)
    grid = grid_points((5, 5), (1.0, 1.0))
    assert type(make_kernel_operator(grid, grid, solver_type="fft", **settings)) is GridKernel


def test_generator_reaches_the_operator():
    x, y = points(40, 2), points(30, 2, seed=1)
    one, two = (
        make_kernel_operator(x, y, solver_type="nystrom", num_landmarks=9, generator=torch.Generator().manual_seed(s))
        for s in (0, 1)
    )
    assert not torch.equal(one.landmarks, two.landmarks)


def test_adaptive_bandwidth():
    x, y = points(40, 5) * 7, points(30, 5, seed=1) * 7
    K = make_kernel_operator(x, y, epsilon=0.5, adaptive_epsilon=True)
    assert K.epsilon == 0.5 * median_bandwidth(x, y)
    scaled = make_kernel_operator(x * 100, y * 100, epsilon=0.5, adaptive_epsilon=True)
    torch.testing.assert_close(scaled.dense(), K.dense(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"solver_type": "fast"}, r"solver_type='fast' is unknown; allowed are \['auto', 'direct', 'fft', 'nystrom', 'rff'\]"),
        ({"landmarks": 5}, r"options \['landmarks'\] are unknown; allowed are \['features', 'generator', 'max_bytes'"),
        ({"kernel_type": "rbf"}, "kernel 'rbf' is unknown"),
        ({"epsilon": -1.0}, "epsilon=-1.0"),
        ({"solver_type": "fft"}, "needs x and y to be the same regular grid"),
        ({"solver_type": "nystrom", "num_landmarks": 100}, r"must lie in \[1, 70\]"),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_kernel_operator(points(40, 3), points(30, 3, seed=1), **arguments)
    with pytest.raises(ValueError, match="got torch.float32 and torch.float64"):
        make_kernel_operator(points(40, 3), points(30, 3).double())
