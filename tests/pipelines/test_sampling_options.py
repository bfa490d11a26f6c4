"""Guidance intervals, guiders, correctors, coarse-to-fine and tiles, against exact networks."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import build_tiny_pipeline, build_tiny_unet, seeded
from diffusers import EulerDiscreteScheduler
from diffusers.guiders import AdaptiveProjectedGuidance, ClassifierFreeGuidance
from hypothesis import given, settings
from hypothesis import strategies as st

import atlas_diffusers
from atlas_diffusers import AtlasDDIMScheduler, AtlasEulerScheduler, AtlasPipeline
from atlas_diffusers.denoising import Tiles, lift, noise_level, plan_stages
from atlas_diffusers.metrics import energy_distance
from atlas_diffusers.pipelines.inputs import checked_tiles

pytestmark = pytest.mark.usefixtures("float64")

CALL = {"num_inference_steps": 6, "output_type": "latent"}


def generate(pipeline, prompt="red heart", **options):
    return pipeline(prompt, generator=seeded(), **{**CALL, **options}).images


def count_calls(pipeline, monkeypatch):
    """Samples in every network call."""
    sizes, forward = [], pipeline.unet.forward
    monkeypatch.setattr(pipeline.unet, "forward", lambda x, *args, **kw: (sizes.append(len(x)), forward(x, *args, **kw))[1])
    return sizes


def pipeline_of(network, scheduler, sample_size=8, channels=3, **config):
    """A pipeline whose network is ``network(x, t)``."""
    unet = build_tiny_unet(sample_size=sample_size, in_channels=channels, out_channels=channels, **config)
    unet.forward = lambda x, t, **kw: (network(x, t),)
    pipeline = AtlasPipeline(unet, scheduler, default_guidance_scale=1.0)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# ---------------------------------------------------------------------- guidance


def test_guidance_of_one_is_one_pass(monkeypatch, tiny_pipeline):
    sizes = count_calls(tiny_pipeline, monkeypatch)
    generate(tiny_pipeline, guidance_scale=1.0)
    assert sizes == [1] * 6


def test_guidance_outside_its_interval_is_off_and_costs_half(monkeypatch, tiny_pipeline):
    scheduler = AtlasDDIMScheduler.from_config(tiny_pipeline.scheduler.config)
    scheduler.set_timesteps(6)
    sigmas = [noise_level(scheduler, t).sigma_hat for t in scheduler.timesteps]
    interval = (sigmas[3] * 0.99, sigmas[1] * 1.01)
    sizes = count_calls(tiny_pipeline, monkeypatch)
    found = generate(tiny_pipeline, guidance_scale=4.0, guidance_interval=interval)
    assert sizes == [1, 2, 2, 2, 1, 1]
    inside = [low <= s <= high for s in sigmas for low, high in [interval]]

    pipeline = build_tiny_pipeline()
    states = pipeline.encode_prompt("red heart", negative_prompt="")
    x = expected_by_hand(pipeline, states, inside)
    torch.testing.assert_close(found, x)
    everywhere = generate(tiny_pipeline, guidance_scale=4.0, guidance_interval=(0, math.inf))
    assert torch.equal(everywhere, generate(tiny_pipeline, guidance_scale=4.0))


@torch.no_grad()
def expected_by_hand(pipeline, states, guided, scale=4.0):
    """The same call, step by step."""
    scheduler = AtlasDDIMScheduler.from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(6)
    x = torch.randn(1, 3, 8, 8, generator=seeded())
    for t, on in zip(scheduler.timesteps, guided):
        conditional, unconditional = (pipeline.unet(x, t, s, return_dict=False)[0] for s in states)
        m = unconditional + scale * (conditional - unconditional) if on else conditional
        x = scheduler.step(m, t, x).prev_sample
    return x


def test_a_guider_of_diffusers_is_our_own_guidance(tiny_pipeline):
    options = {"guidance_scale": 3.0, "guidance_rescale": 0.4}
    expected = generate(tiny_pipeline, **options)
    found = generate(tiny_pipeline, guider=ClassifierFreeGuidance(**options))
    torch.testing.assert_close(found, expected)
    late = ClassifierFreeGuidance(3.0, start=0.5)
    pipeline = build_tiny_pipeline()
    x = expected_by_hand(pipeline, pipeline.encode_prompt("red heart", negative_prompt=""), [False] * 3 + [True] * 3, 3.0)
    torch.testing.assert_close(generate(tiny_pipeline, guider=late), x)


def test_a_guider_with_a_memory_starts_anew_in_every_call(tiny_pipeline):
    guider = AdaptiveProjectedGuidance(4.0, adaptive_projected_guidance_momentum=-0.5, use_original_formulation=False)
    first, second = (generate(tiny_pipeline, guider=guider) for _ in range(2))
    assert torch.equal(first, second) and not torch.equal(first, generate(tiny_pipeline, guidance_scale=4.0))


@pytest.mark.parametrize("options", [{"tile_size": 8}, {"corrector_steps": 1}, {"network_batch_size": 1}])
def test_a_guider_is_called_once_a_step(tiny_pipeline, options):
    with pytest.raises(ValueError, match="give no tiles, correctors or network_batch_size"):
        generate(tiny_pipeline, ["a", "b"], guider=ClassifierFreeGuidance(), **options)


def test_dynamic_thresholding_bounds_what_guidance_makes(tiny_pipeline):
    options = {"prediction_type": "v_prediction", "sample_max_value": 1.0}
    tiny_pipeline.scheduler = AtlasEulerScheduler(**options)
    assert generate(tiny_pipeline, guidance_scale=30.0).abs().max() > 2
    tiny_pipeline.scheduler = AtlasEulerScheduler(thresholding=True, **options)
    assert generate(tiny_pipeline, guidance_scale=30.0).abs().max() <= 1 + 1e-5


# ---------------------------------------------------------------------- corrector

MEANS, WIDTH = torch.tensor([[-0.8, 0.3], [0.5, 0.7], [0.6, -0.6]]), 0.12


def mixture_network(x, alpha, sigma):
    """The noise prediction for equal Gaussians N(m_k, WIDTH²) in the plane, ``x`` (n, 2, 1, 1)."""
    points, variance = x.flatten(1).double(), alpha**2 * WIDTH**2 + sigma**2
    offset = points[:, None] - alpha * MEANS.double()
    weights = torch.softmax(-offset.square().sum(-1) / (2 * variance), 1)
    return (sigma / variance * (weights[..., None] * offset).sum(1)).to(x).reshape(x.shape)


def mixture_pipeline(scheduler):
    levels = type(scheduler).from_config(scheduler.config)

    def network(x, t):
        alpha, sigma = levels.levels_at(t.reshape(1), x.double())
        return mixture_network(x, alpha.item(), sigma.item())

    return pipeline_of(network, scheduler, sample_size=1, channels=2, channel_mult=(1,), attention_levels=())


def sample_mixture(scheduler, count=4000, **options):
    pipeline = mixture_pipeline(scheduler)
    found = pipeline(num_images_per_prompt=count, generator=seeded(), output_type="latent", **options).images
    return found.flatten(1)


@pytest.fixture(scope="module")
def mixture():
    which = torch.randint(3, (4000,), generator=seeded(5))
    return MEANS[which] + WIDTH * torch.randn(4000, 2, generator=seeded(6))


@pytest.mark.parametrize("name", ["DDIM", "DDPM", "Euler", "EulerAncestral", "Heun", "Multistep"])
def test_correctors_lower_the_distance_at_equal_predictor_steps(name, mixture):
    scheduler = getattr(atlas_diffusers, f"Atlas{name}Scheduler")(timestep_spacing="trailing")
    steps = {"num_inference_steps": 4}
    plain = energy_distance(sample_mixture(scheduler, **steps), mixture)
    better = energy_distance(sample_mixture(scheduler, corrector_steps=3, corrector_snr=0.25, **steps), mixture)
    assert better < 0.8 * plain


def test_pndm_takes_no_corrector(tiny_pipeline):
    tiny_pipeline.scheduler = atlas_diffusers.AtlasPNDMScheduler()
    with pytest.raises(ValueError, match="AtlasPNDMScheduler combines the calls of steps"):
        generate(tiny_pipeline, corrector_steps=1)


def test_a_corrector_does_not_depend_on_batch_mates(tiny_pipeline):
    options = {**CALL, "guidance_scale": 1.0, "corrector_steps": 2}
    pair = tiny_pipeline(["red heart", "blue star"], generator=[seeded(1), seeded(2)], **options).images
    alone = tiny_pipeline("blue star", generator=[seeded(2)], **options).images
    torch.testing.assert_close(pair[1:], alone)
    uncorrected = tiny_pipeline("blue star", generator=[seeded(2)], **{**options, "corrector_steps": 0}).images
    assert not torch.allclose(alone, uncorrected, atol=1e-2)


def test_a_corrector_works_with_schedulers_of_diffusers(monkeypatch, tiny_pipeline):
    tiny_pipeline.scheduler = EulerDiscreteScheduler(prediction_type="v_prediction")
    sizes = count_calls(tiny_pipeline, monkeypatch)
    found = generate(tiny_pipeline, guidance_scale=1.0, corrector_steps=2)
    assert len(sizes) == 6 + 2 * 5
    tiny_pipeline.scheduler = AtlasEulerScheduler.from_config(tiny_pipeline.scheduler.config)
    expected = generate(tiny_pipeline, guidance_scale=1.0, corrector_steps=2)
    # Diffusers' σ̂ are float32: sixteen roundings of 6e-8, of terms up to ten times as large as their sum
    torch.testing.assert_close(found, expected, rtol=0, atol=16 * 6e-8 * 10)
    assert not torch.allclose(expected, generate(tiny_pipeline, guidance_scale=1.0), atol=1e-2)


@pytest.mark.parametrize("options", [{"corrector_steps": -1}, {"corrector_steps": 1, "corrector_snr": 0.0}])
def test_correctors_that_cannot_be(tiny_pipeline, options):
    with pytest.raises(ValueError, match="corrector_steps="):
        generate(tiny_pipeline, **options)


# ---------------------------------------------------------------------- coarse to fine


def constant_data_network(levels):
    """Exact for pictures of one colour c ~ N(0, 1) at any resolution: only the mean of the pixels says something about c."""

    def network(x, t):
        alpha, sigma = (value.double() for value in levels.levels_at(t.reshape(1), x))
        pixels = x.shape[-1] * x.shape[-2]
        mean = x.double().mean((2, 3), keepdim=True)
        data = alpha * mean / (alpha**2 + sigma**2 / pixels)
        return ((x - alpha * data) / sigma).float()

    return network


@pytest.mark.parametrize("name", ["AtlasDDIMScheduler", "AtlasEulerScheduler", "AtlasHeunScheduler", "AtlasMultistepScheduler"])
@pytest.mark.parametrize("levels", [2, 3])
def test_coarse_steps_sample_the_same_distribution(name, levels):
    """
    Network and sampler are linear, and detail has no mean: a colour is the mean of the start noise, of deviation 1/side, times
    a factor that is the deviation of the colours, known without any sampling error (which two runs of 3,000 pictures had).
    """
    scheduler = getattr(atlas_diffusers, name)(timestep_spacing="trailing", clip_sample=False)
    network = constant_data_network(type(scheduler).from_config(scheduler.config))
    pipeline = pipeline_of(network, scheduler, sample_size=16, channels=1, num_resolutions=levels)
    call = {"num_images_per_prompt": 6, "num_inference_steps": 24, "output_type": "latent"}
    deviations, left = [], []
    for hierarchical, side in ((True, 16 >> (levels - 1)), (False, 16)):
        found = pipeline(**call, generator=seeded(), hierarchical=hierarchical).images
        start = torch.randn(6, 1, side, side, generator=seeded())
        factors = found.mean((1, 2, 3)) / (start.mean((1, 2, 3)) * side)
        # the network's answers are rounded to float32, 6e-8 of noise of up to 157
        assert found.shape == (6, 1, 16, 16) and factors.std() < 1e-5
        deviations.append(factors.mean().item())
        left.append(found.std((2, 3)).max().item())
    # a picture of one colour, up to what plain steps leave of the noise
    assert left[0] < left[1] + 1e-5
    # what is missing to 1 is the error of 24 steps, and no more of it
    assert abs(deviations[0] - 1) < 1.05 * abs(deviations[1] - 1) < 0.2


def test_most_of_the_noisy_half_runs_on_small_pictures(monkeypatch):
    pipeline = build_tiny_pipeline(unet=build_tiny_unet(sample_size=16, num_resolutions=2), text_encoder=None, tokenizer=None)
    sides, forward, seen = [], pipeline.unet.forward, []
    monkeypatch.setattr(pipeline.unet, "forward", lambda x, t, **kw: (sides.append(x.shape[-1]), forward(x, t, **kw))[1])
    images = pipeline(
        num_inference_steps=10, hierarchical=True, generator=seeded(), output_type="np",
        callback_on_step_end=lambda p, i, t, tensors: (seen.append(i), {})[1],
    ).images  # fmt: skip
    assert sides == [8] * 5 + [16] * 5 and seen == list(range(10)) and images.shape == (1, 16, 16, 3)


def test_stages_meet_at_the_same_noise():
    scheduler = AtlasDDIMScheduler(timestep_spacing="trailing")
    scheduler.set_timesteps(12)
    stages = plan_stages(scheduler, 3)
    assert [stage.halvings for stage in stages] == [2, 1, 0]
    joined = [sigma * 2**stage.halvings for stage in stages for sigma in stage.sigmas[:-1]]
    np.testing.assert_allclose(joined, [noise_level(scheduler, t).sigma_hat for t in scheduler.timesteps], rtol=1e-6)
    for before, after in zip(stages, stages[1:]):
        assert after.sigmas[0] == pytest.approx(2 * before.sigmas[-1])
    assert stages[-1].sigmas[-1] == 0


def test_lifted_noise_is_white():
    x = 0.7 + 0.5 * torch.randn(20000, 1, 2, 2, generator=seeded())
    lifted = lift(x, 1.0, seeded(1))
    torch.testing.assert_close(F.avg_pool2d(lifted, 2), x)
    covariance = torch.cov(lifted.flatten(1).T)
    # twice 4.5 standard errors of a covariance of 20,000 draws: the entries are not independent
    assert (covariance - torch.eye(16)).abs().max() < 9 / math.sqrt(20000)


@pytest.mark.parametrize(
    "config, options, message",
    [
        ({"num_resolutions": 1}, {}, "needs a network trained at several resolutions.*num_resolutions=1"),
        ({"num_resolutions": 2}, {"height": 6, "width": 8}, "height=6 and width=8 must be multiples of 4"),
        ({"num_resolutions": 2}, {"latents": torch.zeros(1, 3, 8, 8)}, "cannot be combined with latents"),
        ({"num_resolutions": 2}, {"num_inference_steps": 3}, "needs at least 4 steps, got 3"),
    ],
)
def test_hierarchies_that_cannot_be(config, options, message):
    pipeline = build_tiny_pipeline(unet=build_tiny_unet(**config), text_encoder=None, tokenizer=None)
    with pytest.raises(ValueError, match=message):
        pipeline(hierarchical=True, **options)


def test_a_hierarchy_needs_our_schedulers():
    unet = build_tiny_unet(num_resolutions=2)
    pipeline = build_tiny_pipeline(unet=unet, scheduler=EulerDiscreteScheduler(), text_encoder=None, tokenizer=None)
    with pytest.raises(ValueError, match="a scheduler of this package, got EulerDiscreteScheduler"):
        pipeline(hierarchical=True)


# ---------------------------------------------------------------------- tiles


@settings(max_examples=60, deadline=None, database=None)
@given(st.integers(1, 40), st.integers(1, 20), st.integers(0, 19))
def test_tiles_cover_a_side_and_overlap(length, size, overlap):
    overlap = min(overlap, size - 1)
    starts = Tiles(size, overlap).starts(length)
    assert starts[0] == 0 and starts[-1] == max(0, length - size) and starts == sorted(set(starts))
    assert all(b - a <= size - overlap for a, b in zip(starts, starts[1:]))
    even = max(0, length - size) / max(1, len(starts) - 1)
    assert all(abs(start - even * index) <= 0.5 for index, start in enumerate(starts)), "spread evenly, to the nearest pixel"
    assert len(starts) == 1 or (len(starts) - 2) * (size - overlap) < length - size, "no tile more than needed"


def test_a_quarter_of_a_tile_overlaps(tiny_pipeline):
    for size, overlap, expected in ((10, None, 2), (8, None, 2), (10, 3, 3)):
        found = checked_tiles(tiny_pipeline, size, overlap)
        assert (found.size, found.overlap) == (size, expected)


def test_a_constant_network_gives_a_constant_picture():
    x = torch.randn(2, 3, 24, 40, generator=seeded())
    found = Tiles(16, 5).blend(lambda part: torch.full_like(part, 0.3), x)
    torch.testing.assert_close(found, torch.full_like(x, 0.3))


def test_a_network_that_looks_at_single_pixels_has_no_seams(tiny_pipeline):
    """The blend of equal predictions is that prediction, so tiles change nothing."""
    pipeline = pipeline_of(lambda x, t: torch.tanh(2 * x), AtlasDDIMScheduler(), sample_size=8)
    call = {"height": 20, "width": 12, "generator": seeded(), "output_type": "latent", "num_inference_steps": 4}
    plain = pipeline(**{**call, "generator": seeded()}).images
    tiled = pipeline(**{**call, "generator": seeded()}, tile_size=8).images
    torch.testing.assert_close(tiled, plain)


def test_tiles_keep_their_conditions(monkeypatch, tiny_pipeline):
    one = generate(tiny_pipeline, guidance_scale=3.0)
    torch.testing.assert_close(generate(tiny_pipeline, guidance_scale=3.0, tile_size=8), one)
    sizes, forward = [], tiny_pipeline.unet.forward

    def watched(x, t, encoder_hidden_states=None, **kw):
        sizes.append((tuple(x.shape), tuple(encoder_hidden_states.shape)))
        return forward(x, t, encoder_hidden_states=encoder_hidden_states, **kw)

    monkeypatch.setattr(tiny_pipeline.unet, "forward", watched)
    generate(tiny_pipeline, guidance_scale=3.0, tile_size=8, tile_overlap=4, height=8, width=16, num_inference_steps=1)
    assert sizes == [((2, 3, 8, 8), (2, 8, 16))] * 3


@pytest.mark.parametrize(
    "options, message",
    [
        ({"tile_size": 7}, "tile_size=7 must be a positive multiple of 2"),
        ({"tile_overlap": 2}, "tile_overlap=2 needs tile_size"),
        ({"tile_size": 8, "tile_overlap": 8}, "tile_overlap=8 must be at least 0 and below tile_size=8"),
        ({"guidance_interval": (2.0, 1.0)}, "guidance_interval="),
    ],
)
def test_bad_tiles_and_intervals_are_named(tiny_pipeline, options, message):
    with pytest.raises(ValueError, match=message):
        generate(tiny_pipeline, **options)


@pytest.mark.parametrize("options", [{"network_batch_size": 0}, {"network_batch_size": -1}, {"height": 0}])
def test_sizes_below_one_are_refused(tiny_pipeline, options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}={next(iter(options.values()))}"):
        generate(tiny_pipeline, **options)
