"""Landmarks: many digits while the kernel is broad, and a probe that knows when it is not."""

import pytest
import torch
from oracles import points

from atlas_diffusers.kernels import DirectKernel, NystromKernel
from atlas_diffusers.kernels.nystrom import jittered_cholesky


def sheet(n, seed=0):
    """Points of 64 dimensions on a curved sheet of three, somewhat as pictures are."""
    return torch.tanh(points(n, 3, seed=seed) @ points(3, 64, seed=9) / 2)


def ball(n, seed=0):
    """Isotropic points of 64 dimensions: the hardest case."""
    return points(n, 64, seed=seed)


def mean_cost_bandwidth(x, y, fraction):
    """ε with exp(−r²/2ε²) = exp(−r² / (fraction · mean r²))."""
    return float((fraction * (x[:, None] - y).square().sum(-1).mean() / 2).sqrt())


def relative_error(operator, x, y, kernel, epsilon):
    true = DirectKernel(x.double(), y.double(), kernel, epsilon).dense()
    return float((operator.dense() - true).norm() / true.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "cloud, fraction, bound", [(sheet, 1.0, 3e-5), (sheet, 4.0, 1e-6), (ball, 4.0, 2e-3), (ball, 64.0, 1e-5)]
)
def test_256_landmarks_of_a_broad_kernel_in_64_dimensions(cloud, fraction, bound, dtype):
    x, y = cloud(600), cloud(500, seed=1)
    epsilon = mean_cost_bandwidth(x, y, fraction)
    K = NystromKernel(x.to(dtype), y.to(dtype), epsilon=epsilon, num_landmarks=256)
    assert K.dtype == dtype and relative_error(K, x, y, "gaussian", epsilon) < bound
    probe = K.probe()
    assert probe.relative_error < 2 * bound and probe.min_entry > 0 and K.is_positive


def test_error_falls_with_the_landmarks():
    x, y = points(400, 3), points(400, 3, seed=1)
    errors = [relative_error(NystromKernel(x, y, num_landmarks=r), x, y, "gaussian", 1.0) for r in (25, 100, 400, 800)]
    assert errors[0] > 5 * errors[1] > 100 * errors[2] and errors[3] < 1e-9


@pytest.mark.parametrize("kernel", ["gaussian", "laplacian", "cauchy"])
def test_all_points_as_landmarks_give_the_kernel(kernel):
    x, y = points(30, 3), points(20, 3, seed=1)
    K = NystromKernel(x, y, kernel, 0.7, [1.0, 2.0], num_landmarks=50)
    torch.testing.assert_close(K.dense(), DirectKernel(x, y, kernel, 0.7, [1.0, 2.0]).dense(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("dim", [2, 64])
def test_narrow_kernel_goes_negative_and_is_found_out(dim):
    x, y = points(500, dim), points(500, dim, seed=1)
    K = NystromKernel(x, y, epsilon=mean_cost_bandwidth(x, y, 0.02), num_landmarks=40)
    probe = K.probe()
    assert probe.relative_error > 0.3
    true = DirectKernel(x, y, epsilon=mean_cost_bandwidth(x, y, 0.02)).dense()
    errors = (K.dense() - true).norm(dim=1) / true.norm(dim=1)
    assert K.probe(num_rows=500).relative_error == pytest.approx(float(errors.square().mean().sqrt()), rel=1e-6)
    if dim == 2:
        assert probe.min_entry < -1e-3 and not K.is_positive and not K.T.is_positive


def test_rows_that_underflow_do_not_pass_the_probe():
    K = NystromKernel(points(50, 2), points(50, 2, seed=1) + 1e3, num_landmarks=20)
    assert K.probe().relative_error == torch.inf


def test_duplicate_landmarks():
    x = points(10, 3).repeat(8, 1)
    K = NystromKernel(x, x, num_landmarks=160)
    assert relative_error(K, x, x, "gaussian", 1.0) < 1e-10


def test_jittered_cholesky():
    low_rank = points(20, 3)
    matrix = low_rank @ low_rank.T
    factor = jittered_cholesky(matrix)
    torch.testing.assert_close(factor @ factor.T, matrix, rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match="not positive semi-definite"):
        jittered_cholesky(-matrix)


def test_deterministic_given_a_generator_and_landmarks_come_from_both_clouds():
    x, y = points(40, 2), points(60, 2, seed=1) + 100
    one, same, other = (
        NystromKernel(x, y, num_landmarks=30, generator=g).landmarks
        for g in (None, torch.Generator().manual_seed(0), torch.Generator().manual_seed(1))
    )
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert 5 < (one[:, 0] > 50).sum() < 25 and len(one.unique(dim=0)) == 30
    pooled = torch.cat([x, y])
    assert all((point == pooled).all(1).any() for point in one)


@pytest.mark.parametrize("count", [0, 12])
def test_wrong_number_of_landmarks(count):
    with pytest.raises(ValueError, match=rf"num_landmarks={count} must lie in \[1, 11\], the number of points"):
        NystromKernel(points(5, 2), points(6, 2), num_landmarks=count)


def test_batches_are_refused():
    with pytest.raises(ValueError, match=r"NystromKernel takes points \(n, d\) and \(m, d\) .* got \(2, 5, 3\)"):
        NystromKernel(torch.zeros(2, 5, 3), torch.zeros(5, 3))
