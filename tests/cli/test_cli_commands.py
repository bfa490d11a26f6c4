"""compare, train, config, profiles and check-hardware: what they print, and status 2 with one line on bad input."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest
import yaml
from conftest import build_tiny_pipeline, seeded
from PIL import Image
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

import atlas_diffusers
from atlas_diffusers.cli import launching, main
from atlas_diffusers.config import list_presets
from atlas_diffusers.config.reference import MODELS, reference
from atlas_diffusers.system import AdvancedDiffusionSystem, NoiseSchedulerConfig, SamplingMethod

ROOT = Path(__file__).parents[2]


def lines(capsys):
    return capsys.readouterr().out.strip().splitlines()


def test_compare_draws_every_pipeline(tmp_path, capsys):
    system = AdvancedDiffusionSystem()
    system.create_pipeline("one", NoiseSchedulerConfig(), SamplingMethod.DDIM)
    system.create_pipeline("two", NoiseSchedulerConfig(beta_schedule="cosine"), SamplingMethod.EULER)
    system.save_config(tmp_path / "system.yaml")
    sheet = tmp_path / "sheet.png"
    assert main(["compare", "--config", str(tmp_path / "system.yaml"), "--steps", "4", "-o", str(sheet)]) == 0
    found = lines(capsys)
    assert found[0].startswith("one: 4 calls") and found[0].endswith("distance 0.0000") and found[1].startswith("two: 4 calls")
    with Image.open(sheet) as image:
        assert image.width > 500
    assert main(["compare", "--steps", "2", "-o", str(sheet)]) == 0
    assert [line.split(":")[0] for line in lines(capsys)[:-1]] == [method.value for method in SamplingMethod]


def test_compare_a_prompt_shows_a_pipelines_pictures(tmp_path, capsys):
    pipeline = build_tiny_pipeline()
    pipeline.save_pretrained(tmp_path / "pipeline")
    command = ["compare", "red heart", "-m", str(tmp_path / "pipeline"), "--guidance", "2", "-o", str(tmp_path / "sheet.png")]
    assert main([*command, "--schedulers", "own", "heun", "ancestral", "--steps", "4", "2"]) == 0
    found = [line.replace(",", "").split() for line in lines(capsys)[:-1]]
    assert [(row[0], row[1], row[3]) for row in found] == [
        ("own", "2", "2"), ("own", "4", "4"), ("heun", "2", "3"), ("heun", "4", "7"), ("ancestral", "2", "2"),
        ("ancestral", "4", "4"),
    ]  # fmt: skip
    call = {"guidance_scale": 2.0, "output_type": "np"}
    finest = pipeline("red heart", num_inference_steps=4, generator=[seeded()], **call).images
    pipeline.scheduler = atlas_diffusers.AtlasHeunScheduler.from_config(pipeline.scheduler.config)
    heun = pipeline("red heart", num_inference_steps=2, generator=[seeded()], **call).images
    distance = float(((heun - finest) ** 2).mean() ** 0.5)
    assert float(found[1][-1]) == 0.0 and float(found[2][-1]) == pytest.approx(distance, abs=1e-3) and distance > 0.01
    with Image.open(tmp_path / "sheet.png") as image:
        assert image.size == (2 * 248 + 8, 3 * 270 + 8)
    assert main([*command, "--shape", "1", "3", "8", "8"]) == 2 and main(["compare", "--model", "atlas-emoji"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert "--shape: not read with a PROMPT" in errors[0] and "--model: not read without a PROMPT" in errors[1]


def test_train_runs_the_script_as_accelerate_is_set_up(tmp_path, monkeypatch, capsys):
    calls, statuses = [], [0, 2, -9]
    monkeypatch.setattr(launching, "_one", lambda *given: (calls.append(given), statuses.pop(0))[1])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("output_dir: out\n")
    assert main(["train", str(recipe), "--max_steps", "3"]) == 0
    script = [sys.executable, "-m", "atlas_diffusers.training.script"]
    assert calls[0][0] == [*script, "--config", str(recipe), "--max_steps", "3"]
    assert calls[0][1]["ACCELERATE_MIXED_PRECISION"] == "no"
    assert main(["train", str(recipe)]) == 2
    assert main(["train", str(recipe), "--max_step", "3"]) == 2
    assert "did you mean 'max_steps'?" in capsys.readouterr().err and len(calls) == 2


@pytest.mark.parametrize(
    "program, status",
    [
        ("sys.exit(0)", 0),
        ("sys.exit(3)", 3),
        ("os.kill(os.getpid(), 9)", 137),
        ("os.kill(os.getppid(), 15); signal.sigwait([15])", 143),
        ("os.kill(os.getppid(), 1); signal.sigwait([15])", 143),
    ],
    ids=["success", "mistake", "killed", "the command is asked to stop", "the terminal ends"],
)
def test_the_exit_status_of_the_script_is_kept(program, status):
    before = signal.getsignal(signal.SIGTERM)
    assert launching._one([sys.executable, "-c", f"import os, signal, sys; {program}"], dict(os.environ)) == status
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_signal_that_is_ignored_stays_so():
    """As SIGHUP is under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        program = """import os, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, [15])
os.kill(os.getppid(), 1)
sys.exit(3 if signal.sigtimedwait([15], 0.2) else 0)"""
        assert launching._one([sys.executable, "-c", program], dict(os.environ)) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_exit_status_of_several_processes_is_that_of_the_first_failure():
    failures = {1: ProcessFailure(local_rank=1, pid=1, exitcode=2, error_file="none")}

    def launcher(options):
        if options is not None:
            raise options

    assert launching._several(launcher, None) == 0
    assert launching._several(launcher, ChildFailedError("script", failures)) == 2
    assert launching._several(launcher, SignalException("asked", signal.SIGTERM)) == 143


@pytest.mark.parametrize(
    "text, message",
    [
        ("model: {base_chanels: 8}", "model.base_chanels: unknown key, did you mean 'base_channels'?"),
        ("scheduler: {bogus: 1}", "scheduler.bogus: unknown key"),
        ("model: {num_heads: 3}", "not divisible by num_heads=3"),
        ("loss_weighting: {name: snr}", "loss_weighting.name='snr' is unknown"),
        ("lr: 1", "lr: unknown key, did you mean 'learning_rate'?"),
    ],
)
def test_validate_looks_into_the_sections(tmp_path, capsys, text, message):
    (tmp_path / "recipe.yaml").write_text(text + "\n")
    assert main(["config", "validate", str(tmp_path / "recipe.yaml")]) == 2
    assert message in capsys.readouterr().err


def test_validate(tmp_path, capsys):
    assert main(["config", "validate", str(ROOT / "training" / "recipes" / "emoji.yaml")]) == 0
    assert lines(capsys)[0].endswith("emoji.yaml: valid")
    bad = tmp_path / "bad.yaml"
    bad.write_text(yaml.safe_dump({"output_dir": "x", "batch_size": 0, "dataset": {"resolutoin": 3}}))
    assert main(["config", "validate", str(bad)]) == 2
    error = capsys.readouterr().err
    assert "batch_size=0" in error and "did you mean 'resolution'?" in error and len(error.splitlines()) == 1
    (tmp_path / "kernel.json").write_text(json.dumps({"epsilon": 0.5}))
    assert main(["config", "validate", str(tmp_path / "kernel.json"), "--kind", "kernel"]) == 0
    assert main(["config", "validate", str(tmp_path / "nowhere.yaml")]) == 2


@pytest.mark.parametrize("recipe", sorted((ROOT / "training" / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_valid(recipe):
    assert main(["config", "validate", str(recipe)]) == 0


def test_lists(capsys):
    assert main(["config", "presets"]) == 0
    assert lines(capsys) == list_presets()
    assert main(["profiles"]) == 0
    assert [line.split()[0] for line in lines(capsys)] == ["profile", "cpu", "6gb", "8gb", "12gb", "16gb", "24gb", "32gb"]
    assert main(["check-hardware", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["settings"]


def test_the_configuration_reference_is_up_to_date():
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert page == reference()
    for model in MODELS:
        assert f"## {model.__name__}" in page
        assert all(f"| `{name}` |" in page for name in model.model_fields)


@pytest.mark.parametrize("command", ["compare", "train", "config", "generate", "evaluate", "schedulers", "bridge", "calibrate"])
def test_help_has_examples(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    found = capsys.readouterr().out
    assert "examples:" in found or "{" in found


@pytest.mark.parametrize(
    "arguments",
    [
        ["compare", "--steps", "0"],
        ["compare", "-o", "nowhere/sheet.png"],
        ["compare", "--config", "nowhere.yaml"],
        ["config", "validate"],
        ["train", "nowhere.yaml"],
        ["nothing"],
    ],
)
def test_bad_input_gives_one_line_and_status_2(arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        status = main(arguments)
    except SystemExit as stopped:
        status = stopped.code
    assert status == 2 and len(capsys.readouterr().err.strip().splitlines()) == 1


def test_ctrl_c_is_one_line(tmp_path, capsys, monkeypatch):
    def interrupted(*given):
        raise KeyboardInterrupt

    (tmp_path / "recipe.yaml").write_text("max_steps: 1\n")
    monkeypatch.setattr(launching, "launch", interrupted)
    assert main(["train", str(tmp_path / "recipe.yaml")]) == 128 + signal.SIGINT
    assert capsys.readouterr().err == "atlas-diffusers: stopped\n"
