"""The sampler of the original toolkit, with networks whose predictions are exact."""

import math

import numpy as np
import pytest
import torch
from conftest import build_tiny_unet, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import Gaussian

from atlas_diffusers.bridges import SchrodingerBridgeSolver
from atlas_diffusers.config import KernelConfig, SamplerConfig, build_preset
from atlas_diffusers.denoising import split_steps
from atlas_diffusers.models import AtlasUNet2DModel
from atlas_diffusers.originals import (
    AdvancedHierarchicalDiffusionSampler,
    HighResLatentScoreModel,
    hierarchical,
    karras_noise_schedule,
)


def cosine(t):
    return math.cos(t * math.pi / 2) ** 2


def exact(gaussian, schedule):
    """The noise prediction of a Gaussian; time 1 is noise."""

    def model(x, t):
        alpha_bar = torch.tensor([float(schedule(s.item())) for s in t]).to(x)
        alpha, sigma = (v.sqrt().reshape(-1, *[1] * (x.ndim - 1)) for v in (alpha_bar, 1 - alpha_bar))
        return (x - alpha * gaussian.data_prediction(x, alpha, sigma)) / sigma

    return model


def sampler(model, schedule=karras_noise_schedule, **config):
    return AdvancedHierarchicalDiffusionSampler(model, schedule, "cpu", KernelConfig(), SamplerConfig(**config))


@settings(max_examples=50, deadline=None, database=None)
@given(st.floats(0, 1), st.floats(1e-3, 0.5), st.floats(1, 100), st.floats(0.5, 10))
def test_the_karras_schedule_is_its_formula(t, low, high, rho):
    alpha_bar = karras_noise_schedule(t, low, high, rho)
    sigma = (low ** (1 / rho) + t * (high ** (1 / rho) - low ** (1 / rho))) ** rho
    assert alpha_bar == pytest.approx(1 / (1 + sigma**2), rel=1e-9)
    assert karras_noise_schedule(torch.tensor([t]), low, high, rho).item() == pytest.approx(alpha_bar, rel=1e-5)


def test_the_karras_schedule_runs_from_noise_to_clean():
    assert karras_noise_schedule(1.0) == pytest.approx(1 / (1 + 80**2)) and karras_noise_schedule(0.0) > 0.999_99
    for bad in ({"t": 1.5}, {"t": 0.5, "sigma_min": 2.0, "sigma_max": 1.0}, {"t": 0.5, "rho": 0.0}):
        with pytest.raises(ValueError):
            karras_noise_schedule(**bad)


@pytest.mark.parametrize("schedule", [karras_noise_schedule, cosine])
@pytest.mark.parametrize("steps", [1000, 60, torch.linspace(1, 0, 80).tolist()], ids=["1000", "60", "list"])
def test_a_gaussian_has_its_mean_and_deviation(schedule, steps):
    """N(2, 0.5²) within 1%; the original gave mean −312 and deviation 334."""
    model = exact(Gaussian(2.0, 0.5), schedule)
    x = sampler(model, schedule).sample((4, 1, 100, 100), steps, generator=seeded())
    assert abs(x.mean() - 2) < 0.02 and abs(x.std() - 0.5) < 0.005 + 4 * 0.5 / math.sqrt(80_000)


def test_the_flow_is_followed_to_second_order():
    gaussian = Gaussian(0.3, 0.7)
    start = torch.randn(2, 3, 4, 4, generator=seeded())
    errors, counts = [], (8, 16, 32, 64)
    for count in counts:
        # ends before t = 0: the last step is of first order
        times = torch.linspace(0.9, 0.3, count + 1).tolist()
        run = sampler(exact(gaussian, cosine), cosine)
        _, seen = run.sample((2, 3, 4, 4), times, generator=seeded(), return_intermediates=True)
        x = seen[-2]
        alpha, sigma = math.cos(0.3 * math.pi / 2), math.sin(0.3 * math.pi / 2)
        first, noise = math.cos(0.9 * math.pi / 2), math.sin(0.9 * math.pi / 2)
        z = (noise * start - first * 0.3) / math.sqrt(first**2 * 0.49 + noise**2)
        errors.append((x - gaussian.flow(z, alpha, sigma)).abs().max().item())
    order = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert 1.7 < order < 2.6


def test_callbacks_and_intermediates():
    seen, model = [], exact(Gaussian(), cosine)
    x, steps = sampler(model, cosine).sample(
        (2, 5), [1.0, 0.5, 0.1], callback=lambda *a: seen.append(a), return_intermediates=True, generator=seeded()
    )
    assert [(a, b) for _, a, b in seen] == [(1.0, 0.5), (0.5, 0.1), (0.1, 0.0)]
    assert all(torch.equal(a, b[0]) for a, b in zip(steps, seen)) and torch.equal(steps[-1], x)


def test_other_models_get_their_conditioning():
    calls = []

    def model(x, t, conditioning=None):
        calls.append((t, conditioning))
        return torch.zeros_like(x)

    sampler(model).sample((3, 2), 4, {"any": "thing"}, generator=seeded())
    assert [c for _, c in calls] == [{"any": "thing"}] * 4
    assert [t.tolist() for t, _ in calls] == [[1.0] * 3, [0.75] * 3, [0.5] * 3, [0.25] * 3]


@pytest.mark.usefixtures("float64")
@torch.no_grad()
def test_networks_get_timesteps_and_guidance():
    unet = build_tiny_unet(cross_attention_levels=(1,), cross_attention_dim=16)
    states, negative = torch.randn(2, 1, 4, 16, generator=seeded(2)).unbind(0)
    payload = {"encoder_hidden_states": states, "negative_encoder_hidden_states": negative, "guidance_scale": 3.0}
    found = sampler(unet).sample((2, 3, 8, 8), [1.0], payload, generator=seeded())
    x = torch.randn(2, 3, 8, 8, generator=seeded())
    sigma = 80.0
    inputs, t = x * sigma / math.sqrt(1 + sigma**2), torch.full((2,), 999.0)
    c, u = (unet(inputs, t, s.expand(2, -1, -1)).sample for s in (states, negative))
    torch.testing.assert_close(found, sigma * x - sigma * (u + 3 * (c - u)))
    del payload["negative_encoder_hidden_states"]
    with pytest.raises(ValueError, match="guidance_scale=3.0, which needs negative_encoder_hidden_states"):
        sampler(unet).sample((2, 3, 8, 8), [1.0], payload, generator=seeded())


def test_references_stand_for_the_network_while_noise_is_high():
    references = torch.randn(200, 6, generator=seeded(1)) + 1.0
    calls = []

    def model(x, t):
        calls.append(t[0].item())
        return exact(Gaussian(1.0, 1.0), karras_noise_schedule)(x, t)

    x = sampler(model).sample((64, 6), 40, references=references, generator=seeded())
    assert 0 < len(calls) < 40 and max(calls) < 1
    assert (x.mean(0) - references.mean(0)).abs().max() < 0.5
    assert torch.cdist(x, references).min() > 1e-3, "no reference is copied"


def one_colour(schedule):
    """Exact for pictures of one colour c ~ N(0, 1) at any resolution."""

    def model(x, t):
        alpha_bar = float(schedule(t[0].item()))
        alpha, sigma = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
        data = alpha * x.mean((2, 3), keepdim=True) / (alpha_bar + (1 - alpha_bar) / (x.shape[-1] * x.shape[-2]))
        return (x - alpha * data) / sigma

    return model


@pytest.mark.parametrize("levels", [2, 3])
def test_coarse_resolutions_first(levels):
    sides = []

    def model(x, t):
        sides.append(x.shape[-1])
        return one_colour(karras_noise_schedule)(x, t)

    made = sampler(model, hierarchical_sampling=True, num_resolutions=levels)
    x = made.sample((2000, 1, 16, 16), 24, generator=seeded())
    coarse = {2: [8] * 12, 3: [4] * 6 + [8] * 6}[levels]
    assert sides == coarse + [16] * 12 and x.shape == (2000, 1, 16, 16)
    assert x.std((2, 3)).mean() < 0.02
    assert abs(x.mean((1, 2, 3)).std() - 1) < 0.01 + 4.5 / math.sqrt(4000)


def test_steps_are_split():
    assert split_steps(7, 1) == [(0, 0, 7)]
    assert split_steps(10, 2) == [(1, 0, 5), (0, 5, 10)]
    assert split_steps(12, 3) == [(2, 0, 3), (1, 3, 6), (0, 6, 12)]


@pytest.mark.parametrize(
    "config, arguments, message",
    [
        ({}, ((1, 3, 8, 8), [0.0, 1.0]), r"must decrease within \[0, 1\]"),
        ({}, ((1, 3, 8, 8), 0), r"must decrease within \[0, 1\]"),
        ({}, ((1, 3, 8, 8), [1.5, 0.5]), r"must decrease within \[0, 1\]"),
        ({"hierarchical_sampling": True}, ((1, 3, 9, 8), 8), "cannot halve the sides of"),
        ({"hierarchical_sampling": True}, ((1, 3, 8, 8), 3), "needs at least 4 steps"),
    ],
)
def test_bad_input_is_named(config, arguments, message):
    with pytest.raises(ValueError, match=message):
        sampler(lambda x, t: x, **config).sample(*arguments)


def test_times_of_equal_noise_are_one_step():
    for schedule in (lambda t: math.exp(-20 * t), lambda t: [1.0, 0.5, 0.1, 0.01][round(3 * t)]):
        calls = []

        def model(x, t, schedule=schedule, calls=calls):
            calls.append(t[0].item())
            return exact(Gaussian(0.0, 0.5), schedule)(x, t)

        x = sampler(model, schedule).sample((64, 100), 10, generator=seeded())
        assert x.isfinite().all() and len(calls) < 10
    with pytest.raises(ValueError, match="have no noise under this schedule"):
        sampler(lambda x, t: x, cosine).sample((1, 2), [0.0])


@pytest.mark.parametrize(
    "field",
    [{"adaptive_epsilon": True}, {"multi_scale": True}, {"multi_scale": True, "scale_factors": [1.0]}],
    ids=lambda field: next(iter(field)),
)
def test_kernels_that_are_not_the_noises_are_refused(field):
    name = next(iter(field))
    with pytest.raises(ValueError, match=f"{name}=.*the bridge has one bandwidth, the noise"):
        AdvancedHierarchicalDiffusionSampler(lambda x, t: x, cosine, kernel_config=KernelConfig(**field))


def test_the_preset_of_several_bandwidths_is_refused_by_name():
    with pytest.raises(ValueError, match="multi_scale=True"):
        AdvancedHierarchicalDiffusionSampler(lambda x, t: x, cosine, kernel_config=build_preset("kernel:gaussian_multiscale"))


def first_projection(**kernel):
    """The bridge's data prediction for a batch in the noise, before any model is called."""
    references = torch.randn(60, 3, generator=seeded(1)) + torch.tensor([2.0, 0, -1])
    config = SamplerConfig(gate=1.0)
    made = AdvancedHierarchicalDiffusionSampler(torch.zeros_like, karras_noise_schedule, kernel_config=KernelConfig(**kernel),
                                                sampler_config=config)  # fmt: skip
    return made.sample((40, 3), [0.42], references=references, generator=seeded()).double()


def test_epsilon_is_the_bandwidth_in_units_of_the_noise():
    references = torch.randn(60, 3, generator=seeded(1)) + torch.tensor([2.0, 0, -1])
    alpha_bar = karras_noise_schedule(0.42)
    sigma = math.sqrt((1 - alpha_bar) / alpha_bar)
    x = sigma * torch.randn(40, 3, generator=seeded())
    for epsilon in (1.0, 0.5, 2.0):
        solver = SchrodingerBridgeSolver(references, epsilon=epsilon**2)
        expected = solver.couple(x, 1.0, sigma).data.double()
        torch.testing.assert_close(first_projection(epsilon=epsilon), expected, rtol=1e-4, atol=1e-4)
    assert (first_projection(epsilon=0.5) - first_projection(epsilon=2.0)).abs().max() > 0.1


def test_every_option_of_a_kernel_operator_is_read():
    exact = first_projection(solver_type="direct")
    error = [
        (first_projection(solver_type="rff", rff_features=count, epsilon=1.0) - exact).square().mean().sqrt().item()
        for count in (4, 2048)
    ]
    assert error[1] < 0.5 * error[0]
    rff = {"solver_type": "rff", "rff_features": 16}
    assert not torch.equal(first_projection(**rff, orthogonal=True), first_projection(**rff, orthogonal=False))


def test_the_options_of_every_operator_reach_the_bridge(monkeypatch):
    made, solver = [], SchrodingerBridgeSolver
    monkeypatch.setattr(hierarchical, "SchrodingerBridgeSolver", lambda *a, **k: (made.append(k), solver(*a, **k))[1])
    first_projection(solver_type="nystrom", n_landmarks=9, max_kernel_cache_size=3)
    first_projection(solver_type="rff", rff_features=7, orthogonal=False)
    plain = {"num_landmarks": 256, "num_features": 1024, "orthogonal": True, "max_bytes": 2**30}
    assert [each["solver_type"] for each in made] == ["nystrom", "rff"]
    assert made[0]["kernel_options"] == {**plain, "num_landmarks": 9, "max_bytes": 3 * 2**20}
    assert made[1]["kernel_options"] == {**plain, "num_features": 7, "orthogonal": False}


def test_only_gaussian_kernels_are_bridges():
    with pytest.raises(ValueError, match="kernel_type='laplacian'"):
        AdvancedHierarchicalDiffusionSampler(lambda x, t: x, cosine, kernel_config=KernelConfig(kernel_type="laplacian"))


def test_a_network_of_one_resolution_is_refused():
    with pytest.raises(ValueError, match="not num_resolutions=1"):
        sampler(build_tiny_unet(), hierarchical_sampling=True).sample((1, 3, 8, 8), 8)


def test_the_network_of_the_original_is_ours():
    fields = {"base_channels": 8, "channel_mult": [1, 2], "attention_levels": [1], "cross_attention_levels": [1],
              "num_heads": 2, "norm_num_groups": 4, "sample_size": 8, "context_dim": 16, "num_res_blocks": 1}  # fmt: skip
    with torch.random.fork_rng():
        model = HighResLatentScoreModel(**fields)
        adapted = HighResLatentScoreModel(**fields, lora={"rank": 2})
        read = {name: value for name, value in fields.items() if name not in ("context_dim", "cross_attention_levels")}
        plain = HighResLatentScoreModel(**read, conditional=False)
    assert type(model) is AtlasUNet2DModel and model.config.cross_attention_dim == 16
    assert plain.config.cross_attention_levels == [] and plain.config.cross_attention_dim is None
    assert any("lora" in name for name, _ in adapted.named_parameters())
    with pytest.raises(ValueError, match="not both"):
        HighResLatentScoreModel(object(), base_channels=3)
