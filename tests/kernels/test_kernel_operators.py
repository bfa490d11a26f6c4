"""What every operator promises: linear, adjoint, consistent with its dense matrix, one interface, one registry."""

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from oracles import points

from atlas_diffusers.kernels import (
    KERNEL_OPERATORS,
    DirectKernel,
    GridKernel,
    KernelOperator,
    NystromKernel,
    RandomFeatureKernel,
    make_kernel_operator,
    register_kernel_operator,
)

X, Y = points(24, 3), points(30, 3, seed=1)
OPERATORS = {
    "direct": DirectKernel(X, Y, "laplacian", 2.0),
    "blocks": DirectKernel(X, Y, "cauchy", 2.0, max_bytes=1000),
    "scales": DirectKernel(X, Y, "gaussian", 2.0, [0.5, 2.0]),
    "separable": GridKernel((4, 6), "gaussian", 1.5, dtype=torch.float64),
    "fft": GridKernel((2, 3, 4), "laplacian", 1.5, (1.0, 0.5, 2.0), dtype=torch.float64),
    "positive": RandomFeatureKernel(X, Y, epsilon=2.0, num_features=32),
    "cosine": RandomFeatureKernel(X, Y, "cauchy", 2.0, num_features=32, features="cosine"),
    "nystrom": NystromKernel(X, Y, "gaussian", 2.0, num_landmarks=20),
}
WITHOUT_LOG = ("fft", "cosine", "nystrom")


@pytest.fixture(params=[*OPERATORS, *(f"{name}.T" for name in OPERATORS)])
def operator(request):
    name, *transposed = request.param.split(".")
    return OPERATORS[name].T if transposed else OPERATORS[name]


@hypothesis.settings(max_examples=15, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(seed=st.integers(0, 2**31), scale=st.floats(-1e3, 1e3), log_size=st.floats(-6, 6))
def test_linear_and_adjoint(operator, seed, scale, log_size):
    generator = torch.Generator().manual_seed(seed)
    n, m = operator.shape
    draw = {"dtype": torch.float64, "generator": generator}
    u, v, w = torch.randn(n, **draw), 10**log_size * torch.randn(m, **draw), torch.randn(m, **draw)
    size = float(10**log_size + abs(scale)) * n * m
    torch.testing.assert_close(
        operator.matvec(v + scale * w), operator.matvec(v) + scale * operator.matvec(w), rtol=0, atol=1e-13 * size
    )
    torch.testing.assert_close(u @ operator.matvec(v), operator.rmatvec(u) @ v, rtol=0, atol=1e-13 * size)


def test_dense_is_the_product_with_the_identity(operator):
    """The original's Nyström applied one matrix and reported another."""
    n, m = operator.shape
    dense = operator.dense()
    assert dense.shape == (n, m) and dense.dtype == operator.dtype == torch.float64
    eye = torch.eye(m, dtype=torch.float64), torch.eye(n, dtype=torch.float64)
    torch.testing.assert_close(operator.matvec(eye[0]), dense, rtol=0, atol=1e-13)
    torch.testing.assert_close(operator.rmatvec(eye[1]), dense.T, rtol=0, atol=1e-13)
    columns = torch.stack([operator.matvec(column) for column in eye[0]], 1)
    torch.testing.assert_close(columns, dense, rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", [name for name in OPERATORS if name not in WITHOUT_LOG])
def test_logarithmic_product(name):
    for operator in (OPERATORS[name], OPERATORS[name].T):
        n, m = operator.shape
        f, g = 20 * points(m, 1, seed=2)[:, 0], 20 * points(n, 1, seed=3)[:, 0]
        log = operator.dense().log()
        torch.testing.assert_close(operator.logmatvec(f), (log + f).logsumexp(1), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(operator.rlogmatvec(g), (log.T + g).logsumexp(1), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(operator.logmatvec(f + 1e4) - 1e4, operator.logmatvec(f), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", WITHOUT_LOG)
def test_operators_without_logarithmic_product_say_so(name):
    for operator in (OPERATORS[name], OPERATORS[name].T):
        with pytest.raises(NotImplementedError, match="has no logarithmic product, only r?matvec; a DirectKernel has both"):
            operator.logmatvec(torch.zeros(operator.shape[1]))
        with pytest.raises(NotImplementedError, match="has no logarithmic product"):
            operator.rlogmatvec(torch.zeros(operator.shape[0]))


def test_transposed_twice_is_the_operator_itself(operator):
    assert operator.T.T.dense().equal(operator.dense()) and operator.transpose.shape == operator.shape[::-1]
    assert torch.equal(operator.T.dense(), operator.dense().T)
    assert operator.T.is_positive == operator.is_positive and operator.T.device == operator.device


def test_signs():
    expected = {name: name != "cosine" for name in OPERATORS}
    assert {name: operator.is_positive for name, operator in OPERATORS.items()} == expected
    for name, operator in OPERATORS.items():
        assert (operator.dense().min() >= 0) == expected[name]


@pytest.mark.parametrize("name", OPERATORS)
def test_vectors_of_the_wrong_size(name):
    operator = OPERATORS[name]
    n, m = operator.shape
    with pytest.raises(ValueError, match=rf"expected \({m},\) or \({m}, k\) for a kernel of shape \({n}, {m}\), got \(7,\)"):
        operator.matvec(torch.zeros(7, dtype=torch.float64))
    with pytest.raises(ValueError, match=rf"got \({n}, 2, 2\)"):
        operator.rmatvec(torch.zeros(n, 2, 2, dtype=torch.float64))
    if name not in WITHOUT_LOG:
        with pytest.raises(ValueError, match=rf"expected \({m},\) for"):
            operator.logmatvec(torch.zeros(m, 1, dtype=torch.float64))


def test_registered_names():
    assert KERNEL_OPERATORS == {
        "direct": DirectKernel, "fft": GridKernel, "rff": RandomFeatureKernel, "nystrom": NystromKernel
    }  # fmt: skip


def test_own_operator():
    try:

        @register_kernel_operator("constant")
        class Constant(KernelOperator):
            """K_ij = level."""

            options = ("level",)

            def __init__(self, x, y, kernel, epsilon, scale_factors, level=1.0):
                super().__init__((len(x), len(y)), x.dtype, x.device)
                self.level = level

            def matvec(self, v):
                return self.level * v.sum(0).expand(self.shape[0], *v.shape[1:])

            def rmatvec(self, u):
                return self.level * u.sum(0).expand(self.shape[1], *u.shape[1:])

        operator = make_kernel_operator(X, Y, solver_type="constant", level=3.0, num_landmarks=5)
        assert isinstance(operator, Constant) and operator.is_positive and operator.reason == "asked for"
        assert (operator.dense() == 3).all() and (operator.T.dense() == 3).all() and operator.T.shape == (30, 24)
        with pytest.raises(NotImplementedError, match="Constant has no logarithmic product"):
            operator.logmatvec(torch.zeros(30))
        with pytest.raises(ValueError, match="kernel operator 'constant' is registered already"):
            register_kernel_operator("constant")(DirectKernel)
        with pytest.raises(ValueError, match="'auto' is registered already"):
            register_kernel_operator("auto")(DirectKernel)
    finally:
        KERNEL_OPERATORS.pop("constant", None)
