"""The pictures of transport between one's own data show what the plan says."""

import pytest
import torch
from conftest import seeded
from matplotlib.colors import to_hex
from PIL import Image

from atlas_diffusers.pictures import plot_couplings, plot_paths, plot_plan
from atlas_diffusers.pictures.styling import INKS
from atlas_diffusers.transport import entropic_transport


def points(count, dimension, seed):
    return torch.randn(count, dimension, generator=seeded(seed), dtype=torch.float64)


def test_the_plan_and_its_marginals_are_drawn(tmp_path):
    found = entropic_transport(points(6, 2, 0), points(9, 2, 1), epsilon=0.5)
    figure = plot_plan(found, tmp_path / "plan.png")
    above, corner, middle, right = figure.axes[:4]
    assert torch.allclose(torch.as_tensor(middle.images[0].get_array().data), found.plan.double())
    assert sum(bar.get_height() for bar in above.patches) == pytest.approx(1)
    assert [bar.get_width() for bar in right.patches] == pytest.approx([1 / 6] * 6, rel=1e-2)
    assert Image.open(tmp_path / "plan.png").size == (900, 840)
    same = plot_plan(found.plan.numpy(), tmp_path / "plan.svg", dark=True)
    assert (same.axes[2].images[0].get_array() == middle.images[0].get_array()).all()
    assert to_hex(same.get_facecolor()) == INKS[True][0]


def test_lines_join_the_heaviest_pairs(tmp_path):
    x, y = points(5, 2, 0), points(5, 2, 1)
    plan = torch.zeros(5, 5)
    plan[2, 4], plan[0, 1] = 0.75, 0.25
    lines = plot_couplings(x, y, plan, tmp_path / "c.png").axes[0].get_lines()[:2]
    assert [line.get_xydata().tolist() for line in lines] == [[x[2].tolist(), y[4].tolist()], [x[0].tolist(), y[1].tolist()]]
    assert lines[0].get_alpha() == pytest.approx(3 * lines[1].get_alpha())


def test_pictures_stand_beside_their_heaviest_targets(tmp_path):
    x, y = torch.rand(2, 3, 4, 4, generator=seeded(0)), torch.rand(6, 3, 4, 4, generator=seeded(1))
    plan = torch.eye(2, 6) + 0.25
    figure = plot_couplings(x, y, plan, tmp_path / "c.png")
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[0] == "source 0" and titles[1] == "target 0: 50%" and titles[6] == "source 1" and titles[7] == "target 1: 50%"


def test_paths_are_drawn_in_principal_axes(tmp_path):
    """A path in a plane of five dimensions keeps its lengths."""
    plane = torch.linalg.qr(points(5, 2, 0)).Q.T
    flat = torch.randn(4, 30, 2, generator=seeded(1), dtype=torch.float64)
    axes = plot_paths(flat @ plane, tmp_path / "p.png").axes[0]
    drawn = torch.stack([torch.as_tensor(line.get_xydata()) for line in axes.get_lines()], 1)
    torch.testing.assert_close(torch.cdist(drawn[0], drawn[3]), torch.cdist(flat[0], flat[3]))
    assert axes.get_xlabel() == "principal axis 1"


def test_paths_of_pictures_are_a_film(tmp_path):
    film = torch.rand(20, 9, 3, 4, 4, generator=seeded(0))
    figure = plot_paths(film, tmp_path / "p.png")
    assert len(figure.axes) == 6 * 7
    assert [axes.get_title() for axes in figure.axes[:7]] == [f"t = {k / 19:.2f}" for k in (0, 3, 6, 10, 13, 16, 19)]


@pytest.mark.parametrize("draw, message", [
    (lambda path: plot_plan(torch.ones(3), path), r"a matrix \(n, m\)"),
    (lambda path: plot_plan(-torch.ones(3, 3), path), "finite masses from 0"),
    (lambda path: plot_couplings(torch.ones(3, 2), torch.ones(3, 3), None, path), "do not fit"),
    (lambda path: plot_paths(torch.ones(3, 2), path), "expected .times, n, d."),
])  # fmt: skip
def test_what_does_not_fit_is_named(draw, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        draw(tmp_path / "x.png")
    assert not list(tmp_path.iterdir())
