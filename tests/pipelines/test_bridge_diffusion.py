"""Bridges that have learned a diffusion: its paths and its flow, against the closed form between Gaussians."""

import math

import pytest
import torch
from conftest import build_tiny_unet, seeded
from diffusers import FlowMatchEulerDiscreteScheduler

from atlas_diffusers import AtlasBridgePipeline
from atlas_diffusers.bridges.brownian import follow, times_left
from atlas_diffusers.denoising import BridgeFlow, BridgeSteps, sample

pytestmark = pytest.mark.usefixtures("float64")
SOURCE, TARGET, SIGMA = 0.3, 0.15, 0.2
CROSS = (math.sqrt(4 * SOURCE**2 * TARGET**2 + SIGMA**4) - SIGMA**2) / 2


def displacement(start, end):
    """Of the Schrödinger bridge between independent pixels N(0, start²) and N(0, end²), as a network gives it."""

    def forward(x, t, **conditions):
        left = (t / 1000).reshape(-1, *[1] * (x.ndim - 1)) if torch.is_tensor(t) and t.ndim else t / 1000
        time = 1 - left
        variance = left**2 * start**2 + time**2 * end**2 + (2 * CROSS + SIGMA**2) * time * left
        return ((((left * CROSS + time * end**2) / variance - 1) * x / left**0.5),)

    return forward


def pipeline_of(backward=True):
    networks = build_tiny_unet(), build_tiny_unet()
    networks[0].forward, networks[1].forward = displacement(SOURCE, TARGET), displacement(TARGET, SOURCE)
    pipeline = AtlasBridgePipeline(
        networks[0], FlowMatchEulerDiscreteScheduler(), backward_unet=networks[1] if backward else None, bridge_sigma=SIGMA,
        default_guidance_scale=1.0,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def pictures(count=40):
    return (SOURCE * torch.randn(count, 3, 8, 8, generator=seeded())).clamp(-1, 1)


def test_the_diffusion_has_the_plan_of_the_schroedinger_bridge():
    x = pictures()
    y = pipeline_of(False)(x / 2 + 0.5, num_inference_steps=40, generator=seeded(1), output_type="latent").images
    # five standard errors of 40 x 192 independent pixels, and the error of 40 steps of second order
    error = 5 * math.sqrt(2 / x.numel()) * SOURCE * TARGET
    assert (x * y).mean().item() == pytest.approx(CROSS, abs=error + 1e-3 * SOURCE * TARGET)
    assert y.std().item() == pytest.approx(TARGET, rel=5 / math.sqrt(2 * x.numel()) + 0.005)
    assert abs(CROSS - SOURCE * TARGET) > 3 * error, "the flow has another plan"


def test_the_flow_of_a_diffusion_is_the_monotone_map():
    x, pipeline = pictures(4), pipeline_of()
    errors = []
    for steps in (50, 200):
        y = pipeline(x / 2 + 0.5, num_inference_steps=steps, stochastic=False, output_type="latent").images
        errors.append((y - TARGET / SOURCE * x).abs().max().item())
    assert errors[1] < 0.03 * SOURCE and errors[1] < 0.5 * errors[0]


def test_noise_belongs_to_a_picture():
    x, pipeline = pictures(3) / 2 + 0.5, pipeline_of(False)
    call = {"num_inference_steps": 5, "output_type": "latent"}
    together = pipeline(x, generator=[seeded(i) for i in range(3)], **call).images
    alone = pipeline(x[2:], generator=[seeded(2)], **call).images
    torch.testing.assert_close(together[2:], alone)
    assert pipeline.num_timesteps == 9


def test_explicit_times_of_a_diffusion():
    x, pipeline, seen = pictures(1), pipeline_of(False), []
    forward = pipeline.unet.forward
    pipeline.unet.forward = lambda x, t, **k: (seen.append(float(t)), forward(x, t, **k))[1]
    pipeline(x / 2 + 0.5, sigmas=[1.0, 0.5, 0.1], generator=seeded(), output_type="latent")
    assert seen == [1000.0, 500.0, 500.0, 100.0, 100.0]
    seen.clear()
    pipeline(x / 2 + 0.5, num_inference_steps=4, generator=seeded(), output_type="latent")
    assert seen == pytest.approx([1000, 562.5, 562.5, 250, 250, 62.5, 62.5])


def test_steps_of_the_scheduler_are_those_of_the_diffusion():
    """The same noise gives the same path as the loop that training follows."""
    x, d = torch.randn(3, 2, generator=seeded()), lambda x, left: (0.3 - x) * left
    times, g = times_left(4), seeded(1)
    expected = follow(d, x, SIGMA, 4, lambda z: torch.randn(z.shape, generator=g, dtype=z.dtype))
    steps, g = BridgeSteps(SIGMA, times, 1000, torch.device("cpu")), seeded(1)
    found = sample(lambda z, t: d(z, float(t) / 1000), steps, x, generator=g)
    torch.testing.assert_close(found, expected)


def test_velocities_stay_finite_at_the_ends():
    flow = BridgeFlow(lambda x, t: x, lambda x, t: -x, 1000, 0.05)
    x = torch.ones(2, 3)
    for t, s in ((1000.0, 0.95), (0.0, 0.05), (400.0, 0.4)):
        expected = (-1 / math.sqrt(1 - s) - 1 / math.sqrt(s)) / 2
        torch.testing.assert_close(flow(x, torch.tensor(t)), torch.full_like(x, expected))


def test_what_a_bridge_has_not_learned_is_refused(tmp_path):
    x = pictures(1) / 2 + 0.5
    with pytest.raises(ValueError, match="stochastic=False.*needs backward_unet"):
        pipeline_of(False)(x, stochastic=False)
    plain = AtlasBridgePipeline(build_tiny_unet(), FlowMatchEulerDiscreteScheduler())
    with pytest.raises(ValueError, match="stochastic=True, but the network has learned a flow"):
        plain(x, stochastic=True)
    with pytest.raises(ValueError, match="bridge_sigma is missing"):
        AtlasBridgePipeline(build_tiny_unet(), FlowMatchEulerDiscreteScheduler(), backward_unet=build_tiny_unet())


def test_a_diffusion_is_saved_and_loaded(tmp_path):
    networks = build_tiny_unet(), build_tiny_unet()
    pipeline = AtlasBridgePipeline(
        networks[0], FlowMatchEulerDiscreteScheduler(), backward_unet=networks[1], bridge_sigma=0.3
    )
    pipeline.save_pretrained(tmp_path)
    loaded = AtlasBridgePipeline.from_pretrained(tmp_path)
    assert loaded.config.bridge_sigma == 0.3
    for name in ("unet", "backward_unet"):
        weights = getattr(loaded, name).state_dict()
        assert all(torch.equal(value, weights[key]) for key, value in getattr(pipeline, name).state_dict().items())
