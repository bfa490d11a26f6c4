"""Bad input names the value and what is allowed; unusual but finite input gives finite output."""

import math
import warnings

import pytest
import torch
from conftest import seeded
from hypothesis import example, given, settings
from hypothesis import strategies as st

from atlas_diffusers.transport import entropic_transport

X, Y = torch.randn(6, 2, generator=seeded(1)), torch.randn(5, 2, generator=seeded(2))
NAN = torch.full((6, 2), math.nan)


@pytest.mark.parametrize(
    "arguments, options, match",
    [
        ((X, torch.zeros(5, 3), 1.0), {}, r"points must be \(..., n, d\) and \(..., m, d\).*\(6, 2\) and \(5, 3\)"),
        ((X[0], Y, 1.0), {}, r"got \(2,\) and \(5, 2\)"),
        ((X[:0], Y, 1.0), {}, r"none empty; got \(0, 2\)"),
        ((X.expand(3, 6, 2), Y.expand(2, 5, 2), 1.0), {}, "leading dimensions of the points must broadcast"),
        ((X.double(), Y, 1.0), {}, "both be float32 or both float64; got torch.float64 and torch.float32"),
        ((X.half(), Y.half(), 1.0), {}, "got torch.float16"),
        ((NAN, Y, 1.0), {}, "points x and y must be finite"),
        ((X, Y * math.inf, 1.0), {"tolerance": 1e-8}, "points x and y must be finite"),
        ((X, Y, 0.0), {}, "epsilon=0.0 must be positive and finite"),
        ((X, Y, -1), {}, "epsilon=-1.0"),
        ((X, Y, math.nan), {}, "epsilon=nan"),
        ((X, Y, torch.ones(3)), {}, r"epsilon must be a number or have shape \(\), got \(3,\)"),
        ((X, Y, 1.0, torch.ones(5)), {}, r"weights a must have shape \(6,\), got \(5,\)"),
        ((X, Y, 1.0, None, -torch.ones(5)), {}, r"weights b must be finite and not negative; they lie in \[-1.0, -1.0\]"),
        ((X, Y, 1.0, torch.zeros(6)), {}, "weights a must not be all zero"),
        ((X, Y, 1.0, torch.full((6,), math.nan)), {}, "weights a must be finite"),
        ((X, Y, 1.0, torch.ones(6), torch.ones(5)), {}, r"equal totals unless rho.*\[6.0\] and \[5.0\]"),
        ((X, Y, 1.0, torch.ones(6), 1.002 * 6 / 5 * torch.ones(5)), {}, r"the totals are \[6.0\] and \[6.01"),
        ((X, Y, 1.0), {"rho": 0.0}, "rho=0.0 must be positive, None, or a pair"),
        ((X, Y, 1.0), {"rho": (1.0, -2.0)}, r"rho=\(1.0, -2.0\)"),
        ((X, Y, 1.0), {"rho": (1.0,)}, "pair"),
        ((X, Y, 1.0), {"tolerance": -1.0}, "tolerance=-1.0 must be positive"),
        ((X, Y, 1.0), {"max_iterations": 0}, "max_iterations=0 must be at least 1"),
        ((X, Y, 1.0), {"check_every": 0}, "check_every=0 must be at least 1 or None"),
        ((X, Y, 1.0), {"max_bytes": 0}, "max_bytes=0"),
        ((X, Y, 1.0), {"init": (torch.zeros(5), torch.zeros(5))}, r"init f must have shape \(6,\), got \(5,\)"),
        ((X, Y, 1.0), {"init": (torch.zeros(6), None)}, r"pair of potentials \(f, g\), of which f may be None"),
        ((X, Y, 1.0), {"init": (None, torch.full((5,), math.inf))}, "init: potentials g must be finite"),
    ],
)
def test_bad_input(arguments, options, match):
    with pytest.raises(ValueError, match=match):
        entropic_transport(*arguments, **options)


def test_totals_that_differ_by_rounding_are_equal():
    a, b = torch.full((6,), 1 / 6), torch.full((5,), 0.2) * (1 + 1e-5)
    output = entropic_transport(X, Y, 1.0, a, b, tolerance=1e-9)
    assert output.converged and output.marginals[1].sum().item() == pytest.approx(1, abs=1e-7)


def test_totals_other_than_one():
    output = entropic_transport(X, Y, 1.0, 7 * torch.ones(6), tolerance=1e-9)
    assert output.plan.sum().item() == pytest.approx(42, rel=1e-6)
    torch.testing.assert_close(output.plan / 42, entropic_transport(X, Y, 1.0, tolerance=1e-9).plan, rtol=0, atol=1e-7)


def test_inputs_are_left_alone():
    x, y, a = X.clone(), Y.clone(), torch.ones(6) / 6
    start = torch.zeros(6, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    entropic_transport(x, y, 0.01, a, init=start, tolerance=1e-3)
    assert torch.equal(x, X) and torch.equal(y, Y) and torch.equal(a, torch.ones(6) / 6)
    assert not start[0].any() and not start[1].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weights", [None, torch.tensor([0, 0.2, 0.2, 0.2, 0.2, 0.2])])
def test_dtypes(dtype, weights):
    """The plan and maps are of the points' dtype, all else float64, also where a weight of zero changes the computation."""
    x, y = X.to(dtype), Y.to(dtype)
    output = entropic_transport(x, y, 0.5, weights)
    for points in (output.plan, output.project(y), output.barycentric_map(), output.barycentric_map(x[:2])):
        assert points.dtype is dtype
    names = ("f", "g", "a", "b", "epsilon", "row_error", "cost", "transport_cost", "column_error", "effective_size")
    assert {getattr(output, name).dtype for name in names} | {output.marginals[0].dtype} == {torch.float64}


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 12), st.integers(1, 12), st.sampled_from([1, 2, 20])),
    relative=st.floats(-6, 3).map(lambda exponent: 10**exponent),
    scale=st.sampled_from([1e-15, 1.0, 1e15]),
    shift=st.sampled_from([0.0, 3.0, 1e4]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    tolerance=st.sampled_from([1e-2, 1e-7]),
    duplicates=st.booleans(),
    zeros=st.integers(0, 3),
    rho=st.sampled_from([None, 0.1, (None, 1e3), (0.1, None), (1e-3, 1e3), 1e-3]),
    read=st.booleans(),
    seed=st.integers(0, 99),
)
@example((5, 1, 2), 1e-6, 1.0, 1e4, torch.float32, 1e-7, True, 3, None, False, 0)
@example((2, 2, 1), 1e-3, 1e-15, 0.0, torch.float32, 1e-2, False, 1, None, False, 0)
@example((7, 3, 1), 1e-3, 1.0, 0.0, torch.float64, 1e-2, False, 0, None, False, 8)
@example((9, 3, 1), 1e-3, 1e-15, 0.0, torch.float32, 1e-2, False, 0, None, False, 10)
@example((11, 10, 2), 2e-4, 1.0, 3.0, torch.float64, 1e-2, True, 0, (1e-3, 1e3), False, 75)
@example((9, 11, 1), 2e-6, 1.0, 3.0, torch.float64, 1e-2, True, 0, (None, 0.1), False, 14)
@example((7, 12, 1), 2.4e-5, 1e-15, 0.0, torch.float64, 1e-2, True, 3, (1e-3, 1e3), False, 9)
@example((9, 5, 2), 6e-5, 1e15, 3.0, torch.float64, 1e-2, False, 2, 0.1, False, 13)
@example((1, 2, 1), 1.0, 1e-15, 1e4, torch.float32, 1e-2, False, 0, 0.1, True, 0)
def test_everything_is_finite(sizes, relative, scale, shift, dtype, tolerance, duplicates, zeros, rho, read, seed):
    """Over scales, distances, weights, penalties, and both with and without reads by the host."""
    n, m, d = sizes
    x = torch.randn(n, d, generator=seeded(seed), dtype=torch.float64)
    y = torch.randn(m, d, generator=seeded(seed + 100), dtype=torch.float64) + shift
    if duplicates:
        x[n // 2 :], y[m // 2 :] = x[0].clone(), y[0].clone()
    a, b = (torch.rand(k, generator=seeded(k), dtype=torch.float64) + 0.1 for k in (n, m))
    a[: min(zeros, n - 1)], b[: min(zeros, m - 1)] = 0, 0
    epsilon = relative * scale**2 * (torch.cdist(x, y).square().mean().item() or 1.0)
    x, y = ((scale * z).to(dtype) for z in (x, y))
    rho = tuple(r and r * scale**2 for r in (rho if isinstance(rho, tuple) else (rho, rho)))
    options = {"rho": rho, "tolerance": tolerance, "max_iterations": 30, "check_every": 1 if read else None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        output = entropic_transport(x, y, epsilon, a / a.sum(), b / b.sum(), **options)
    for name in ("f", "g", "plan", "cost", "transport_cost", "column_error", "effective_size"):
        assert getattr(output, name).isfinite().all(), name
    assert output.row_error.isfinite() if read else not output.row_error.isnan()
    assert output.barycentric_map().isfinite().all() and (output.plan >= 0).all()
    if rho == (None, None) and read:
        torch.testing.assert_close(output.marginals[1], output.b, rtol=0, atol=3e-3)
