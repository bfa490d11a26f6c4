"""``atlas-diffusers calibrate``: a copy of the folder, or the folder itself, gets the calibrated few-step solver."""

import json
import os
import re
import subprocess
import sys

import pytest
from conftest import build_tiny_pipeline, seeded
from PIL import Image
from stock_pipelines import build_stock_pipeline

from atlas_diffusers import AtlasDDIMScheduler, AtlasMultistepScheduler, AtlasPipeline
from atlas_diffusers.cli import main
from atlas_diffusers.cli.calibrate import pipeline_arguments, write_copy
from atlas_diffusers.cli.main import build_parser

SMALL = ["--steps", "3", "--trajectories", "9", "--teacher-steps", "8", "--budget", "300", "--batch-size", "9"]
quiet = pytest.mark.filterwarnings("ignore:.*calibration gives", "ignore:the steps are calibrated for")


def contents(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.fixture
def folder(tmp_path):
    scheduler = AtlasDDIMScheduler(beta_schedule="cosine", prediction_type="v_prediction")
    build_tiny_pipeline(scheduler=scheduler).save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"


@quiet
def test_a_copy_gets_the_tables_of_the_function(folder, tmp_path, capsys):
    before, new = contents(folder), tmp_path / "few"
    (tmp_path / "prompts.txt").write_text("red heart\n\nblue star\n")
    expected = AtlasMultistepScheduler.calibrate(
        AtlasPipeline.from_pretrained(folder), (3,), num_trajectories=9, teacher_steps=8, budget=300, batch_size=9,
        guidance_scale=2.0, prompts=["red heart", "blue star"], generator=seeded(4), progress=False,
    )  # fmt: skip
    arguments = ["--guidance-scale", "2", "--seed", "4", "--prompts-file", str(tmp_path / "prompts.txt")]
    assert main(["calibrate", str(folder), "-o", str(new), *SMALL, *arguments]) == 0
    printed = capsys.readouterr().out
    report = expected.calibration_report
    assert f"{report.network_calls} network calls at guidance scale 2, {report.teacher_calls} by the teacher" in printed
    assert "3 steps: " in printed and "s each, about" in printed.splitlines()[0]
    assert contents(folder) == before
    pipeline = AtlasPipeline.from_pretrained(new)
    assert type(pipeline.scheduler) is AtlasMultistepScheduler
    assert pipeline.scheduler.config.calibration == expected.config.calibration
    assert pipeline.scheduler.config.beta_schedule == "squaredcos_cap_v2"
    after = json.loads((new / "model_index.json").read_text())
    assert after == {**json.loads(before["model_index.json"]), "scheduler": ["atlas_diffusers", "AtlasMultistepScheduler"]}
    images = pipeline("red heart", num_inference_steps=3, output_type="pt", generator=seeded(0)).images
    assert images.isfinite().all()


@quiet
def test_each_of_several_guidance_scales_gets_tables(folder, tmp_path, capsys):
    cache = ["--cache", str(tmp_path / "cache")]
    assert main(["calibrate", str(folder), "-o", str(tmp_path / "two"), *SMALL, *cache, "--guidance-scale", "1", "4"]) == 0
    printed = capsys.readouterr().out
    assert "at guidance scale 1," in printed and "at guidance scale 4," in printed
    both = AtlasPipeline.from_pretrained(tmp_path / "two").scheduler.config.calibration
    assert [one["guidance_scale"] for one in both] == [1.0, 4.0] and both[0]["tables"] != both[1]["tables"]
    assert main(["calibrate", str(folder), "-o", str(tmp_path / "one"), *SMALL, *cache, "--guidance-scale", "1"]) == 0
    assert AtlasPipeline.from_pretrained(tmp_path / "one").scheduler.config.calibration == both[0]


@quiet
def test_a_stock_pipeline_of_the_copy_loads_after_an_import(tmp_path):
    """Diffusers imports no library by itself, and says so; the scheduler's own folder serves any pipeline."""
    source, new = tmp_path / "sd", tmp_path / "few"
    build_stock_pipeline("text2img").save_pretrained(source)
    call = '{"height": 64, "width": 64, "guidance_scale": 1}'
    assert main(["calibrate", str(source), "-o", str(new), *SMALL, "--call", call, "--prompts", "a red heart"]) == 0
    code = f"""
from diffusers import StableDiffusionPipeline
try:
    StableDiffusionPipeline.from_pretrained({str(new)!r})
except ValueError as error:
    print("import atlas_diffusers before calling `from_pretrained`" in str(error))
import atlas_diffusers
pipeline = StableDiffusionPipeline.from_pretrained({str(new)!r})
print(pipeline.scheduler.calibrated_steps)
print(atlas_diffusers.AtlasMultistepScheduler.from_pretrained({str(new / "scheduler")!r}).calibrated_steps)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert found.stdout.split("\n") == ["True", "[3]", "[3]", ""], found.stderr


@quiet
def test_in_place_keeps_tables_of_other_step_counts(folder):
    assert main(["calibrate", str(folder), "--in-place", *SMALL]) == 0
    first = AtlasPipeline.from_pretrained(folder).scheduler._calibration
    again = [*SMALL, "--steps", "4", "--seed", "1"]
    assert main(["calibrate", str(folder), "--in-place", *again]) == 0
    second = AtlasPipeline.from_pretrained(folder).scheduler._calibration
    assert second.tables.keys() >= first.tables.keys()
    assert all(second.tables[key] == table for key, table in first.tables.items())


def test_a_full_disk_leaves_the_folder_as_it_was(folder, tmp_path, monkeypatch):
    before = contents(folder)

    def full(source, target):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full)
    for output in (["--in-place"], ["-o", str(tmp_path / "new")]):
        assert main(["calibrate", str(folder), *output, *SMALL]) == 2
        assert contents(folder) == before and not (tmp_path / "new").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pipeline"]


@quiet
def test_the_same_command_goes_on_from_its_cache(folder, tmp_path, capsys):
    calls = []
    for name in ("first", "second"):
        assert main(["calibrate", str(folder), "-o", str(tmp_path / name), *SMALL, "--cache", str(tmp_path / "cache")]) == 0
        calls.append(int(re.search(r"^(\d+) network calls", capsys.readouterr().out, re.M)[1]))
    assert calls[0] - calls[1] >= 9 * 8, "nine trajectories of the teacher, at least eight calls each, are read"
    first, second = (contents(tmp_path / name / "scheduler") for name in ("first", "second"))
    assert first == second


def test_a_copy_that_was_killed_is_made_again(folder, tmp_path):
    (tmp_path / "new.part").mkdir()
    (tmp_path / "new.part" / "half").write_text("")
    write_copy(folder, tmp_path / "new", AtlasMultistepScheduler(prediction_type="v_prediction"))
    assert contents(tmp_path / "new").keys() == contents(folder).keys() and not (tmp_path / "new.part").exists()
    assert type(AtlasPipeline.from_pretrained(tmp_path / "new").scheduler) is AtlasMultistepScheduler


@pytest.mark.parametrize("arguments, message", [
    (["missing", "--in-place"], "missing is not the folder of a pipeline"),
    (["{folder}", "--in-place", "--steps", "1"], "step counts of at least 2"),
    (["{folder}", "--in-place", "--trajectories", "4"], "at least 8"),
    (["{folder}", "--in-place", "--guidance-scale", "5", "2", "5"], "5.0 2.0 5.0: expected scales that differ"),
    (["{folder}", "--in-place", "--prompts-file", "none.txt"], "none.txt"),
    (["{folder}", "-o", "{folder}"], "exists; choose another folder, or --in-place"),
    (["{folder}", "--in-place", "--prompts-file", "{folder}/unet/diffusion_pytorch_model.safetensors"], "is not UTF-8"),
    (["{folder}", "--in-place", "--image", "{folder}/model_index.json"], "model_index.json cannot be read"),
    (["{folder}", "--in-place", "--call", "[1]"], "--call [1]: expected an object"),
    (["{folder}", "--in-place", "--call", "height=8"], "--call height=8: expected an object"),
    (["{folder}", "--in-place", "--call", '{"latents": 0}'], "call has ['latents'], which a calibration sets itself"),
    (["{folder}", "--in-place", "--device", "banana"], "--device banana: "),
])  # fmt: skip
def test_bad_input_is_one_line_and_changes_nothing(folder, arguments, message, capsys):
    before = contents(folder)
    arguments = [argument.replace("{folder}", str(folder)) for argument in arguments]
    assert main(["calibrate", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error.splitlines()[-1]
    assert contents(folder) == before


def test_one_of_both_places_is_asked_for(folder, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["calibrate", str(folder)])
    assert "one of the arguments -o/--output --in-place is required" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["{", "[]"])
def test_an_index_that_is_no_object_is_named(folder, content, capsys):
    (folder / "model_index.json").write_text(content)
    assert main(["calibrate", str(folder), "--in-place"]) == 2
    assert "model_index.json" in capsys.readouterr().err


def test_a_transparent_picture_is_laid_on_white(tmp_path):
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    arguments = build_parser().parse_args(["calibrate", "folder", "--in-place", "--image", str(tmp_path / "clear.png")])
    assert pipeline_arguments(arguments)["image"].getpixel((0, 0)) == (255, 255, 255)


def test_damaged_weights_are_one_line(folder, capsys):
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert main(["calibrate", str(folder), "--in-place"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
