"""Bad input names the value and what is allowed; unusual but finite input gives finite output."""

import math

import pytest
import torch
from conftest import seeded

from atlas_diffusers.solvers import entropic_transport

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
