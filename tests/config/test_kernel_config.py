"""KernelConfig: every field reaches the operator; mistakes."""

import pytest
import torch

from atlas_diffusers.config import validate
from atlas_diffusers.config.kernels import KernelConfig
from atlas_diffusers.kernels import DirectKernel, NystromKernel, RandomFeatureKernel, make_kernel_operator


def points(n, seed):
    return 3 * torch.randn(n, 8, generator=torch.Generator().manual_seed(seed))


X, Y = points(200, 0), points(150, 1)


def make(**fields):
    return make_kernel_operator(X, Y, **validate(KernelConfig, fields).arguments())


def test_defaults_are_those_of_the_function():
    assert torch.equal(make().dense(), make_kernel_operator(X, Y).dense())
    assert make().max_bytes == DirectKernel(X, Y).max_bytes
    assert torch.equal(make(solver_type="nystrom").dense(), NystromKernel(X, Y).dense())
    assert torch.equal(make(solver_type="rff").dense(), RandomFeatureKernel(X, Y).dense())


@pytest.mark.parametrize(
    "fields, change",
    [
        ({}, {"kernel_type": "laplacian"}),
        ({}, {"epsilon": 2.5}),
        ({}, {"adaptive_epsilon": True}),
        ({}, {"solver_type": "nystrom"}),
        ({"solver_type": "rff"}, {"rff_features": 100}),
        ({"solver_type": "nystrom"}, {"n_landmarks": 100}),
        ({"solver_type": "rff"}, {"orthogonal": False}),
        ({}, {"multi_scale": True}),
        ({"multi_scale": True}, {"scale_factors": [1.0, 5.0]}),
    ],
)
def test_every_field_changes_the_operator(fields, change):
    assert not torch.equal(make(**fields).dense(), make(**fields, **change).dense())


def test_cache_size_is_in_mebibytes():
    assert make(max_kernel_cache_size=3).max_bytes == 3 * 2**20


def test_names_are_checked_where_they_are_registered():
    with pytest.raises(ValueError, match="solver_type='fast' is unknown"):
        make(solver_type="fast")
    with pytest.raises(ValueError, match="kernel 'rbf' is unknown"):
        make(kernel_type="rbf")


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"epsilon": 0}, "epsilon=0: Input should be greater than 0"),
        ({"epsilon": float("inf")}, "epsilon=inf"),
        ({"rff_features": 0}, "rff_features=0"),
        ({"n_landmarks": 0}, "n_landmarks=0"),
        ({"max_kernel_cache_size": 0}, "max_kernel_cache_size=0"),
        ({"scale_factors": []}, "scale_factors"),
        ({"scale_factors": [1, -1]}, "scale_factors.1=-1"),
        ({"landmarks": 5}, "landmarks: unknown key, did you mean 'n_landmarks'?"),
    ],
)
def test_mistakes(fields, message):
    with pytest.raises(ValueError) as error:
        validate(KernelConfig, fields)
    assert message in str(error.value)
