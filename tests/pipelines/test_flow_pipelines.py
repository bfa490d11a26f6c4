"""Flows in our pipelines: references, guidance intervals, correctors, and bridges between data sets."""

import math

import diffusers
import pytest
import torch
from conftest import build_tiny_pipeline, build_tiny_unet, seeded

import atlas_diffusers
from atlas_diffusers import AtlasBridgePipeline, AtlasPipeline
from atlas_diffusers.bridges import SchrodingerBridgeSolver
from atlas_diffusers.denoising import noise_level

pytestmark = pytest.mark.usefixtures("float64")
OURS = ["AtlasDDIMScheduler", "AtlasEulerScheduler", "AtlasHeunScheduler", "AtlasMultistepScheduler"]
STOCK = ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "UniPCMultistepScheduler"]


def flow(name, shift=1.0):
    """A flow of ours or of Diffusers, from pure noise."""
    cls = getattr(atlas_diffusers, name, None) or getattr(diffusers, name)
    if name == "UniPCMultistepScheduler":
        torch.set_default_dtype(torch.float32)  # in which it solves for its coefficients
        return cls(use_flow_sigmas=True, flow_shift=shift, prediction_type="flow_prediction")
    return cls(use_flow_sigmas=True, shift=shift) if name.startswith("Atlas") else cls(shift=shift)


def gaussian_pipeline(scheduler, mean=0.3, std=0.6):
    """A pipeline whose network is the exact velocity of pictures with independent pixels N(mean, std²)."""

    def velocity(x, t, **kwargs):
        s = t / 1000
        data = mean + (1 - s) * std**2 / ((1 - s) ** 2 * std**2 + s**2) * (x - (1 - s) * mean)
        return ((x - data) / s,)

    unet = build_tiny_unet()
    unet.forward = velocity
    pipeline = AtlasPipeline(unet, scheduler, default_guidance_scale=1.0)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("name", [*OURS, *STOCK])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_flow_in_our_pipeline_ends_at_its_data(name, shift):
    """Every pixel is carried by the monotone map, whose error falls with the steps."""
    pipeline = gaussian_pipeline(flow(name, shift))
    noise = torch.randn(2, 3, 8, 8, generator=seeded())
    found = pipeline(num_images_per_prompt=2, latents=noise, num_inference_steps=60, output_type="latent").images
    assert (found - (0.3 + 0.6 * noise)).abs().max() < 0.1


@pytest.mark.parametrize("name", [*OURS, *STOCK])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_flow_goes_where_the_bridge_says(name, shift):
    """All references are one picture, so the data prediction is known and every scheduler ends there."""
    target = (torch.rand(1, 3, 8, 8, generator=seeded(5)) * 2 - 1).expand(3, -1, -1, -1).contiguous()
    pipeline = build_tiny_pipeline(scheduler=flow(name, shift))
    out = pipeline([""] * 4, references=target, bridge={"gate": 1.0}, num_inference_steps=8, generator=seeded(),
                   output_type="latent")  # fmt: skip
    assert out.bridge.network_calls == 0
    # multistep solvers extrapolate the prediction, which bends in x; Diffusers' flows keep their levels in float32
    tolerance = 2e-3 if "Multistep" in name else 1e-5
    torch.testing.assert_close(out.images, target[:1].to(out.images).expand(4, -1, -1, -1), rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", ["AtlasDDIMScheduler", "AtlasMultistepScheduler"])
@pytest.mark.parametrize("bridge", [None, {"steps": 3}], ids=str)
def test_a_dynamic_shift_is_asked_for_and_a_static_one_takes_its_place(name, bridge):
    """Our networks have no tokens by which a pipeline would know μ; bridge steps choose levels, so no shift moves them."""
    references = {} if bridge is None else {"references": torch.rand(6, 3, 8, 8, generator=seeded(5)), "bridge": bridge}
    call = {**references, "num_inference_steps": 4, "generator": seeded(), "output_type": "latent"}
    scheduler = getattr(atlas_diffusers, name)(use_flow_sigmas=True, use_dynamic_shifting=True)
    with pytest.raises(ValueError, match="use_dynamic_shifting=True needs .*mu=.*; give it, or switch the option off"):
        build_tiny_pipeline(scheduler=scheduler)([""] * 2, **call)
    static = type(scheduler).from_config(scheduler.config, use_dynamic_shifting=False, shift=math.exp(1.15))
    assert build_tiny_pipeline(scheduler=static)([""] * 2, **call).images.isfinite().all()


def test_a_flow_couples_at_its_own_levels():
    """Against the loop written out: x = (1 − s) x_0 + s ε, v = (x − x_0)/s."""
    references = torch.rand(6, 3, 8, 8, generator=seeded(5)) * 2 - 1
    pipeline = build_tiny_pipeline(scheduler=flow("FlowMatchEulerDiscreteScheduler", 3.0))
    x, solver, state = torch.randn(4, 3, 8, 8, generator=seeded()), SchrodingerBridgeSolver(references), None
    scheduler = flow("FlowMatchEulerDiscreteScheduler", 3.0)
    scheduler.set_timesteps(5)
    for s, after in zip(scheduler.sigmas.tolist(), scheduler.sigmas.tolist()[1:]):
        coupling = solver.couple(x, 1 - s, s, state)
        state = coupling.state
        x = x + (after - s) * (x - coupling.data) / s
    out = pipeline([""] * 4, references=references, bridge={"gate": 1.0}, num_inference_steps=5, generator=seeded(),
                   output_type="latent")  # fmt: skip
    torch.testing.assert_close(out.images, x, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "AtlasEulerScheduler"])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_bridge_steps_of_a_flow_come_before_those_of_the_network(name, shift):
    references = torch.rand(40, 3, 8, 8, generator=seeded(5)) * 2 - 1
    pipeline, seen = build_tiny_pipeline(scheduler=flow(name, shift)), []
    out = pipeline([""] * 16, references=references, bridge={"gate": 20.0, "steps": 4}, num_inference_steps=3,
                   generator=seeded(), output_type="latent",
                   callback_on_step_end=lambda p, i, t, k: seen.append(float(t)))  # fmt: skip
    assert (out.bridge.network_calls, out.bridge.network_calls_saved) == (3, 4)
    s = seen[4] / 1000
    assert out.bridge.gate_log_snr == [pytest.approx(math.log((1 - s) / s), abs=1e-5)], "the shift is not applied to levels"
    assert SchrodingerBridgeSolver(references).posterior_size(1 - s, s) == pytest.approx(20, rel=0.1)
    assert seen[0] == pytest.approx(1000, abs=5) and all(a > b for a, b in zip(seen, seen[1:]))


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "AtlasEulerScheduler"])
def test_guidance_of_a_flow_has_an_interval(name, monkeypatch):
    pipeline, sizes = build_tiny_pipeline(scheduler=flow(name)), []
    forward = pipeline.unet.forward
    monkeypatch.setattr(pipeline.unet, "forward", lambda x, *a, **k: (sizes.append(len(x)), forward(x, *a, **k))[1])
    scheduler = flow(name)
    scheduler.set_timesteps(5)
    levels = [noise_level(scheduler, t).sigma_hat for t in scheduler.timesteps]
    assert levels[0] == math.inf
    interval = (levels[3] * 0.99, levels[1] * 1.01)
    pipeline("red heart", guidance_scale=3.0, guidance_interval=interval, num_inference_steps=5, generator=seeded())
    assert sizes == [1, 2, 2, 2, 1]


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "AtlasEulerScheduler", "AtlasDDIMScheduler"])
def test_correctors_of_a_flow_bring_the_variance_back(name):
    """Few steps of first order lose variance, which Langevin steps with the exact score restore."""
    call = {"num_images_per_prompt": 200, "num_inference_steps": 3, "output_type": "latent"}
    plain, corrected = (
        gaussian_pipeline(flow(name))(**call, generator=seeded(), **corrector).images.std()
        for corrector in ({}, {"corrector_steps": 4, "corrector_snr": 0.3})
    )
    assert abs(corrected - 0.6) < 0.5 * abs(plain - 0.6)


def test_image_to_image_of_a_flow_starts_from_the_noised_picture():
    pipeline, seen = build_tiny_pipeline(scheduler=flow("FlowMatchEulerDiscreteScheduler")), []
    forward = pipeline.unet.forward
    pipeline.unet.forward = lambda x, t, **k: (seen.append((x, float(t))), forward(x, t, **k))[1]
    picture, noise = torch.rand(1, 3, 8, 8, generator=seeded(1)), torch.randn(1, 3, 8, 8, generator=seeded(2))
    pipeline("a", image=picture, latents=noise, strength=0.5, num_inference_steps=10, guidance_scale=1.0)
    x, t = seen[0]
    assert len(seen) == 5
    torch.testing.assert_close(x, (1 - t / 1000) * (2 * picture - 1) + t / 1000 * noise, rtol=0, atol=1e-6)


# ---------------------------------------------------------------------- bridges between data sets


def bridge_pipeline(scheduler, velocity):
    unet = build_tiny_unet()
    unet.forward = lambda x, t, **kwargs: (velocity(x, t / 1000),)
    pipeline = AtlasBridgePipeline(unet, scheduler, default_guidance_scale=1.0)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "AtlasEulerScheduler", "AtlasDDIMScheduler"])
def test_all_calls_of_a_bridge_move(name):
    """``dx/ds = x`` in N Euler steps from 1 to 0 is (1 − 1/N)^N x; a last call that does not move would leave N − 1."""
    source, count = torch.rand(2, 3, 8, 8, generator=seeded()), 4
    pipeline = bridge_pipeline(flow(name), lambda x, s: x)
    found = pipeline(source, num_inference_steps=count, output_type="latent").images
    torch.testing.assert_close(found, (1 - 1 / count) ** count * (2 * source - 1), rtol=0, atol=1e-6)
    assert pipeline.num_timesteps == count


@pytest.mark.parametrize("name", [*OURS, "FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"])
def test_any_flow_carries_pictures_over(name):
    """``dx/ds = (x − x_0)/s``, whose lines are straight, towards one picture."""
    target = torch.rand(1, 3, 8, 8, generator=seeded(2)) * 2 - 1
    pipeline = bridge_pipeline(flow(name), lambda x, s: (x - target) / s)
    source = torch.rand(2, 3, 8, 8, generator=seeded())
    found = pipeline(source, num_inference_steps=6, output_type="latent").images
    # a multistep solver extrapolates what it took from the lines
    tolerance = 2e-3 if "Multistep" in name else 1e-5
    torch.testing.assert_close(found, target.expand(2, -1, -1, -1), rtol=0, atol=tolerance)
