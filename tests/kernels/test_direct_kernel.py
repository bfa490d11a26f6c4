"""The exact operator: blocks, memory, logarithmic products, batches, gradients, freshness of what it keeps."""

import pytest
import torch
from oracles import kernel_matrix, points, squared_distances

from atlas_diffusers.kernels import DirectKernel
from atlas_diffusers.training.memory import LiveBytes

KERNELS = ("gaussian", "laplacian", "cauchy")


def exact(x, y, kernel, epsilon, factors=(1.0,)):
    """Dense float64 kernel from differences."""
    return kernel_matrix(squared_distances(x, y), kernel, epsilon, factors)


@pytest.mark.parametrize("factors", [None, [0.5, 1.0, 2.0]])
@pytest.mark.parametrize("dim", [2, 64])
@pytest.mark.parametrize("kernel", KERNELS)
def test_products_against_the_dense_float64_kernel(kernel, dim, factors):
    x, y, epsilon = points(50, dim), points(70, dim, seed=1), dim**0.5
    true = exact(x, y, kernel, epsilon, factors or (1.0,))
    v, u, f, g = points(70, seed=2), points(50, 3, seed=3), 9 * points(70, seed=4), 9 * points(50, seed=5)
    for max_bytes in (2**30, 10_000):
        K = DirectKernel(x, y, kernel, epsilon, factors, max_bytes)
        torch.testing.assert_close(K.dense(), true, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(K.matvec(v), true @ v, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(K.rmatvec(u), true.T @ u, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(K.logmatvec(f), (true.log() + f).logsumexp(1), rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(K.rlogmatvec(g), (true.log().T + g).logsumexp(1), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dim", [2, 3072])
def test_float32_kernel_to_six_digits(dim):
    x, y = points(80, dim, dtype=torch.float32), points(60, dim, seed=1, dtype=torch.float32) + 0.1
    K = DirectKernel(x, y, epsilon=dim**0.5)
    assert (K.dense() / exact(x, y, "gaussian", dim**0.5) - 1).abs().max() < 3e-6


@pytest.mark.parametrize("kernel", KERNELS)
def test_diagonal_is_exactly_one_even_for_a_tiny_bandwidth(kernel):
    x = points(30, 4096, dtype=torch.float32)
    K = DirectKernel(x, x, kernel, epsilon=1e-6)
    assert (K.dense().diagonal() == 1).all()
    f = points(30, seed=1, dtype=torch.float32)
    if kernel != "cauchy":
        assert torch.equal(K.dense(), torch.eye(30)) and torch.equal(K.logmatvec(f), f)


def test_logarithmic_product_where_the_kernel_underflows():
    """Far-apart clouds at a small bandwidth: every entry is exp(−10⁴ and less), every product 0."""
    x, y, epsilon = points(40, 3), points(30, 3, seed=1) + 10, 0.1
    f, g = points(30, seed=2), 1e4 * points(40, seed=3)
    log = -(x[:, None] - y).square().sum(-1) / (2 * epsilon**2)
    for max_bytes in (2**30, 2000):
        K = DirectKernel(x, y, epsilon=epsilon, max_bytes=max_bytes)
        assert (K.matvec(f.exp()) == 0).all()
        torch.testing.assert_close(K.logmatvec(f), (log + f).logsumexp(1), rtol=1e-12, atol=0)
        torch.testing.assert_close(K.rlogmatvec(g), (log.T + g).logsumexp(1), rtol=1e-12, atol=0)
    weightless = f.clone()
    weightless[5:] = -torch.inf
    torch.testing.assert_close(K.logmatvec(weightless), (log + weightless).logsumexp(1), rtol=1e-12, atol=0)
    assert (K.logmatvec(torch.full_like(f, -torch.inf)) == -torch.inf).all()


@pytest.mark.parametrize("dim", [3, 40])
def test_blocks_agree_with_the_whole(dim):
    x, y = points(101, dim, dtype=torch.float32), points(77, dim, seed=1, dtype=torch.float32)
    v, u = points(77, 2, seed=2, dtype=torch.float32).exp(), points(101, seed=3, dtype=torch.float32).exp()
    whole = DirectKernel(x, y, epsilon=3.0)
    for max_bytes in (1, 5000, 20_000, 101 * 77 * 4 - 1):
        blocks = DirectKernel(x, y, epsilon=3.0, max_bytes=max_bytes)
        torch.testing.assert_close(blocks.matvec(v), whole.matvec(v), rtol=1e-6, atol=0)
        torch.testing.assert_close(blocks.rmatvec(u), whole.rmatvec(u), rtol=1e-6, atol=0)
        torch.testing.assert_close(blocks.logmatvec(v[:, 0]), whole.logmatvec(v[:, 0]), rtol=1e-6, atol=1e-6)
        assert blocks._kept is None
    assert whole._kept is not None


@pytest.mark.parametrize("kernel, factors", [("gaussian", None), ("laplacian", [1.0, 2.0])])
@pytest.mark.parametrize("dim, outlier", [(2, 0.0), (40, 0.0), (40, 1e6)])
def test_memory_stays_under_the_bound(dim, outlier, kernel, factors):
    """A matrix of 2 MB under a bound of 256 kB; the points and vectors may come on top."""
    x, y = points(700, dim, dtype=torch.float32), points(700, dim, seed=1, dtype=torch.float32)
    x[0] += outlier
    v, max_bytes = points(700, seed=2, dtype=torch.float32), 2**18
    allowance = 4 * (x.nbytes + v.nbytes)
    K = DirectKernel(x, y, kernel, 1.0, factors, max_bytes)
    for product in (K.matvec, K.rmatvec, K.logmatvec):
        with LiveBytes() as memory:
            product(v)
        assert max_bytes / 4 < memory.peak < max_bytes + allowance
    with LiveBytes() as memory:
        DirectKernel(x, x, kernel, 1.0, factors).matvec(v)
    assert 700 * 700 * 4 < memory.peak < 700 * 700 * 4 + 2**23 + allowance


@pytest.mark.parametrize("dim", [2, 20])
@pytest.mark.parametrize("kernel, max_bytes", [*((kernel, 2**30) for kernel in KERNELS), ("laplacian", 50)])
def test_gradients_against_finite_differences(kernel, dim, max_bytes):
    inputs = [points(2, dim), points(2, dim, seed=1), points(2, seed=2), points(2, seed=3)]
    inputs = [tensor.requires_grad_() for tensor in inputs]

    def products(x, y, f, g):
        K = DirectKernel(x, y, kernel, dim**0.5, [0.7, 1.5], max_bytes)
        return K.matvec(f), K.rmatvec(g), K.logmatvec(f), K.rlogmatvec(g)

    assert torch.autograd.gradcheck(products, inputs)


def test_gradient_where_points_coincide():
    x = points(5, 20).requires_grad_()
    v = points(5, seed=1)
    DirectKernel(x, x.detach(), epsilon=2.0).matvec(v).sum().backward()
    difference = x.detach()[:, None] - x.detach()
    expected = -(exact(x.detach(), x.detach(), "gaussian", 2.0) * v)[..., None] * difference / 4
    torch.testing.assert_close(x.grad, expected.sum(1))
    for kernel in KERNELS:
        x.grad = None
        DirectKernel(x, x.detach(), kernel).logmatvec(v).sum().backward()
        assert x.grad.isfinite().all()


@pytest.mark.parametrize("max_bytes", [2**30, 5000])
@pytest.mark.parametrize("dim", [3, 24])
def test_batches_are_their_members(dim, max_bytes):
    x, y = points(2, 3, 20, dim), points(3, 30, dim, seed=1)
    v, V, u = points(2, 3, 30, seed=2), points(2, 3, 30, 4, seed=3), points(2, 3, 20, seed=4)
    K = DirectKernel(x, y, "cauchy", 2.0, max_bytes=max_bytes)
    assert K.shape == (20, 30) and K.dense().shape == (2, 3, 20, 30)
    for i in range(2):
        for j in range(3):
            one = DirectKernel(x[i, j], y[j], "cauchy", 2.0)
            torch.testing.assert_close(K.dense()[i, j], one.dense())
            torch.testing.assert_close(K.matvec(v)[i, j], one.matvec(v[i, j]))
            torch.testing.assert_close(K.matvec(V)[i, j], one.matvec(V[i, j]))
            torch.testing.assert_close(K.T.matvec(u)[i, j], one.rmatvec(u[i, j]))
            torch.testing.assert_close(K.logmatvec(v)[i, j], one.logmatvec(v[i, j]))
            torch.testing.assert_close(K.rlogmatvec(u)[i, j], one.rlogmatvec(u[i, j]))
    with pytest.raises(ValueError, match=r"expected leading dimensions \(2, 3\), got a vector of shape \(30,\)"):
        K.matvec(v[0, 0])


def test_another_cloud_of_the_same_shape_has_its_own_matrix():
    """The original cached Gram matrices by shape, dtype and device."""
    x, y, v = points(30, 2), points(30, 2, seed=1), points(30, seed=2)
    first = DirectKernel(x, y).matvec(v)
    assert torch.equal(DirectKernel(x, y).matvec(v), first)
    second = DirectKernel(y, x).matvec(v)
    torch.testing.assert_close(second, exact(y, x, "gaussian", 1.0) @ v)
    assert (first - second).abs().max() > 0.1


def test_matrix_follows_points_that_are_modified_in_place():
    x, y, v = points(30, 2), points(20, 2, seed=1), points(20, seed=2)
    K = DirectKernel(x, y)
    before = K.matvec(v)
    assert torch.equal(K.matvec(v), before)
    x += 1
    torch.testing.assert_close(K.matvec(v), exact(x, y, "gaussian", 1.0) @ v)
    K.dense().zero_()
    torch.testing.assert_close(K.matvec(v), exact(x, y, "gaussian", 1.0) @ v)


def test_kept_matrix_does_not_cut_gradients():
    x, y, v = points(6, 2).requires_grad_(), points(5, 2, seed=1), points(5, seed=2)
    K = DirectKernel(x, y)
    with torch.no_grad():
        K.matvec(v)
    for _ in range(2):
        (gradient,) = torch.autograd.grad(K.matvec(v).sum(), x)
        assert gradient.abs().max() > 0.01
    with torch.inference_mode():
        inner = x * 2
        torch.testing.assert_close(DirectKernel(inner, y).matvec(v), exact(inner, y, "gaussian", 1.0) @ v)


@pytest.mark.parametrize(
    "x, y, message",
    [
        (torch.zeros(3, 2), torch.zeros(4, 3), r"got \(3, 2\) and \(4, 3\)"),
        (torch.zeros(3), torch.zeros(4, 3), r"points must be \(\.\.\., n, d\) and \(\.\.\., m, d\)"),
        (torch.zeros(0, 2), torch.zeros(4, 2), "none empty"),
        (torch.zeros(3, 2), torch.zeros(4, 2).double(), "got torch.float32 and torch.float64"),
        (torch.zeros(3, 2).half(), torch.zeros(4, 2).half(), "must both be float32 or both float64"),
        (torch.zeros(3, 2), torch.tensor([[0.0, torch.nan]]), "points y must be finite; 1 coordinates"),
        (torch.full((3, 2), torch.inf), torch.zeros(4, 2), "points x must be finite; 6 coordinates"),
    ],
)
def test_wrong_points(x, y, message):
    with pytest.raises(ValueError, match=message):
        DirectKernel(x, y)


def test_wrong_budget():
    with pytest.raises(ValueError, match="max_bytes=0 must be at least 1"):
        DirectKernel(torch.zeros(3, 2), torch.zeros(3, 2), max_bytes=0)


def test_gradient_of_vectors_does_not_store_the_matrix():
    x, y = points(500, 2), points(500, 2, seed=1)
    v = points(500, seed=2).requires_grad_()
    K = DirectKernel(x, y, max_bytes=2**17)
    with LiveBytes() as memory:
        K.matvec(v).sum().backward()
    assert memory.peak < 2**18
    torch.testing.assert_close(v.grad, exact(x, y, "gaussian", 1.0).sum(0))
