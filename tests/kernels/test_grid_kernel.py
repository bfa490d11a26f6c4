"""Grids: separable products and zero-padded FFT against the dense kernel; no wrap-around, no shift, no negative round-off."""

import pytest
import torch
from oracles import kernel_matrix, squared_distances

from atlas_diffusers.kernels import DirectKernel, GridKernel
from atlas_diffusers.kernels.grid import find_grid, grid_points

KERNELS = ("gaussian", "laplacian", "cauchy")
GRIDS = [
    ((1,), 1.0), ((7,), 0.3), ((8,), 1.0), ((5, 8), 1.0), ((7, 7), 0.5), ((6, 1), 2.0), ((4, 9), (0.5, 2.0)),
    ((3, 4, 5), 1.0), ((5, 3, 3), (1.0, 0.25, 2.0)), ((2, 2, 2), 1.0),
]  # fmt: skip


def exact(shape, spacing, kernel, epsilon, factors=(1.0,)):
    """Dense float64 kernel from the multi-indices of C order."""
    spacing = torch.tensor([spacing] * len(shape) if isinstance(spacing, float) else spacing, dtype=torch.float64)
    index = torch.stack(torch.unravel_index(torch.arange(torch.Size(shape).numel()), shape), 1) * spacing
    return kernel_matrix(squared_distances(index, index), kernel, epsilon, factors)


@pytest.mark.parametrize("factors", [None, [0.5, 3.0]])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shape, spacing", GRIDS)
def test_products_against_the_dense_kernel(shape, spacing, kernel, factors):
    true = exact(shape, spacing, kernel, 1.3, factors or (1.0,))
    K = GridKernel(shape, kernel, 1.3, spacing, factors, dtype=torch.float64)
    v = torch.randn(len(true), 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(K.dense(), true, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(K.matvec(v), true @ v, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(K.matvec(v[:, 0]), true @ v[:, 0], rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(K.rmatvec(v), true @ v, rtol=1e-11, atol=1e-12)
    single = K.matvec(v.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), true @ v, rtol=1e-5, atol=1e-5)
    if kernel == "gaussian":
        f = 30 * v[:, 0]
        torch.testing.assert_close(K.logmatvec(f), (true.log() + f).logsumexp(1), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shape", [(9,), (10,), (9, 12), (5, 6, 7)])
def test_a_point_mass_stays_in_place_and_does_not_wrap_around(kernel, shape):
    """The original moved odd grids by a pixel and let the last pixel see the first as its neighbour."""
    K = GridKernel(shape, kernel, 2.0, dtype=torch.float64)
    for start in ([0] * len(shape), [size // 2 for size in shape], [size - 1 for size in shape]):
        mass = torch.zeros(shape, dtype=torch.float64)
        mass[tuple(start)] = 1
        spread = K.matvec(mass.flatten()).reshape(shape)
        assert torch.unravel_index(spread.argmax(), shape) == tuple(torch.tensor(start))
        for stop in ([0] * len(shape), [size - 1 for size in shape]):
            distance = torch.tensor([a - b for a, b in zip(start, stop)], dtype=torch.float64).norm()
            value = DirectKernel(torch.zeros(1, 1).double(), distance.reshape(1, 1), kernel, 2.0).dense()
            assert float(spread[tuple(stop)]) == pytest.approx(float(value), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("epsilon", [0.5, 1.0])
def test_fft_of_a_concentrated_mass_is_nowhere_negative(epsilon, dtype):
    """Plain FFT gives −1e-17 where exp(−90) is exact: fatal to a scaling algorithm. Here at least the smallest entry."""
    v = torch.zeros(64 * 64, dtype=dtype)
    v[:3] = 1e3
    K = GridKernel((64, 64), "laplacian", epsilon, dtype=dtype)
    padded = torch.fft.rfft2(v.double().reshape(64, 64), s=(127, 127))
    offsets = torch.minimum(torch.arange(127), 127 - torch.arange(127)).double()
    table = torch.exp(-torch.hypot(offsets[:, None], offsets) / epsilon)
    assert torch.fft.irfft2(padded * torch.fft.rfft2(table), s=(127, 127))[:64, :64].min() < 0
    smallest = 3e3 * torch.exp(torch.tensor(-63 * 2**0.5 / epsilon, dtype=torch.float64))
    result = K.matvec(v)
    assert result.min() >= float(smallest) * (1 - 1e-6)
    # a vector of both signs keeps its negative values
    assert K.matvec(-v).min() < -900


def test_logarithmic_product_where_the_kernel_underflows():
    shape, epsilon = (6, 20), 0.02
    K = GridKernel(shape, epsilon=epsilon, dtype=torch.float64)
    f = torch.full((120,), -torch.inf, dtype=torch.float64)
    f[[3, 77]] = torch.tensor([0.5, -0.25], dtype=torch.float64)
    assert K.matvec(f.exp())[119] == 0
    points = grid_points(shape, (1.0, 1.0))
    log = -(points[:, None] - points).square().sum(-1) / (2 * epsilon**2)
    torch.testing.assert_close(K.logmatvec(f), (log + f).logsumexp(1), rtol=1e-13, atol=1e-12)
    torch.testing.assert_close(K.logmatvec(f.float()).double(), (log + f).logsumexp(1), rtol=1e-6, atol=1e-6)


def test_large_grid_without_its_matrix():
    """96 x 80 x 64 = 491,520 points, against rows of the true kernel."""
    shape, generator = (96, 80, 64), torch.Generator().manual_seed(0)
    v = torch.rand(491_520, generator=generator)
    points = grid_points(shape, (1.0, 1.0, 1.0)).float()
    rows = torch.randperm(491_520, generator=generator)[:20]
    for kernel in ("gaussian", "cauchy"):
        true = DirectKernel(points[rows].double(), points.double(), kernel, 3.0).matvec(v.double())
        found = GridKernel(shape, kernel, 3.0).matvec(v)[rows]
        torch.testing.assert_close(found.double(), true, rtol=3e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape, spacing", [s for s in GRIDS if torch.Size(s[0]).numel() > 1])
def test_grids_are_recognised(shape, spacing, dtype):
    spacing = (spacing,) * len(shape) if isinstance(spacing, float) else spacing
    points = (grid_points(shape, spacing) + 0.7).to(dtype)
    found, steps = find_grid(points)
    assert found == shape
    assert all(step == pytest.approx(given, rel=1e-5) for step, given, size in zip(steps, spacing, shape) if size > 1)
    K = GridKernel.from_points(points, points.clone(), kernel="cauchy", epsilon=1.0)
    torch.testing.assert_close(K.dense(), DirectKernel(points, points, "cauchy").dense(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(K.points[0] + 0.7, points, rtol=1e-6, atol=1e-6)
    assert K.dtype == dtype


@pytest.mark.parametrize("change", ["moved", "missing", "order", "uneven", "four dimensions"])
def test_points_that_are_no_grid(change):
    points = grid_points((4, 5), (1.0, 1.0))
    match change:
        case "moved":
            points[7, 1] += 1e-9
        case "missing":
            points = points[:-1]
        case "order":
            points = points.reshape(4, 5, 2).transpose(0, 1).reshape(20, 2)
        case "uneven":
            points = points.square()
        case "four dimensions":
            points = torch.stack(torch.meshgrid(*[torch.arange(2.0)] * 4, indexing="ij"), -1).reshape(-1, 4)
    assert find_grid(points) is None
    with pytest.raises(ValueError, match="solver_type='fft' needs x and y to be the same regular grid"):
        GridKernel.from_points(points, points, kernel="gaussian", epsilon=1.0)
    grid = grid_points((4, 5), (1.0, 1.0))
    with pytest.raises(ValueError, match="the same regular grid"):
        GridKernel.from_points(grid, grid + 1, kernel="gaussian", epsilon=1.0)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"shape": ()}, r"shape=\(\) must have one to three positive sizes"),
        ({"shape": (2, 2, 2, 2)}, "one to three"),
        ({"shape": (4, 0)}, "positive sizes"),
        ({"shape": (4, 4), "spacing": 0.0}, "spacing=0.0 must be positive"),
        ({"shape": (4, 4), "spacing": (1.0, 1.0, 1.0)}, r"one for each axis of shape \(4, 4\)"),
        ({"shape": (4,), "epsilon": -1}, "epsilon=-1"),
        ({"shape": (4,), "kernel": "box"}, "kernel 'box' is unknown"),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(ValueError, match=message):
        GridKernel(**arguments)
