"""The presets in ``schedulers/``: files, table and samples."""

import json
import runpy
from pathlib import Path

import diffusers
import pytest
import torch
from conftest import seeded
from oracles import Gaussian

import atlas_diffusers
from atlas_diffusers.schedulers import SigmaScheduler
from atlas_diffusers.schedules import get_betas

FOLDER = Path(__file__).parents[2] / "schedulers"
SCRIPT = runpy.run_path(str(FOLDER / "build_presets.py"))
PRESETS = SCRIPT["presets"]()
EACH = pytest.mark.parametrize("name", PRESETS)
GAUSSIAN = Gaussian()


def load(name):
    class_name = json.loads((FOLDER / name / "scheduler_config.json").read_text(encoding="utf-8"))["_class_name"]
    return getattr(atlas_diffusers, class_name).from_pretrained(FOLDER / name)


def test_script_writes_the_committed_files(tmp_path):
    SCRIPT["main"]([str(tmp_path)])
    written, committed = (
        {str(file.relative_to(folder)): file.read_text(encoding="utf-8") for file in folder.rglob("*.json")}
        for folder in (tmp_path, FOLDER)
    )
    assert written == committed, "run `python schedulers/build_presets.py`"
    assert sorted(PRESETS) == sorted(Path(file).parent.name for file in committed)


def test_files_are_small():
    assert max(f.stat().st_size for f in FOLDER.rglob("*.json")) < 1000


@EACH
def test_preset_is_the_tables(name, caplog):
    class_name, options = PRESETS[name]
    scheduler = load(name)
    assert not caplog.records
    assert type(scheduler).__name__ == class_name
    named = {"squaredcos_cap_v2": "cosine"}.get(scheduler.config.beta_schedule, scheduler.config.beta_schedule)
    assert {option: scheduler.config[option] for option in options} | {"beta_schedule": named} == options
    if not options.get("rescale_betas_zero_snr"):
        betas = get_betas(options["beta_schedule"], 1000, options["beta_start"], options["beta_end"])
        assert torch.equal(scheduler.betas, betas)


@EACH
def test_preset_samples_the_gaussian(name):
    """From the exact law of the first level, 4096 samples have the data's mean, and its spread to 30% in 20 steps."""
    scheduler = load(name)
    scheduler.set_timesteps(20)
    generator = seeded(0)
    z = torch.randn(4096, 1, 1, 1, generator=generator, dtype=torch.float64)
    if isinstance(scheduler, SigmaScheduler):
        x = GAUSSIAN.flow(z, 1, scheduler.sigmas[0].item())
    else:
        x = GAUSSIAN.flow(z, *scheduler.levels_at(scheduler.timesteps[:1], z))
    extra = {"generator": generator} if "ancestral" in name else {}
    for t in scheduler.timesteps:
        seen = scheduler.scale_model_input(x, t)
        output = GAUSSIAN.network(scheduler.config.prediction_type, seen, *scheduler.levels_at(t.reshape(1), seen))
        x = scheduler.step(output, t, x, **extra).prev_sample
    standard_error = GAUSSIAN.std / len(z) ** 0.5
    assert x.mean().item() == pytest.approx(GAUSSIAN.mean, abs=5 * standard_error)
    assert x.std().item() == pytest.approx(GAUSSIAN.std, rel=0.3)


@pytest.mark.parametrize("name", ["linear-ddim", "cosine-ddim", "stable-diffusion-1.5-ddim", "zero-snr-v-prediction-ddim"])
def test_preset_reads_the_same_in_diffusers(name):
    stock, ours = diffusers.DDIMScheduler.from_pretrained(FOLDER / name), load(name)
    assert torch.equal(stock.betas, ours.betas)
    assert stock.config.clip_sample == ours.config.clip_sample


@pytest.mark.parametrize("beta_schedule", ["quadratic", "sigmoid", "exponential", "laplace", "karras"])
def test_diffusers_refuses_a_schedule_that_it_does_not_know(beta_schedule):
    with pytest.raises(NotImplementedError, match=f"{beta_schedule} is not implemented"):
        diffusers.DDIMScheduler.from_pretrained(FOLDER / f"{beta_schedule}-ddim")
