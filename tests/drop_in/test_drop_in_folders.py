"""Our schedulers are saved and loaded, alone and as a part of Diffusers' pipelines, also by a process that starts afresh."""

import inspect
import json
import os
import subprocess
import sys

import diffusers
import pytest
import torch
from conftest import seeded
from safetensors.torch import load_file
from stock_pipelines import STOCK, build_stock_pipeline, run, silence, swap

import atlas_diffusers

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # Diffusers with numpy 2
NAMES = pytest.mark.parametrize("name", atlas_diffusers.SCHEDULERS)
KEPT = ("num_train_timesteps", "beta_start", "beta_end", "prediction_type", "steps_offset", "skip_prk_steps")
OPTIONS = {
    "num_train_timesteps": 400,
    "beta_start": 0.0003,
    "beta_end": 0.015,
    "beta_schedule": "sigmoid",
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "rescale_betas_zero_snr": True,
    "clip_sample": True,
    "clip_sample_range": 2.5,
}


def public(config) -> dict:
    return {key: value for key, value in config.items() if key != "_use_default_values"}


def sample(scheduler):
    """A trajectory of five steps with a network of one line."""
    x, generator = torch.randn(2, 3, 8, 8, generator=seeded()), seeded(1)
    scheduler.set_timesteps(5)
    x = x * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        output = torch.tanh(scheduler.scale_model_input(x, t))
        noise = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
        x = scheduler.step(output, t, x, **noise).prev_sample
    return x


@pytest.mark.parametrize("options", [{}, OPTIONS], ids=["defaults", "options"])
@NAMES
def test_a_scheduler_is_what_was_saved(name, options, tmp_path):
    scheduler = getattr(atlas_diffusers, name)(**options)
    with silence():
        scheduler.save_pretrained(tmp_path)
        loaded = type(scheduler).from_pretrained(tmp_path)
    assert json.loads((tmp_path / "scheduler_config.json").read_text())["_class_name"] == name
    assert public(loaded.config) == public(scheduler.config)
    assert torch.equal(loaded.betas, scheduler.betas)
    assert torch.equal(sample(loaded), sample(scheduler))


@NAMES
def test_every_class_reads_what_another_saved(name, tmp_path):
    """The noise process; other defaults of the saved class become choices, as with Diffusers' own classes."""
    swapped = swap(build_stock_pipeline("text2img"), name).scheduler
    swapped.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "scheduler_config.json").read_text())
    for other in atlas_diffusers.SCHEDULERS:
        cls = getattr(atlas_diffusers, other)
        with silence():
            loaded, converted = cls.from_pretrained(tmp_path), cls.from_config(swapped.config)
        assert torch.equal(loaded.betas, converted.betas)
        assert loaded.config.items() >= {key: saved[key] for key in KEPT}.items()


@pytest.mark.parametrize("options", [{}, OPTIONS], ids=["defaults", "options"])
@NAMES
def test_diffusers_reads_what_was_saved(name, options, tmp_path):
    scheduler = getattr(atlas_diffusers, name)(**{**options, "rescale_betas_zero_snr": False})
    scheduler.save_pretrained(tmp_path)
    for stock in STOCK.values():
        with silence():
            loaded = getattr(diffusers, stock).from_pretrained(tmp_path)
        torch.testing.assert_close(loaded.alphas_cumprod, scheduler.alphas_cumprod, rtol=0, atol=1e-6, msg=stock)
        assert loaded.config.prediction_type == scheduler.config.prediction_type


# ------------------------------------------------------------------ whole pipelines

FRESH = """
import json, logging, sys
from pathlib import Path
import atlas_diffusers
from diffusers import DiffusionPipeline
import torch
from safetensors.torch import save_file
torch.set_num_threads(1)
messages = []
handler = logging.Handler(logging.WARNING)
handler.emit = lambda record: messages.append(record.getMessage())
logging.getLogger("diffusers").addHandler(handler)
root, found, shared = Path(sys.argv[1]), {}, {}
options = json.loads(sys.argv[2])
for folder in sorted(path.parent for path in root.glob("*/model_index.json")):
    pipeline = DiffusionPipeline.from_pretrained(folder, **shared)
    shared = {name: part for name, part in pipeline.components.items() if name != "scheduler" and part is not None}
    pipeline.set_progress_bar_config(disable=True)
    pictures = pipeline(**options, generator=torch.Generator().manual_seed(3), output_type="pt")[0]
    save_file({"pictures": pictures}, root / f"{folder.name}.safetensors")
    config = {k: v for k, v in pipeline.scheduler.config.items() if k != "_use_default_values"}
    found[folder.name] = [type(pipeline).__name__, type(pipeline.scheduler).__name__, config]
(root / "found.json").write_text(json.dumps({"messages": messages, "found": found}))
"""
CALL = {
    "prompt": "a red heart",
    "negative_prompt": "blurry",
    "guidance_scale": 5.0,
    "num_inference_steps": 2,
    "height": 64,
    "width": 64,
}


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """Folders of a pipeline with every class, here, and what one new process made of them all."""
    root = tmp_path_factory.mktemp("pipelines")
    here = {}
    for name in atlas_diffusers.SCHEDULERS:
        pipeline = swap(build_stock_pipeline("text2img"), name)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.save_pretrained(root / name)
        here[name] = pipeline.scheduler.config, pipeline(**CALL, generator=seeded(3), output_type="pt")[0]
    home = str(tmp_path_factory.mktemp("home"))
    # the environment also chooses the instruction set, without which pictures differ in the last digits
    env = os.environ | {"HOME": home, "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-c", FRESH, str(root), json.dumps(CALL)]
    result = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    there = json.loads((root / "found.json").read_text())
    return root, here, there


@NAMES
def test_a_fresh_process_loads_the_pipeline_and_makes_the_same_picture(fresh, name):
    root, here, there = fresh
    config, pictures = here[name]
    index = json.loads((root / name / "model_index.json").read_text())
    assert index["scheduler"] == ["atlas_diffusers", name]
    assert there["found"][name][:2] == ["StableDiffusionPipeline", name]
    loaded = there["found"][name][2]
    assert {k: loaded[k] for k in public(config)} == json.loads(json.dumps(public(config)))
    assert torch.equal(load_file(root / f"{name}.safetensors")["pictures"], pictures)


def test_the_fresh_process_heard_no_warning(fresh):
    assert fresh[2]["messages"] == []


@pytest.mark.parametrize("kind", ["xl", "controlnet", "animatediff"])
def test_other_pipelines_are_saved_and_loaded(kind, tmp_path):
    pipeline = swap(build_stock_pipeline(kind), "AtlasHeunScheduler")
    pipeline.save_pretrained(tmp_path)
    with torch.random.fork_rng():
        loaded = type(pipeline).from_pretrained(tmp_path)
    assert type(loaded.scheduler) is atlas_diffusers.AtlasHeunScheduler
    assert public(loaded.scheduler.config).items() >= public(pipeline.scheduler.config).items()
    assert torch.equal(run(kind, loaded, 2).pictures, run(kind, pipeline, 2).pictures)
