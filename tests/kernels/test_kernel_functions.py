"""Kernel functions: closed forms, spectral densities, scales, registry."""

import math

import pytest
import torch

from atlas_diffusers.kernels import KERNELS, DirectKernel, KernelFunction, RandomFeatureKernel, ScaledKernel, register_kernel

CLOSED_FORMS = {
    "gaussian": lambda r, e: math.exp(-r * r / (2 * e * e)),
    "laplacian": lambda r, e: math.exp(-r / e),
    "cauchy": lambda r, e: 1 / (1 + r * r / (e * e)),
}


@pytest.mark.parametrize("epsilon", [0.3, 1.0, 20.0])
@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_closed_form(name, epsilon):
    for r in (0.0, 0.1, 1.0, 7.5):
        value = ScaledKernel.named(name, epsilon)(torch.tensor(r * r, dtype=torch.float64))
        assert float(value) == pytest.approx(CLOSED_FORMS[name](r, epsilon), rel=1e-12)


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_scale_factors_average_the_kernel_at_wider_and_narrower_bandwidths(name):
    squared = torch.tensor([0.0, 0.4, 9.0], dtype=torch.float64)
    found = ScaledKernel.named(name, 0.7, [0.5, 1, 2])(squared)
    for r2, value in zip(squared.tolist(), found.tolist()):
        expected = sum(CLOSED_FORMS[name](math.sqrt(r2), 0.7 * factor) for factor in (0.5, 1, 2)) / 3
        assert value == pytest.approx(expected, rel=1e-12)
    wide, narrow = (ScaledKernel.named(name, 0.7, [factor])(squared) for factor in (2, 0.5))
    assert (wide[1:] > narrow[1:]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_extreme_bandwidths_give_neither_nan_nor_a_wrong_diagonal(name, dtype):
    squared = torch.tensor([0.0, 1e-30, 1.0, 1e30], dtype=dtype)
    for epsilon in (1e-200, 1e-25, 1e25, 1e200):
        log = ScaledKernel.named(name, epsilon).log(squared)
        assert not log.isnan().any() and log[0] == 0 and (log <= 0).all()
    assert (ScaledKernel.named(name, 1e25)(squared)[:3] == 1).all()


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_spectral_density_is_that_of_the_kernel(name):
    """E cos(w·h) over 400,000 frequencies, at distances that are one to three bandwidths, in three dimensions."""
    generator = torch.Generator().manual_seed(1)
    count, epsilon = 400_000, 0.8
    z = torch.randn(count, 3, dtype=torch.float64, generator=generator)
    w = z * KERNELS[name].spectral_scale(count, generator)[:, None] / epsilon
    for r in (0.4, 0.8, 2.4):
        h = torch.tensor([2.0, -1.0, 2.0], dtype=torch.float64) * (r / 3)
        assert float((w @ h).cos().mean()) == pytest.approx(CLOSED_FORMS[name](r, epsilon), abs=4 / math.sqrt(2 * count))


@pytest.mark.parametrize("epsilon", [0, -1.0, math.nan, math.inf])
def test_bandwidth_that_is_no_length(epsilon):
    with pytest.raises(ValueError, match=f"epsilon={epsilon} must be a positive, finite length"):
        ScaledKernel.named("gaussian", epsilon)


@pytest.mark.parametrize("factors", [[], [0.0], [1, -1], [math.inf]])
def test_wrong_scale_factors(factors):
    with pytest.raises(ValueError, match="scale_factors=.* must be positive, finite numbers, at least one"):
        ScaledKernel.named("gaussian", 1.0, factors)


def test_unknown_kernel_names_the_known_ones():
    with pytest.raises(ValueError, match=r"kernel 'rbf' is unknown; registered are \['cauchy', 'gaussian', 'laplacian'\]"):
        ScaledKernel.named("rbf", 1.0)


def test_own_kernel():
    matern = KernelFunction("matern", lambda d2, e: torch.log1p((3 * d2).sqrt() / e) - (3 * d2).sqrt() / e)
    try:
        assert register_kernel(matern) is matern and register_kernel(matern) is matern
        x, y = torch.zeros(1, 2), torch.tensor([[3.0, 4.0]])
        root = 5 * math.sqrt(3) / 2
        value = DirectKernel(x, y, "matern", epsilon=2.0).dense()
        assert float(value) == pytest.approx((1 + root) * math.exp(-root), rel=1e-6)
        with pytest.raises(ValueError, match="'matern' was registered without a spectral density"):
            RandomFeatureKernel(x, y, "matern", features="cosine")
        with pytest.raises(ValueError, match="'matern' is registered already"):
            register_kernel(KernelFunction("matern", lambda d2, e: -d2))
    finally:
        KERNELS.pop("matern", None)
