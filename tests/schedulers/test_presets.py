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
from atlas_diffusers.schedules import Flow, get_betas

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
    is_flow = "shift" in options
    assert {option: scheduler.config[option] for option in options} | ({} if is_flow else {"beta_schedule": named}) == options
    assert isinstance(scheduler.process, Flow) == is_flow
    if not is_flow and not options.get("rescale_betas_zero_snr"):
        betas = get_betas(options["beta_schedule"], 1000, options["beta_start"], options["beta_end"])
        assert torch.equal(scheduler.betas, betas)


@EACH
def test_preset_samples_the_gaussian(name):
    """From the exact law of the first level, 4096 samples have the data's mean, and its spread to 30% in 20 steps."""
    scheduler = load(name)
    scheduler.set_timesteps(20, mu=1.0 if scheduler.config.use_dynamic_shifting else None)
    generator = seeded(0)
    z = torch.randn(4096, 1, 1, 1, generator=generator, dtype=torch.float64)
    x = GAUSSIAN.flow(z, *scheduler._grid.source[0])
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


@pytest.mark.parametrize("family, stock", [
    ("stable-diffusion-3", {"shift": 3.0}),
    ("flux-dev", {"shift": 3.0, "use_dynamic_shifting": True}),
    ("flux-schnell", {"shift": 1.0}),
    ("qwen-image", {"use_dynamic_shifting": True, "shift_terminal": 0.02, "max_shift": 0.9, "max_image_seq_len": 8192}),
    ("wan-2.1-720p", {"shift": 5.0}),
    ("sana", {"shift": 3.0}),
])  # fmt: skip
def test_flow_preset_has_the_published_models_sigmas(family, stock):
    ours, theirs = load(f"{family}-euler"), diffusers.FlowMatchEulerDiscreteScheduler(**stock)
    mu = {"mu": 0.8} if stock.get("use_dynamic_shifting") else {}
    sigmas = [1 - k / 12 for k in range(12)]  # as pipelines give them
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(sigmas=sigmas, **mu)
    torch.testing.assert_close(ours.sigmas, theirs.sigmas, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("beta_schedule", ["quadratic", "sigmoid", "exponential", "laplace", "karras"])
def test_diffusers_refuses_a_schedule_that_it_does_not_know(beta_schedule):
    with pytest.raises(NotImplementedError, match=f"{beta_schedule} is not implemented"):
        diffusers.DDIMScheduler.from_pretrained(FOLDER / f"{beta_schedule}-ddim")
