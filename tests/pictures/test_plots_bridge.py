"""The picture of the Schrödinger-bridge step, and the subcommand that draws it."""

import pytest
import torch
from conftest import seeded
from PIL import Image
from safetensors.torch import save_file

from atlas_diffusers.bridges import SchrodingerBridgeSolver
from atlas_diffusers.cli import main
from atlas_diffusers.pictures.plots_bridge import BIAS, SPREAD, denoise, plot_bridge, ring, shares, trajectories

pytest.importorskip("matplotlib")


def test_the_network_of_the_picture_is_a_posterior_mean():
    """Against the average over many draws of the ring, weighted by likelihood."""
    points, x, alpha, sigma = ring(80_000, 3), torch.randn(5, 2, generator=seeded(4), dtype=torch.float64), 0.8, 0.6
    prior = BIAS[torch.arange(80_000) % 8].log()
    expected = (prior - torch.cdist(x, alpha * points).square() / (2 * sigma**2)).softmax(1) @ points
    torch.testing.assert_close(denoise(x, alpha, sigma, BIAS), expected, rtol=0, atol=5 * SPREAD / 80_000**0.5 * 8)


def test_the_bridge_balances_the_modes():
    alone, calls = trajectories(False)
    bridged, fewer = trajectories(True)
    even = torch.full((8,), 1 / 8)
    assert calls == 40 and fewer <= 10
    assert (shares(alone[-1]) - even).abs().sum() > 0.5 > 10 * (shares(bridged[-1]) - even).abs().sum()
    assert torch.equal(alone[0], bridged[0])


def test_the_first_panel_is_the_gates_measure(tmp_path):
    references = torch.randn(60, 3, 4, 4, generator=seeded(1))
    figure = plot_bridge(references, tmp_path / "bridge.png", gate=5.0)
    curve, gate, shut = figure.axes[0].get_lines()
    at = dict(zip(curve.get_xdata().tolist(), curve.get_ydata()))
    assert gate.get_ydata()[0] == 5.0
    assert at[-5.0] == pytest.approx(59, rel=1e-2) and at[1.0] == pytest.approx(1, abs=0.1)
    first = min(value for value, size in at.items() if size < 5.0)
    assert shut.get_xdata()[0] == first
    solver = SchrodingerBridgeSolver(references)
    alpha, sigma = (1 + torch.e**4) ** -0.5, (1 + torch.e**-4) ** -0.5
    assert at[-2.0] == pytest.approx(solver.posterior_size(alpha, sigma), rel=1e-6)


def test_the_command_draws_references_of_a_file(tmp_path, capsys):
    save_file({"references": torch.randn(30, 3, 4, 4, generator=seeded(1))}, tmp_path / "r.safetensors")
    assert main(["bridge", "plot", str(tmp_path / "r.safetensors"), "-o", str(tmp_path / "b.png")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "b.png")
    assert Image.open(tmp_path / "b.png").size == (1320, 840)


@pytest.mark.parametrize("arguments, message", [
    (["-o", "bridge.txt"], "ends in .png or .svg"),
    (["--gate", "0.5", "-o", "b.png"], "gate=0.5"),
    (["missing.safetensors"], "missing.safetensors"),
])  # fmt: skip
def test_bad_input_is_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["bridge", "plot", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_paths_of_ones_own_take_the_place_of_the_ring(tmp_path):
    references = torch.randn(40, 1, 2, 2, generator=seeded(1))
    ends = {"network alone": references[:20] + 9, "with the bridge": references[:20]}
    paths = {name: torch.stack([torch.zeros_like(end), end]) for name, end in ends.items()}
    figure = plot_bridge(references, tmp_path / "b.png", 5.0, paths, dark=True)
    bars = {bars.get_label(): [bar.get_height() for bar in bars] for bars in figure.axes[1].containers}
    precision, _, _, coverage = zip(bars["network alone"], bars["with the bridge"])
    assert precision == (0, 1) and coverage[0] == 0 < coverage[1]
    assert [axes.get_title() for axes in figure.axes[2:]] == [f"{name}: 20 paths of 1 steps" for name in ends]
    with pytest.raises(ValueError, match="expected two of shape"):
        plot_bridge(references, tmp_path / "b.png", 5.0, {"alone": paths["network alone"]})


def test_the_command_draws_a_pipelines_own_paths(tmp_path, tiny_pipeline, capsys):
    tiny_pipeline.save_pretrained(tmp_path / "tiny")
    for i in range(9):
        Image.new("RGB", (8, 8), (20 * i, 0, 0)).save(tmp_path / f"{i}.png")
    arguments = ["bridge", "plot", str(tmp_path), "-m", str(tmp_path / "tiny"), "-n", "6", "--prompt", "red heart"]
    assert main([*arguments, "-o", str(tmp_path / "b.png")]) == 0
    assert Image.open(tmp_path / "b.png").size == (1320, 840)
    assert main(["bridge", "plot", str(tmp_path), "-o", str(tmp_path / "b.png")]) == 2
    assert "its pictures need a size, that of --model" in capsys.readouterr().err
