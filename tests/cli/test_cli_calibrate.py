"""``atlas-diffusers calibrate``: a folder's scheduler becomes the calibrated few-step solver."""

import json

import pytest
import torch
from conftest import build_tiny_pipeline, seeded

from atlas_diffusers import AtlasDDIMScheduler, AtlasMultistepScheduler, AtlasPipeline
from atlas_diffusers.cli import main


@pytest.fixture
def folder(tmp_path):
    scheduler = AtlasDDIMScheduler(beta_schedule="cosine", prediction_type="v_prediction")
    build_tiny_pipeline(scheduler=scheduler).save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"


@pytest.mark.filterwarnings("ignore:.*calibration gives")
def test_the_folder_gets_the_tables_of_the_function(folder, tmp_path, capsys):
    before = json.loads((folder / "model_index.json").read_text())
    (tmp_path / "prompts.txt").write_text("red heart\n\nblue star\n")
    options = ["--steps", "3", "--trajectories", "9", "--teacher-steps", "8", "--budget", "600", "--guidance-scale", "2"]
    options += ["--seed", "4"]
    expected = AtlasMultistepScheduler.calibrate(
        AtlasPipeline.from_pretrained(folder), (3,), num_trajectories=9, teacher_steps=8, budget=600, guidance_scale=2.0,
        prompts=["red heart", "blue star"], generator=seeded(4), progress=False,
    )  # fmt: skip
    assert main(["calibrate", str(folder), *options, "--prompts-file", str(tmp_path / "prompts.txt")]) == 0
    printed = capsys.readouterr().out
    assert f"{expected.calibration_report.network_calls} network calls, 72 by the teacher" in printed
    assert "3 steps: " in printed
    pipeline = AtlasPipeline.from_pretrained(folder)
    assert type(pipeline.scheduler) is AtlasMultistepScheduler
    assert pipeline.scheduler.config.calibration == expected.config.calibration
    assert pipeline.scheduler.config.beta_schedule == "squaredcos_cap_v2"
    after = json.loads((folder / "model_index.json").read_text())
    assert after == {**before, "scheduler": ["atlas_diffusers", "AtlasMultistepScheduler"]}
    images = pipeline("red heart", num_inference_steps=3, output_type="pt", generator=torch.Generator().manual_seed(0)).images
    assert images.isfinite().all()


@pytest.mark.parametrize("arguments, message", [
    (["missing"], "missing is not the folder of a pipeline"),
    (["{folder}", "--steps", "1"], "step counts of at least 2"),
    (["{folder}", "--trajectories", "4"], "at least 8"),
    (["{folder}", "--prompts-file", "none.txt"], "none.txt"),
])  # fmt: skip
def test_bad_input_is_one_line_and_changes_nothing(folder, arguments, message, capsys):
    before = (folder / "model_index.json").read_text()
    assert main(["calibrate", *(argument.format(folder=folder) for argument in arguments)]) == 2
    error = capsys.readouterr().err
    assert message in error.splitlines()[-1]
    assert (folder / "model_index.json").read_text() == before
