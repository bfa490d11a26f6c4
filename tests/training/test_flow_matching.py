"""Flow matching: times, the loss, its weights, and a pipeline that follows what was learned."""

import typing

import pytest
import torch
from conftest import seeded
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from test_objectives import PLAIN, batch_of, record
from test_trainer import build, recipe

from atlas_diffusers import AtlasEulerScheduler, AtlasPipeline
from atlas_diffusers.config import TrainingConfig, validate
from atlas_diffusers.training import objectives
from atlas_diffusers.training.losses import WEIGHTINGS, flow_times, loss_weighting
from atlas_diffusers.training.objective_table import OBJECTIVES

FLOW = {**PLAIN, "objective": "flow_matching", "scheduler": None, "min_snr_gamma": None}


@settings(max_examples=40, deadline=None, database=None)
@given(
    st.integers(1, 64), st.floats(0.2, 8), st.none() | st.tuples(st.floats(-1.5, 1.5), st.floats(0.3, 2)), st.integers(0, 99)
)
def test_every_stratum_has_one_time(batch, shift, logit_normal, seed):
    times = flow_times(batch, seeded(seed), shift, logit_normal).double()
    u = times / (shift - (shift - 1) * times)
    if logit_normal is not None:
        u = torch.special.ndtr((torch.logit(u) - logit_normal[0]) / logit_normal[1])
    # float32 times near 1 have steps of 6e-8, which the inverse of a shift below 1 spreads, as do the tails of a Gaussian
    place = (u * batch).sort().values
    assert torch.all((place - torch.arange(batch) > -1e-3) & (place - torch.arange(batch) < 1 + 1e-3))


def test_the_loss_is_its_formula(tmp_path, monkeypatch):
    run = build(tmp_path, **FLOW, timestep_shift=3.0, time_distribution="logit_normal", logit_mean=0.4)
    batch, calls = batch_of(run), record(run, monkeypatch)
    expected = flow_times(6, seeded(), 3.0, (0.4, 1.0))
    with torch.no_grad():
        loss = run.objective(batch, seeded())
        x, times, *_ = calls[0]
        torch.testing.assert_close(times, 1000 * expected)
        noise = torch.stack([torch.randn(3, 32, 32, generator=seeded(int(draw))) for draw in batch["draw"]]).double()
        s, data = expected.double().reshape(-1, 1, 1, 1), batch["pixels"].double()
        torch.testing.assert_close(x.double(), (1 - s) * data + s * noise, rtol=1e-5, atol=1e-5)
        output = run.networks["unet"](x, times).sample
    assert loss.item() == pytest.approx((output - (noise - data)).square().mean().item(), rel=1e-5)


def test_weights_carry_over_to_velocities(tmp_path, monkeypatch):
    """Min-SNR weighs the error of the data, which is s times that of the velocity."""
    run = build(tmp_path, **FLOW, loss_weighting={"name": "min_snr", "gamma": 2.0})
    monkeypatch.setattr(run.objective, "_predict", lambda sample, *rest: torch.zeros_like(sample))
    batch, weights = batch_of(run, 4), []
    monkeypatch.setattr(objectives, "denoising_loss", lambda *args: (weights.append((args[4], args[6])), args[0].sum())[1])
    run.objective(batch, seeded())
    s, found = (each.double() for each in weights[0])
    torch.testing.assert_close(found, torch.clamp(((1 - s) / s) ** 2, max=2.0) * s**2, rtol=1e-4, atol=1e-6)


def test_the_pipeline_follows_the_velocity_from_noise_to_data(tmp_path):
    folder = build(tmp_path, **FLOW, max_steps=2, timestep_shift=3.0, sample_interval=2, sample_steps=2).train()
    assert (tmp_path / "sample-000002.png").exists()
    with torch.random.fork_rng():
        pipeline = AtlasPipeline.from_pretrained(folder)
    assert type(pipeline.scheduler) is AtlasEulerScheduler and pipeline.scheduler.config.shift == 3.0
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(2, 3, 32, 32, generator=seeded())
    arguments = {"num_images_per_prompt": 2, "num_inference_steps": 3, "output_type": "latent", "guidance_scale": 1.0}
    found = pipeline(**arguments, latents=noise).images
    stock = FlowMatchEulerDiscreteScheduler(shift=3.0)
    stock.set_timesteps(3)
    x, sigmas = noise, stock.sigmas
    with torch.no_grad():
        for sigma, after in zip(sigmas, sigmas[1:]):
            x = x + (after - sigma) * pipeline.unet(x, 1000 * sigma.repeat(2)).sample
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-4)
    assert sigmas[0] == 1 and (found - noise).std() > 0.01


@pytest.mark.parametrize("name", ["FlowMatchHeunDiscreteScheduler", "AtlasMultistepScheduler"])
def test_the_recipe_may_name_the_scheduler(tmp_path, name):
    options = {"use_flow_sigmas": True} if name.startswith("Atlas") else {}
    run = build(tmp_path, **{**FLOW, "scheduler": {"_class_name": name, "shift": 2.0, **options}})
    assert type(run.components.scheduler).__name__ == name and run.components.scheduler.config.shift == 2.0


# ---------------------------------------------------------------------- tables


def test_the_recipe_knows_every_objective():
    assert list(typing.get_args(TrainingConfig.model_fields["objective"].annotation)) == list(OBJECTIVES)


def test_short_fields_are_rows_of_the_table(tmp_path):
    weights = {"min_snr_gamma": ("min_snr", "gamma"), "p2_gamma": ("p2", "gamma"), "edm_sigma_data": ("edm", "sigma_data")}
    assert {name for name, _ in weights.values()} == set(WEIGHTINGS)
    for field, (name, option) in weights.items():
        config = TrainingConfig(**{field: 0.7})
        assert config.loss_weighting == {"name": name, option: 0.7}
        assert TrainingConfig(**config.model_dump()) == config
        assert TrainingConfig(**{field: None, "loss_weighting": {"name": "p2"}}).loss_weighting == {"name": "p2"}
    assert TrainingConfig().loss_weighting is None


@pytest.mark.parametrize("name, options", [("min_snr", {"gamma": 2.0}), ("p2", {"gamma": 0.5, "k": 2.0}), ("edm", {})])
def test_a_weighting_is_its_function_with_its_options(name, options):
    levels = torch.tensor([0.9, 0.3]), torch.tensor([0.1, 0.7])
    expected = WEIGHTINGS[name]("epsilon", *levels, **options)
    torch.testing.assert_close(loss_weighting(name, **options)("epsilon", *levels), expected)
    assert expected.unique().numel() == 2


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"loss_weighting": {"name": "snr"}}, "name='snr' is unknown; allowed are ['min_snr', 'p2', 'edm']"),
        ({"loss_weighting": {"name": "p2", "gama": 1.0}}, "gama: unknown key, did you mean 'gamma'? (p2 has gamma, k)"),
        ({"loss_weighting": {"name": "p2", "gamma": -1.0}}, "loss_weighting: {'gamma': -1.0}; expected positive numbers"),
        ({"loss_weighting": {"gamma": 5.0}}, "loss_weighting needs a name"),
        ({"loss_weighting": {"name": "p2"}, "p2_gamma": 1.0}, "give at most one of loss_weighting, min_snr_gamma, p2_gamma"),
        (
            {"objective": "denoising", "time_distribution": "logit_normal"},
            "time_distribution='logit_normal': not read by objective=",
        ),
        ({"logit_mean": 1.0}, "logit_mean=1.0: not read without time_distribution='logit_normal'"),
        ({"scheduler": {"_class_name": "EulerDiscreteScheduler"}}, "'EulerDiscreteScheduler' is unknown; allowed are"),
        ({"scheduler": {"_class_name": "AtlasDDIMScheduler"}}, "give scheduler.use_flow_sigmas: true"),
        ({"scheduler": {"use_flow_sigmas": True}, "objective": "denoising"}, "objective: flow_matching trains for it"),
    ],
)
def test_what_flow_matching_cannot_use_is_named(tmp_path, changes, message):
    with pytest.raises(ValueError) as error:
        build(tmp_path, **{**FLOW, **changes})
    assert message in str(error.value)
    assert validate(TrainingConfig, recipe(tmp_path, **FLOW)).objective == "flow_matching"
