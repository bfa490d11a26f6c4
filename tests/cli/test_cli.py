import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
from conftest import build_tiny_pipeline, seeded
from PIL import Image

from atlas_diffusers.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    build_tiny_pipeline().save_pretrained(folder)
    return str(folder)


def test_one_picture_equals_the_pipelines(folder, tmp_path, capsys):
    output = tmp_path / "heart.png"
    arguments = ["--model", folder, "--steps", "4", "--guidance", "2", "--seed", "5"]
    assert main(["generate", "red heart", "-o", str(output), *arguments]) == 0
    expected = build_tiny_pipeline()("red heart", num_inference_steps=4, guidance_scale=2.0, generator=[seeded(5)]).images[0]
    np.testing.assert_array_equal(np.array(Image.open(output)), np.array(expected))
    assert capsys.readouterr().out.strip() == str(output.resolve())


def test_several_pictures_are_laid_out_in_the_order_of_the_prompts(folder, tmp_path):
    output = tmp_path / "grid.png"
    assert main(["generate", "red heart", "blue star", "--count", "2", "-o", str(output), "--model", folder]) == 0
    sheet = np.array(Image.open(output))
    prompts = ["red heart"] * 2 + ["blue star"] * 2
    expected = build_tiny_pipeline()(prompts, generator=[seeded(i) for i in range(4)]).images
    for i, image in enumerate(expected):
        y, x = 8 + i // 2 * (160 + 8 + 22), 8 + i % 2 * (160 + 8)
        np.testing.assert_array_equal(sheet[y : y + 160 : 20, x : x + 160 : 20], np.array(image))


def test_a_negative_prompt_is_the_pipelines(folder, tmp_path):
    output, arguments = tmp_path / "heart.png", ["--steps", "3", "--guidance", "4", "--seed", "5", "--negative", "blue star"]
    assert main(["generate", "red heart", "-o", str(output), "--model", folder, *arguments]) == 0
    call = {"num_inference_steps": 3, "guidance_scale": 4.0}
    expected, without = (
        np.array(build_tiny_pipeline()("red heart", **call, **negative, generator=[seeded(5)]).images[0])
        for negative in ({"negative_prompt": "blue star"}, {})
    )
    found = np.array(Image.open(output))
    np.testing.assert_array_equal(found, expected)
    assert not np.array_equal(found, without)


@pytest.mark.parametrize("name", [name for name in dir(diffusers) if name.endswith("Scheduler")])
def test_every_scheduler_of_diffusers_samples_or_says_why_not(name, folder, tmp_path, capsys):
    output = ["-o", str(tmp_path / "a.png")]
    status = main(["generate", "red heart", *output, "--model", folder, "--scheduler", name, "--steps", "4"])
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("atlas-diffusers: ")]
    assert (status, len(error), (tmp_path / "a.png").exists()) in ((0, 0, True), (2, 1, False))


@pytest.mark.parametrize("name, steps", [("ddpm", 3), ("EulerDiscreteScheduler", 3)])
def test_scheduler_is_swapped(folder, tmp_path, name, steps):
    outputs = [tmp_path / "a.png", tmp_path / "b.png"]
    for output, extra in zip(outputs, ([], ["--scheduler", name])):
        assert main(["generate", "red heart", "-o", str(output), "--model", folder, "--steps", str(steps), *extra]) == 0
    a, b = (np.array(Image.open(output)) for output in outputs)
    assert a.shape == b.shape and not np.array_equal(a, b)


BAD = [
    (["--model", "no-such"], "no pipeline 'no-such'"),
    (["--steps", "0"], "--steps 0"),
    (["--count", "0"], "--count 0"),
    (["--scheduler", "bogus"], "scheduler 'bogus' is unknown; allowed are ['cosinenoise', 'ddim', 'ddpm'"),
    (["--device", "banana"], "--device banana: "),
    (["--device", "cuda:77"], "--device cuda:77: "),
    (["--scheduler", "RePaintScheduler"], "RePaintScheduler cannot sample with this pipeline: RePaintScheduler.step() missing"),
    (["--scheduler", "KarrasVeScheduler"], "KarrasVeScheduler cannot sample with this pipeline"),
    (["-o", "picture.txt"], "picture.txt: expected a picture file name"),
    (["-o", "picture.psd"], "picture.psd: expected a picture file name"),
    (["-o", "no-such-folder/a.png"], "folder no-such-folder does not exist"),
]


@pytest.mark.parametrize("extra, message", BAD, ids=[m for _, m in BAD])
def test_bad_input_is_one_line_and_status_2(folder, tmp_path, capsys, extra, message):
    arguments = ["generate", "red heart", "-o", str(tmp_path / "x.png"), "--model", folder, *extra]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "x.png").exists()


def test_damaged_weights_are_one_line_and_status_2(folder, tmp_path, capfd):
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    assert main(["generate", "red heart", "-o", str(tmp_path / "x.png"), "--model", str(copy)]) == 2
    error = capfd.readouterr().err
    assert error.startswith("atlas-diffusers: ") and "diffusion_pytorch_model.safetensors" in error and error.count("\n") == 1


USAGE = [
    [], ["generate"], ["bogus"], ["generate", "a", "--steps", "many"],
    ["generate", "a\udcff"], ["generate", "a", "--negative", "\udcff"],
]  # fmt: skip


@pytest.mark.parametrize("arguments", USAGE, ids=ascii)
def test_wrong_usage_is_one_line_and_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["generate", "--help"])
    assert stop.value.code == 0 and 'atlas-diffusers generate "red heart" -o heart.png' in capsys.readouterr().out
