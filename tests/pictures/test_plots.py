"""The pictures of schedules, and the subcommand that draws them."""

import json
import sys
from pathlib import Path
from xml.etree import ElementTree

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import atlas_diffusers
from atlas_diffusers.cli import main
from atlas_diffusers.pictures.plots import plot_schedules
from atlas_diffusers.pipelines.named_schedulers import load_scheduler

pytest.importorskip("matplotlib")

PRESETS = Path(__file__).parents[2] / "schedulers"
SCHEDULERS = {
    "cosine": atlas_diffusers.CosineNoiseScheduler(),
    "euler": atlas_diffusers.AtlasEulerScheduler(use_karras_sigmas=True),
    "heun": atlas_diffusers.AtlasHeunScheduler(),
    "zero-snr": atlas_diffusers.AtlasDDIMScheduler(
        rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing"
    ),
    "stock ddim": diffusers.DDIMScheduler(timestep_spacing="trailing", num_train_timesteps=700),
    "stock heun": diffusers.HeunDiscreteScheduler(),
    "stock dpm": diffusers.DPMSolverMultistepScheduler(use_karras_sigmas=True),
}


@pytest.fixture(scope="module")
def panels(tmp_path_factory):
    figure = plot_schedules(SCHEDULERS, 7, tmp_path_factory.mktemp("plot") / "all.png")
    return [axes.get_lines() for axes in figure.axes]


@pytest.mark.parametrize("row, name", list(enumerate(SCHEDULERS)))
def test_curves_are_the_schedulers_numbers(panels, row, name):
    scheduler = SCHEDULERS[name]
    alpha_bar = scheduler.alphas_cumprod.double().numpy()
    with np.errstate(divide="ignore"):
        log_snr = np.log(np.sqrt(alpha_bar) / np.sqrt(1 - alpha_bar))
    for lines, expected in zip(panels, (scheduler.betas.numpy(), alpha_bar, log_snr)):
        np.testing.assert_array_equal(lines[row].get_xdata(), np.arange(len(alpha_bar)))
        np.testing.assert_allclose(lines[row].get_ydata(), expected, rtol=1e-6, atol=1e-9)
        assert lines[row].get_label() == name


@pytest.mark.parametrize("row, name", list(enumerate(SCHEDULERS)))
def test_markers_are_at_the_steps_log_snr(panels, row, name):
    scheduler = type(SCHEDULERS[name]).from_config(SCHEDULERS[name].config)
    scheduler.set_timesteps(7)
    line = panels[3][row]
    np.testing.assert_array_equal(line.get_ydata(), row)
    drawn = line.get_xdata()
    if name in ("euler", "heun", "stock heun", "stock dpm"):
        expected = -np.log(scheduler.sigmas[:-1].double().numpy())
    else:
        alpha_bar = scheduler.alphas_cumprod[scheduler.timesteps.long()].double().numpy()
        with np.errstate(divide="ignore"):
            expected = np.log(alpha_bar / (1 - alpha_bar)) / 2
    np.testing.assert_allclose(drawn, expected, rtol=1e-5, atol=1e-6)
    assert len(np.unique(drawn)) == 7 and (np.diff(drawn) >= 0).all()


def test_axes_fit_the_finite_values(tmp_path):
    figure = plot_schedules({"zero-snr": SCHEDULERS["zero-snr"]}, 7, tmp_path / "a.png")
    assert np.isfinite([limit for axes in figure.axes for limit in (*axes.get_xlim(), *axes.get_ylim())]).all()


def test_schedulers_are_not_changed(tmp_path):
    scheduler = atlas_diffusers.AtlasEulerScheduler()
    scheduler.set_timesteps(3)
    timesteps = scheduler.timesteps
    plot_schedules({"euler": scheduler}, 7, tmp_path / "a.png")
    assert scheduler.timesteps is timesteps and scheduler.num_inference_steps == 3


def test_global_matplotlib_is_left_alone(tmp_path):
    def figures():
        pyplot = sys.modules.get("matplotlib.pyplot")
        return pyplot.get_fignums() if pyplot else []

    before = figures()
    plot_schedules({"euler": atlas_diffusers.AtlasEulerScheduler()}, 7, tmp_path / "a.png")
    assert figures() == before


def test_missing_matplotlib_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"atlas-diffusers\[plot\]"):
        plot_schedules({"euler": atlas_diffusers.AtlasEulerScheduler()}, 7, tmp_path / "a.png")


@pytest.mark.parametrize("schedulers, steps", [({}, 5), ({"euler": atlas_diffusers.AtlasEulerScheduler()}, 0)])
def test_nothing_to_draw(schedulers, steps, tmp_path):
    with pytest.raises(ValueError, match="at least one scheduler and one step"):
        plot_schedules(schedulers, steps, tmp_path / "a.png")


# ------------------------------------------------------------------ command line


@pytest.mark.parametrize("command", ["schedulers", "schedules"])
@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_command_writes_a_picture(command, suffix, tmp_path, capsys):
    output = tmp_path / f"a.{suffix}"
    assert main([command, "plot", "euler:cosine", "EulerDiscreteScheduler", "--steps", "4", "-o", str(output)]) == 0
    assert capsys.readouterr().out.strip() == str(output.resolve())
    if suffix == "png":
        assert Image.open(output).size == (1320, 840)
    else:
        assert ElementTree.parse(output).getroot().tag.endswith("svg")


@pytest.mark.parametrize(
    "name, cls, beta_schedule",
    [
        ("ddim", "AtlasDDIMScheduler", "linear"),
        ("euler-ancestral:sigmoid", "AtlasEulerAncestralScheduler", "sigmoid"),
        ("cosinenoise", "CosineNoiseScheduler", "squaredcos_cap_v2"),
        ("DPMSolverMultistepScheduler:scaled_linear", "DPMSolverMultistepScheduler", "scaled_linear"),
        (str(PRESETS / "quadratic-heun"), "AtlasHeunScheduler", "quadratic"),
        ("atlas-emoji", "AtlasMultistepScheduler", "squaredcos_cap_v2"),
    ],
)
def test_names(name, cls, beta_schedule):
    scheduler = load_scheduler(name)
    assert type(scheduler).__name__ == cls and scheduler.config.beta_schedule == beta_schedule


def test_pipeline_folder_of_diffusers(tmp_path):
    (tmp_path / "scheduler").mkdir()
    config = {"_class_name": "PNDMScheduler", "beta_end": 0.012}
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    scheduler = load_scheduler(str(tmp_path))
    assert type(scheduler) is diffusers.PNDMScheduler and torch.equal(scheduler.betas[-1], torch.tensor(0.012))


BAD = [
    (["bogus"], "scheduler 'bogus' is unknown; allowed are ["),
    (["ddim:bogus"], "beta_schedule='bogus' is unknown; registered are ["),
    (["DDIMScheduler:karras"], "DDIMScheduler:karras: karras is not implemented"),
    (["FlowMatchEulerDiscreteScheduler"], "FlowMatchEulerDiscreteScheduler has no betas or alphas_cumprod"),
    (["FlowMatchEulerDiscreteScheduler:linear"], "has no beta schedule to choose"),
    (["."], "folder . has neither scheduler_config.json nor scheduler/scheduler_config.json"),
    (["ddim", "--steps", "0"], "one step, got 1 and 0"),
    (["ddim", "--steps", "2000"], "num_inference_steps=2000"),
    (["ddim", "-o", "a.pdf"], "output a.pdf: expected a file name that ends in .png or .svg"),
    (["ddim", "-o", "no-such-folder/a.png"], "folder no-such-folder does not exist"),
]


@pytest.mark.parametrize("arguments, message", BAD, ids=[m for _, m in BAD])
def test_bad_input_is_one_line_and_status_2(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["schedulers", "plot", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_missing_matplotlib_is_one_line_and_status_2(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["schedulers", "plot", "ddim", "-o", str(tmp_path / "a.png")]) == 2
    assert "atlas-diffusers[plot]" in capsys.readouterr().err


def test_list_has_every_class(capsys):
    assert main(["schedulers", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == atlas_diffusers.SCHEDULERS
    assert all(len(line.split()) > 4 for line in lines)
