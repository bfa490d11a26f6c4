import pytest
import torch
from conftest import seeded

from atlas_diffusers.metrics import energy_distance, kid, manifold_overlap, points

METRICS = [kid, energy_distance, manifold_overlap]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    "x, y, message",
    [
        (torch.zeros(9, 2), torch.zeros(9, 3), "same dimension d >= 1; got 2 and 3"),
        (torch.zeros(9, 0), torch.zeros(9, 0), "same dimension d >= 1; got 0 and 0"),
        (torch.zeros(9, 2), torch.zeros(9), r"shape \(n, d\); got torch.float32 \(9,\)"),
        (torch.zeros(9, 2, dtype=torch.int64), torch.zeros(9, 2), r"floating point of shape \(n, d\); got torch.int64"),
        (torch.zeros(9, 2), torch.zeros(0, 2), "has 0 points; expected at least"),
        (torch.zeros(9, 2), torch.tensor([[0.0, float("nan")]] * 9), "must be finite; 9 coordinates"),
        (torch.tensor([[0.0, float("inf")]] + [[0.0, 0.0]] * 8), torch.zeros(9, 2), "must be finite; 1 coordinates"),
        (torch.zeros(9, 2), torch.zeros(9, 2, device="meta"), "on one device; got cpu and meta"),
    ],
)
def test_wrong_points_are_named(metric, x, y, message):
    with pytest.raises(ValueError, match=message):
        metric(x, y)


@pytest.mark.parametrize("metric", METRICS)
def test_small_blocks_change_nothing(metric, monkeypatch):
    x, y = torch.randn(23, 4, generator=seeded()), torch.randn(31, 4, generator=seeded(1)) + 0.5
    whole = metric(x, y)
    monkeypatch.setattr(points, "BLOCK_BYTES", 8 * 31 * 5)
    assert metric(x, y) == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize("metric", METRICS)
def test_half_precision_counts_in_float64(metric):
    x, y = torch.randn(20, 3, generator=seeded()).bfloat16(), torch.randn(20, 3, generator=seeded(1)).bfloat16()
    assert metric(x, y) == metric(x.double(), y.double())


def test_squared_distances_far_from_the_origin():
    x, y = (torch.randn(n, 50, generator=seeded(n), dtype=torch.float64) + 1e6 for n in (40, 30))
    exact = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square()
    blocks = torch.cat([block for _, block in points.squared_distance_blocks(x, y)])
    torch.testing.assert_close(blocks, exact, rtol=1e-9, atol=0)


def test_blocks_bound_the_memory():
    step = points.BLOCK_BYTES // 8 // 5000
    slices = list(points.row_blocks(9000, 5000))
    assert [s.start for s in slices] == list(range(0, 9000, step)) and step * 5000 * 8 <= 2**26
    assert [s.start for s in points.row_blocks(3, 10**9)] == [0, 1, 2]
