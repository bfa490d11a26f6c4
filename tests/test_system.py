"""The facade of the noise scheduler system: against closed forms, and with networks of every kind."""

import copy
import json

import numpy as np
import pytest
import torch
from conftest import seeded
from oracles import Gaussian
from PIL import Image
from stock_pipelines import build_stock_pipeline, silence
from torch import nn

import atlas_diffusers
from atlas_diffusers.system import (
    AdvancedDiffusionSystem,
    BaseNoiseScheduler,
    BaseSampler,
    BetaSchedule,
    DiffusionPipeline,
    GaussianModel,
    NoiseSchedulerConfig,
    NoiseSchedulerFactory,
    SamplerFactory,
    SamplingMethod,
)

FREE = {"clip_sample": False, "timestep_spacing": "trailing"}


@pytest.mark.parametrize("schedule", list(BetaSchedule))
def test_every_beta_schedule_is_its_scheduler(schedule):
    scheduler = NoiseSchedulerFactory.create_scheduler(NoiseSchedulerConfig(beta_schedule=schedule, beta_end=0.03))
    assert isinstance(scheduler, BaseNoiseScheduler)
    expected = atlas_diffusers.AtlasDDPMScheduler(beta_schedule=schedule.value, beta_end=0.03)
    torch.testing.assert_close(scheduler.betas, expected.betas)


@pytest.mark.parametrize("method", list(SamplingMethod))
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_every_sampler_gives_the_moments_of_a_gaussian(method, prediction_type):
    """N(2, 0.5²), where the original gave mean −312 and standard deviation 334."""
    pipeline = DiffusionPipeline(NoiseSchedulerConfig(prediction_type=prediction_type, **FREE), method)
    x = pipeline.sample(GaussianModel(pipeline, 2.0, 0.5), (4, 200_00), 250, generator=seeded())
    mean, std = 2.0, 0.5
    if method in (SamplingMethod.DDPM, SamplingMethod.ANCESTRAL):
        # the posterior's variance is too small between distant timesteps: its own moments, in closed form
        grid = atlas_diffusers.AtlasDDPMScheduler(timestep_spacing="trailing")
        grid.set_timesteps(250)
        mean, std = Gaussian(2.0, 0.5).ancestral_moments(grid.alphas_cumprod, grid.timesteps)
    # 5 standard errors of 80,000 draws, and half a percent for the start at N(0, 1)
    assert abs(x.mean() - mean) < 0.01 + 5 * 0.5 / 80_000**0.5 and abs(x.std() - std) < 0.0025 + 5 * 0.5 / 160_000**0.5
    assert isinstance(pipeline.sampler, BaseSampler)


def test_the_exact_model_is_the_closed_form():
    pipeline = DiffusionPipeline(NoiseSchedulerConfig(prediction_type="v_prediction"))
    x, t = torch.randn(3, 5, generator=seeded(), dtype=torch.float64), torch.tensor([10, 400, 990])
    found, gaussian = GaussianModel(pipeline, 0.3, 0.7)(x, t), Gaussian(0.3, 0.7)
    for row in range(3):
        alpha, sigma = (v.item() for v in pipeline.scheduler.levels_at(t[row : row + 1], x))
        expected = gaussian.network("v_prediction", x[row].numpy(), alpha, sigma)
        np.testing.assert_allclose(found[row], expected, rtol=1e-6)


class Linear(nn.Module):
    """Predicts a multiple of x that depends on the conditions; counts its rows."""

    def __init__(self, wrap):
        super().__init__()
        self.weight, self.wrap, self.rows = nn.Parameter(torch.tensor(0.3)), wrap, []

    def forward(self, x, t, encoder_hidden_states=None, scale=1.0):
        self.rows.append(len(x))
        shift = 0 if encoder_hidden_states is None else encoder_hidden_states.mean((1, 2)).reshape(-1, 1, 1, 1)
        return self.wrap(scale * self.weight * x + shift)


class Output:
    def __init__(self, sample):
        self.sample = sample


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x,), Output], ids=["tensor", "tuple", "output"])
def test_any_module_is_a_model(wrap):
    pipeline = DiffusionPipeline(NoiseSchedulerConfig(**FREE), SamplingMethod.DDIM)
    model, found = Linear(wrap), []
    x = pipeline.sample(
        model, (2, 3, 4, 4), 5, generator=seeded(), scale=0.5, callback=lambda i, t, sample: found.append((i, int(t), sample))
    )
    scheduler = atlas_diffusers.AtlasDDIMScheduler(timestep_spacing="trailing", steps_offset=1, clip_sample=False)
    scheduler.set_timesteps(5)
    expected = torch.randn(2, 3, 4, 4, generator=seeded())
    for t in scheduler.timesteps:
        expected = scheduler.step(0.15 * expected, t, expected).prev_sample
    torch.testing.assert_close(x, expected)
    assert model.rows == [2] * 5 and [(i, t) for i, t, _ in found] == list(enumerate(scheduler.timesteps.tolist()))
    assert torch.equal(found[-1][2], x)


def test_guidance_is_the_formula_in_one_call():
    pipeline = DiffusionPipeline(NoiseSchedulerConfig(**FREE), SamplingMethod.DDIM)
    model, states = Linear(lambda x: x), torch.full((1, 2, 3), 0.4)
    found = pipeline.sample(model, (2, 3, 4, 4), 4, 3.0, encoder_hidden_states=states, generator=seeded())
    assert model.rows == [4] * 4
    # zeros without a condition: ∅ + 3 (c − ∅) shifts by three times the conditional shift
    one = pipeline.sample(Linear(lambda x: x), (2, 3, 4, 4), 4, 1.0, encoder_hidden_states=3 * states, generator=seeded())
    torch.testing.assert_close(found, one)
    model = Linear(lambda x: x)
    pipeline.sample(model, (2, 3, 4, 4), 4, 7.5, False, encoder_hidden_states=states, generator=seeded())
    assert model.rows == [2] * 4, "guidance that is off costs one pass"


def test_a_clipped_output_is_used_where_the_configuration_says():
    """The noise that a step keeps is that of the clipped data prediction."""
    x = {}
    for clipped in (False, True):
        config = NoiseSchedulerConfig(clip_sample_range=0.2, use_clipped_model_output=clipped, timestep_spacing="trailing")
        x[clipped] = DiffusionPipeline(config, SamplingMethod.DDIM).sample(
            lambda x, t: 0.9 * x, (2, 3, 4, 4), 3, generator=seeded()
        )
        scheduler = atlas_diffusers.AtlasDDIMScheduler(clip_sample=True, clip_sample_range=0.2, timestep_spacing="trailing")
        scheduler.set_timesteps(3)
        expected = torch.randn(2, 3, 4, 4, generator=seeded())
        for t in scheduler.timesteps:
            expected = scheduler.step(0.9 * expected, t, expected, use_clipped_model_output=clipped).prev_sample
        torch.testing.assert_close(x[clipped], expected)
    assert (x[True] - x[False]).abs().max() > 1e-3


def test_an_early_stop_returns_the_sample_of_its_step():
    pipeline = DiffusionPipeline(NoiseSchedulerConfig(**FREE), SamplingMethod.EULER)
    seen = []
    x = pipeline.sample(
        GaussianModel(pipeline), (1, 3, 4, 4), 8, generator=seeded(), callback=lambda i, t, s: seen.append(s),
        early_stop=lambda i, t, s: i == 2,
    )  # fmt: skip
    assert len(seen) == 3 and torch.equal(x, seen[-1])


@pytest.mark.usefixtures("float64")
def test_a_network_of_stable_diffusion():
    with silence():
        stock = build_stock_pipeline("text2img")
    unet = copy.deepcopy(stock.unet).double()
    states = torch.randn(1, 7, unet.config.cross_attention_dim, generator=seeded(3))
    pipeline = DiffusionPipeline(NoiseSchedulerConfig(**FREE), SamplingMethod.DDIM)
    shape = (1, unet.config.in_channels, 16, 16)
    x = torch.randn(shape, generator=seeded())
    found = pipeline.sample(unet, shape, 3, 2.0, encoder_hidden_states=states, latents=x)
    scheduler = atlas_diffusers.AtlasDDIMScheduler(timestep_spacing="trailing", steps_offset=1, clip_sample=False)
    scheduler.set_timesteps(3)
    with torch.no_grad():
        for t in scheduler.timesteps:
            c, u = (unet(x, t, encoder_hidden_states=s).sample for s in (states, torch.zeros_like(states)))
            x = scheduler.step(u + 2 * (c - u), t, x).prev_sample
    torch.testing.assert_close(found, x)


def test_clipping_is_read_from_the_configuration():
    pipeline = DiffusionPipeline(NoiseSchedulerConfig(clip_sample_range=0.25), SamplingMethod.EULER)
    assert pipeline.sample(GaussianModel(pipeline), (8, 100), 20, generator=seeded()).abs().max() <= 0.25 + 1e-6
    thresholding = NoiseSchedulerConfig(thresholding=True, sample_max_value=1.0, dynamic_thresholding_ratio=0.5)
    pipeline = DiffusionPipeline(thresholding, SamplingMethod.EULER)
    assert pipeline.sampler.config.dynamic_thresholding_ratio == 0.5


@pytest.fixture
def system():
    made = AdvancedDiffusionSystem()
    made.create_pipeline("linear", NoiseSchedulerConfig(**FREE), SamplingMethod.DDIM)
    made.create_pipeline("cosine", NoiseSchedulerConfig(beta_schedule="cosine", **FREE), SamplingMethod.HEUN)
    return made


def test_a_comparison_is_every_pipelines_own_sample(system, tmp_path):
    found = system.compare_schedulers((2, 3, 8, 8), 10, seed=4)
    assert list(found) == ["linear", "cosine"] and found.network_calls == {"linear": 10, "cosine": 19}
    for name, pipeline in system.pipelines.items():
        expected = pipeline.sample(GaussianModel(pipeline), (2, 3, 8, 8), 10, generator=seeded(4))
        assert torch.equal(found[name], expected)
    assert found.distances["linear"] == 0
    difference = (found["cosine"] - found["linear"]).square().mean().sqrt().item()
    assert found.distances["cosine"] == pytest.approx(difference) and min(found.seconds.values()) > 0
    found.plot(tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 2 * 280


@pytest.mark.parametrize("name", ["system.yaml", "system.json"])
def test_files_round_trip(system, tmp_path, name):
    system.save_config(tmp_path / name)
    again = AdvancedDiffusionSystem(tmp_path / name)
    assert again.configs == system.configs
    assert [p.sampling_method for p in again.pipelines.values()] == [SamplingMethod.DDIM, SamplingMethod.HEUN]
    assert "pickle" not in (tmp_path / name).read_text() and "!!" not in (tmp_path / name).read_text()


def test_a_configuration_changes_at_run_time(system):
    before = system.get_pipeline("linear")
    changed = system.update_config("linear", beta_end=0.05, sampling_method="euler")
    assert changed is system.get_pipeline("linear") and changed is not before
    assert changed.config.beta_end == 0.05 and changed.sampling_method is SamplingMethod.EULER
    with pytest.raises(ValueError, match="beta_end=2.*less than 1"):
        system.update_config("linear", beta_end=2)
    assert system.get_pipeline("linear") is changed


def test_every_mistake_of_a_file_is_named(tmp_path, system):
    file = tmp_path / "bad.json"
    file.write_text(json.dumps({"a": {"beta_strat": 1e-4, "beta_end": 3}, "b": {"sampling_method": "magic"}, "c": 3}))
    with pytest.raises(ValueError) as error:
        system.load_config(file)
    message = str(error.value)
    for part in ("bad.json", "beta_strat: unknown key, did you mean 'beta_start'?", "beta_end=3", "'magic'", "found 3"):
        assert part in message
    assert system.list_pipelines() == ["linear", "cosine"]
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ValueError, match="must be a mapping"):
        system.load_config(tmp_path / "list.yaml")


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda s: s.get_pipeline("none"), r"pipeline 'none' is unknown; there are \['linear', 'cosine'\]"),
        (lambda s: AdvancedDiffusionSystem().compare_schedulers((1, 3, 4, 4)), "there is no pipeline to compare"),
        (lambda s: s.get_pipeline("linear").sample(torch.zeros_like, (3,)), r"shape=\(3,\)"),
        (lambda s: s.get_pipeline("linear").sample(lambda x, t: x[:, :1], (1, 3), 2, generator=seeded()), "the model gives"),
        (lambda s: NoiseSchedulerConfig(sample_padding_norm=2.0), "had no effect in the original"),
        (lambda s: NoiseSchedulerConfig(beta_start=0.5, beta_end=0.1), "must not exceed"),
        (
            lambda s: SamplerFactory.create_sampler(SamplingMethod.DDIM, s.get_pipeline("linear").scheduler, eta_max=1),
            r"AtlasDDIMScheduler has no options \['eta_max'\]",
        ),
    ],
)
def test_bad_input_is_named(system, make, message):
    with pytest.raises(ValueError, match=message):
        make(system)
