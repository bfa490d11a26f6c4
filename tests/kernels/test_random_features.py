"""Random features: unbiased, error 1/√F, the right lengths of orthogonal rows, positive where positive is promised."""

import math

import pytest
import scipy.stats
import torch

from atlas_diffusers.kernels import DirectKernel, RandomFeatureKernel
from atlas_diffusers.kernels.random_features import gaussian_rows, positive_width

MAPS = [("gaussian", "positive"), ("gaussian", "cosine"), ("laplacian", "cosine"), ("cauchy", "cosine")]


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def points(n, d, seed=0, scale=1.0):
    return scale * torch.randn(n, d, generator=seeded(seed), dtype=torch.float64)


def estimates(x, y, kernel, features, count, seeds, orthogonal=True, epsilon=None, factors=None):
    epsilon = epsilon or x.shape[1] ** 0.5
    make = RandomFeatureKernel
    return torch.stack(
        [make(x, y, kernel, epsilon, factors, count, features, orthogonal, seeded(s)).dense() for s in range(seeds)]
    )


@pytest.mark.parametrize("orthogonal, factors", [(False, None), (True, None), (True, [0.7, 2.0])])
@pytest.mark.parametrize("kernel, features", MAPS)
def test_unbiased(kernel, features, orthogonal, factors):
    """The mean of 256 independent estimates lies within its own standard error of the true kernel."""
    x, y = points(6, 5), points(5, 5, seed=1) + 0.3
    found = estimates(x, y, kernel, features, 20, 256, orthogonal, factors=factors)
    z = (found.mean(0) - DirectKernel(x, y, kernel, 5**0.5, factors).dense()) / (found.std(0) / 16)
    assert z.abs().max() < 4.5 and z.square().mean() < 2.5


@pytest.mark.parametrize("orthogonal", [False, True])
@pytest.mark.parametrize("kernel, features", MAPS)
def test_error_falls_as_the_square_root_of_the_features(kernel, features, orthogonal):
    x, y = points(20, 4, scale=0.6), points(20, 4, seed=1, scale=0.6)
    true = DirectKernel(x, y, kernel, 2.0).dense()
    coarse, fine = (
        (estimates(x, y, kernel, features, count, 30, orthogonal) - true).square().mean().sqrt() for count in (32, 288)
    )
    assert float(coarse / fine) == pytest.approx(3, rel=0.25) and fine < 0.05


@pytest.mark.parametrize("dim", [2, 16, 100])
def test_orthogonal_rows_have_chi_lengths_and_uniform_directions(dim):
    rows = torch.cat([gaussian_rows(3 * dim + 1, dim, True, seeded(s)) for s in range(math.ceil(1000 / (3 * dim)))])
    assert scipy.stats.kstest(rows.norm(dim=1).numpy(), "chi", args=(dim,)).pvalue > 0.01
    assert scipy.stats.kstest(rows[:, 0].numpy(), "norm").pvalue > 0.01
    assert scipy.stats.kstest(rows[:, -1].numpy(), "norm").pvalue > 0.01
    block = gaussian_rows(3 * dim + 1, dim, True, seeded(0))[:dim]
    gram = block @ block.T
    assert (gram - gram.diag().diag()).abs().max() < 1e-12 * dim
    lengths = block.norm(dim=1)
    assert lengths.std() > 0.3  # √½ for chi; the original's were all one


@pytest.mark.parametrize("features", ["positive", "cosine"])
def test_orthogonal_features_lower_the_error_and_keep_the_value(features):
    """Without the χ_d lengths the original gave 0.95 where 0.15 is exact."""
    dim = 32
    x = points(1, dim)
    y = x + points(1, dim, seed=1) * (math.sqrt(-2 * math.log(0.15)) / points(1, dim, seed=1).norm())
    assert float(DirectKernel(x, y).dense()) == pytest.approx(0.15)
    found = {orthogonal: estimates(x, y, "gaussian", features, 64, 200, orthogonal, 1.0) for orthogonal in (False, True)}
    if features == "cosine":
        assert float(found[True].mean()) == pytest.approx(0.15, abs=0.02)
        assert found[True].std() < 0.9 * found[False].std()


def test_positive_features_are_positive_and_cosine_features_are_not():
    x, y = points(60, 3), points(70, 3, seed=1)
    positive = RandomFeatureKernel(x, y, epsilon=0.5, num_features=200)
    cosine = RandomFeatureKernel(x, y, epsilon=0.5, num_features=200, features="cosine")
    assert positive.is_positive and (positive.left >= 0).all() and (positive.right >= 0).all()
    assert positive.dense().min() > 0
    assert not cosine.is_positive and cosine.dense().min() < -0.01


def test_width_of_positive_features_has_the_least_variance():
    """Against the second moment's closed form on a grid of t, and against Performer's t = ½."""
    x, y, epsilon = points(300, 4), points(300, 4, seed=1) * 0.5 + 1, 1.2
    centre = (x.mean(0) + y.mean(0)) / 2
    x, y = x - centre, y - centre
    best = positive_width(x, y, epsilon)
    square = float((x[:, None] + y).square().sum(-1).mean()) / epsilon**2
    t = torch.linspace(0.001, 0.499, 5000, dtype=torch.float64)
    moment = -2 * torch.log(4 * t * (1 - t)) + square * t / (1 - t)
    assert best == pytest.approx(float(t[moment.argmin()]), abs=2e-4)
    assert positive_width(0 * x, 0 * y, 1.0) == pytest.approx(0.5)

    true = DirectKernel(x, y, epsilon=epsilon).dense()
    ours = estimates(x, y, "gaussian", "positive", 128, 5, epsilon=epsilon) - true
    z = gaussian_rows(128, 4, True, seeded(0))
    performer = [torch.exp(p @ torch.cat([z, -z]).T / epsilon - p.square().sum(1, True) / epsilon**2) for p in (x, y)]
    error = performer[0] @ performer[1].T / 256 - true
    assert ours.square().mean().sqrt() < 0.5 * error.square().mean().sqrt()


def test_logarithmic_product_far_beyond_the_range_of_float32():
    x, y = points(30, 2).float(), points(40, 2, seed=1).float()
    K = RandomFeatureKernel(x, y, epsilon=1.0, num_features=300)
    f = 300 * points(40, 1, seed=2)[:, 0].float()
    assert not K.matvec(f.exp()).isfinite().all()
    expected = (K.dense().double().log() + f.double()).logsumexp(1)
    torch.testing.assert_close(K.logmatvec(f).double(), expected, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("features", ["positive", "cosine"])
def test_features_follow_the_cloud_anywhere(features):
    x, y = points(20, 3), points(25, 3, seed=1)
    near, far = (RandomFeatureKernel(x + o, y + o, epsilon=1.5, features=features).dense() for o in (0, 1e4))
    torch.testing.assert_close(near, far, rtol=0, atol=1e-8)


def test_deterministic_given_a_generator():
    x, y = points(10, 3), points(12, 3, seed=1)
    one, same, other = (RandomFeatureKernel(x, y, generator=g).dense() for g in (None, seeded(0), seeded(1)))
    assert torch.equal(one, same) and not torch.equal(one, other)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"features": "sine"}, r"features='sine' is unknown; allowed are \('positive', 'cosine'\)"),
        ({"kernel": "cauchy"}, "features='positive' exist for the gaussian kernel only, not for 'cauchy'; use 'cosine'"),
        ({"num_features": 0}, "num_features=0 must be at least 1"),
        ({"num_features": 2, "scale_factors": [1, 2, 3]}, "num_features=2 must be at least 3, one for each scale"),
        ({"epsilon": 0.0}, "epsilon=0.0"),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(ValueError, match=message):
        RandomFeatureKernel(points(5, 2), points(6, 2), **arguments)
    with pytest.raises(ValueError, match="RandomFeatureKernel takes points"):
        RandomFeatureKernel(torch.zeros(2, 5, 3), torch.zeros(2, 5, 3))
