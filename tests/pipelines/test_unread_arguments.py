"""An argument of a pipeline call that would change nothing is an error or a warning that names it."""

import pytest
import torch
from conftest import build_tiny_pipeline, build_tiny_unet, seeded
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.guiders import ClassifierFreeGuidance

from atlas_diffusers import AtlasBridgePipeline, AtlasEulerScheduler

PICTURE = torch.rand(1, 3, 8, 8, generator=seeded())
CALL = {"prompt": "red heart", "output_type": "latent"}


def bridge_pipeline(**options):
    network = build_tiny_unet(cross_attention_levels=(), cross_attention_dim=None)
    pipeline = AtlasBridgePipeline(network, FlowMatchEulerDiscreteScheduler(), default_guidance_scale=1.0, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_inference_steps": 4, "timesteps": [900, 500]}, "give num_inference_steps=4 or timesteps, not both"),
        ({"num_inference_steps": 4, "sigmas": [9.0, 1.0, 0.0]}, "give num_inference_steps=4 or sigmas, not both"),
        ({"num_inference_steps": 0}, "num_inference_steps=0; expected at least 1"),
        ({"strength": 0.5}, "strength=0.5 needs an image"),
        ({"corrector_snr": 0.1}, "corrector_snr=0.1 needs corrector_steps"),
        ({"callback_on_step_end_tensor_inputs": ["latents"]}, "needs callback_on_step_end"),
        ({"guider": ClassifierFreeGuidance(), "guidance_scale": 2.0}, "a guider takes the place of guidance_scale"),
        ({"guider": ClassifierFreeGuidance(), "guidance_rescale": 0.5}, "a guider takes the place of guidance_rescale"),
        ({"references": 2 * PICTURE - 1, "bridge": {"caption_temperature": 0.1}}, "not read without captions"),
        ({"references": 2 * PICTURE - 1, "bridge": {"strength": 0.1}}, "not read in mode='replace'"),
    ],
)
def test_arguments_that_would_change_nothing_are_refused(options, message):
    with pytest.raises(ValueError) as error:
        build_tiny_pipeline()(generator=seeded(), **{**CALL, **options})
    assert message in str(error.value)


def test_fresh_noise_is_refused_where_the_scheduler_draws_none():
    pipeline = build_tiny_pipeline()
    whole, noisy = (pipeline(**CALL, eta=eta, generator=seeded()).images for eta in (0.0, 1.0))
    assert not torch.equal(whole, noisy)
    pipeline.scheduler = AtlasEulerScheduler.from_config(pipeline.scheduler.config)
    with pytest.raises(ValueError, match="eta=1.0: AtlasEulerScheduler takes no eta"):
        pipeline(**CALL, eta=1.0)


@pytest.mark.parametrize(
    "options, names",
    [
        ({"negative_prompt": "leaf", "guidance_scale": 1.0}, ["negative_prompt", "guidance_scale=1.0 is off"]),
        ({"guidance_rescale": 0.5, "guidance_scale": 1.0}, ["guidance_rescale", "guidance_scale=1.0 is off"]),
        ({"guidance_interval": (0.0, 1.0), "guidance_scale": 1.0}, ["guidance_interval"]),
        ({"prompt": None, "guidance_scale": 3.0}, ["guidance_scale", "there is no prompt or label"]),
        ({"prompt": None, "negative_prompt": "leaf"}, ["negative_prompt", "there is no prompt or label"]),
    ],
)
def test_what_guidance_would_read_is_said_where_it_is_off(caplog, options, names):
    build_tiny_pipeline()(generator=seeded(), **{**CALL, **options})
    assert all(name in caplog.text for name in [*names, "not used"]) and len(caplog.records) == 1


@pytest.mark.parametrize("options", [{}, {"negative_prompt": "leaf"}, {"guidance_scale": 1.0}, {"prompt": None}])
def test_nothing_is_said_where_everything_is_read(caplog, options):
    build_tiny_pipeline()(generator=seeded(), **{**CALL, **options})
    assert not caplog.records


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_inference_steps": 0}, "num_inference_steps=0; expected at least 1"),
        ({"num_inference_steps": 4, "sigmas": [1.0, 0.5]}, "give num_inference_steps=4 or sigmas, not both"),
    ],
)
def test_a_bridge_pipeline_refuses_the_same(options, message):
    with pytest.raises(ValueError, match=message):
        bridge_pipeline()(PICTURE, **options)


def test_bridge_steps_are_followed_by_as_many_steps_as_asked():
    """None of the network's steps is not the default number of them."""
    pipeline = build_tiny_pipeline()
    options = {**CALL, "references": torch.randn(30, 3, 8, 8, generator=seeded()), "bridge": {"steps": 2, "gate": 2.0}}
    with pytest.raises(ValueError, match="num_inference_steps=0; expected at least 1"):
        pipeline(**options, num_inference_steps=0)
    pipeline(**options, num_inference_steps=5, generator=seeded())
    assert 6 <= pipeline.num_timesteps <= 7


def test_a_call_without_steps_takes_the_pipelines_own():
    pipeline = bridge_pipeline(default_num_inference_steps=3)
    pipeline(PICTURE, output_type="latent")
    assert pipeline.num_timesteps == 3
