"""What users' code, and Diffusers' own suites, ask of a scheduler by name: answered like the stock class, number by number."""

import inspect
import warnings
from typing import get_args

import diffusers
import numpy as np
import pytest
import torch
from conftest import seeded
from oracles import PREDICTION_TYPES, Gaussian

import atlas_diffusers
from atlas_diffusers.schedulers import conversion
from atlas_diffusers.schedulers.options import DEFAULTS, SigmaOptions
from atlas_diffusers.schedulers.scheduling_atlas_ddpm import VARIANCE_TYPES

TWINS = {
    "AtlasDDPMScheduler": "DDPMScheduler",
    "AtlasDDIMScheduler": "DDIMScheduler",
    "AtlasPNDMScheduler": "PNDMScheduler",
    "AtlasEulerScheduler": "EulerDiscreteScheduler",
    "AtlasEulerAncestralScheduler": "EulerAncestralDiscreteScheduler",
    "AtlasHeunScheduler": "HeunDiscreteScheduler",
}
UNASKED = ("AtlasDDPMScheduler", "AtlasEulerScheduler", "AtlasEulerAncestralScheduler", "AtlasHeunScheduler")
EVERY_TWIN = pytest.mark.parametrize("name", TWINS)
EVERY = pytest.mark.parametrize("name", atlas_diffusers.SCHEDULERS)
EVERY_SAMPLER = pytest.mark.parametrize("name", [*TWINS, "AtlasMultistepScheduler"])


def pair(name, **options):
    return getattr(atlas_diffusers, name)(**options), getattr(diffusers, TWINS[name])(**options)


def network(x):
    return 0.5 * torch.tanh(x) + 0.3 * x.flip(-1)


def noise(seed=0):
    return torch.randn(2, 3, 8, 8, generator=seeded(seed))


def sample(scheduler, x, timesteps=None, scale=lambda s, x, t: s.scale_model_input(x, t)):
    random = {"generator": seeded(1)} if "generator" in inspect.signature(scheduler.step).parameters else {}
    for t in scheduler.timesteps if timesteps is None else timesteps:
        x = scheduler.step(network(scale(scheduler, x, t)), t, x, **random).prev_sample
    return x


# ------------------------------------------------------------------ constructors and configurations


@EVERY_TWIN
def test_arguments_and_defaults_are_the_stock_classs(name):
    ours = inspect.signature(getattr(atlas_diffusers, name)).parameters
    stock = inspect.signature(getattr(diffusers, TWINS[name])).parameters
    assert {key: ours[key].default for key in stock} == {key: p.default for key, p in stock.items()}
    assert list(ours)[:5] == list(stock)[:5]


@EVERY
def test_an_editor_and_a_configuration_see_the_same_arguments(name):
    """What is written in the constructor: T, the betas, the class's own options, and a typed dictionary of the others."""
    cls = getattr(atlas_diffusers, name)
    written = dict(inspect.unwrap(cls.__init__).__annotations__)
    shared = get_args(written.pop("options"))[0]
    known = inspect.signature(cls).parameters.keys()
    assert {**written, **shared.__annotations__}.keys() == known
    assert cls().config.keys() - known <= {"_class_name", "_use_default_values", "_derived_betas"}
    assert DEFAULTS.keys() == SigmaOptions.__annotations__.keys()
    with pytest.raises(TypeError, match="beta_ends"):
        cls(beta_ends=0.1)


@pytest.mark.parametrize("options", [{}, {"beta_schedule": "sigmoid", "clip_sample": True}, {"shift": 3.0}], ids=str)
@EVERY
def test_a_configuration_survives_reading(name, options, tmp_path):
    if "shift" in options and name.endswith("NoiseScheduler"):
        return  # which has betas only
    scheduler = getattr(atlas_diffusers, name)(**options)
    again = type(scheduler).from_config(scheduler.config)
    assert again.config == scheduler.config and type(scheduler).from_config(again.config).config == scheduler.config
    scheduler.save_pretrained(tmp_path)
    loaded = type(scheduler).from_pretrained(tmp_path)
    expected = {key: value for key, value in scheduler.config.items() if key != "_use_default_values"}
    if "shift" in options:  # a flow's file lists betas, which are not read
        expected["_use_default_values"] = loaded.config["_use_default_values"]
    assert loaded.config == expected


@EVERY_SAMPLER
def test_betas_may_be_an_array(name, tmp_path):
    scheduler = getattr(atlas_diffusers, name)(trained_betas=np.array([0.1, 0.3]), num_train_timesteps=2)
    scheduler.save_pretrained(tmp_path)
    loaded = type(scheduler).from_pretrained(tmp_path)
    assert loaded.betas.tolist() == scheduler.betas.tolist() == pytest.approx([0.1, 0.3])


@EVERY
def test_a_configuration_survives_another_class(name):
    scheduler = getattr(atlas_diffusers, name)(num_train_timesteps=500, beta_end=0.013, clip_sample=True)
    for other in (*TWINS, *TWINS.values(), "UniPCMultistepScheduler"):
        back = type(scheduler).from_config(getattr(diffusers, other).from_config(scheduler.config).config)
        assert {key: back.config[key] for key in scheduler.config} == dict(scheduler.config), other


def test_a_swap_clips_where_the_old_scheduler_did():
    ddim, ddpm = atlas_diffusers.AtlasDDIMScheduler, atlas_diffusers.AtlasDDPMScheduler
    assert ddim.from_config(diffusers.DDIMScheduler().config).config.clip_sample
    assert ddpm.from_config(diffusers.DDIMScheduler().config).config.clip_sample
    assert ddim.from_config({"_class_name": "DDIMScheduler"}).config.clip_sample
    assert ddim.from_config({"beta_end": 0.01}).config.clip_sample
    for config in (diffusers.PNDMScheduler().config, {"_class_name": "EulerDiscreteScheduler"}, {"_class_name": "Unknown"}):
        assert not ddim.from_config(config).config.clip_sample
        assert ddim.from_config(config, clip_sample=True).config.clip_sample
    assert not ddim.from_config(diffusers.DDIMScheduler(clip_sample=False).config).config.clip_sample


# ------------------------------------------------------------------ before set_timesteps


@pytest.mark.parametrize("name", UNASKED)
def test_a_trajectory_before_set_timesteps_is_diffusers(name):
    ours, stock = pair(name, num_train_timesteps=40)
    torch.testing.assert_close(ours.timesteps.float(), stock.timesteps.float())
    if hasattr(stock, "set_begin_index"):
        stock.set_begin_index(0)
    x = noise() * stock.init_noise_sigma
    expected, actual = sample(stock, x), sample(ours, x)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_noise_schedulers_step_before_set_timesteps():
    ours = atlas_diffusers.SigmoidNoiseScheduler(num_train_timesteps=40)
    stock = diffusers.DDPMScheduler(num_train_timesteps=40, trained_betas=ours.betas.tolist())
    for t in (39, 17, 0):
        a, b = (s.step(network(noise()), t, noise(), generator=seeded()).prev_sample for s in (ours, stock))
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["AtlasDDIMScheduler", "AtlasPNDMScheduler", "AtlasMultistepScheduler"])
def test_the_others_ask_for_set_timesteps(name):
    with pytest.raises(ValueError, match="before set_timesteps"):
        getattr(atlas_diffusers, name)().step(noise(), 5, noise())


# ------------------------------------------------------------------ helpers that are asked for by name


@EVERY_TWIN
def test_init_noise_sigma_is_the_stock_number(name):
    for spacing in ("linspace", "leading"):
        ours, stock = pair(name, timestep_spacing=spacing)
        for scheduler in (ours, stock):
            scheduler.set_timesteps(10)
        assert float(ours.init_noise_sigma) == pytest.approx(float(stock.init_noise_sigma), rel=1e-6)
        assert torch.is_tensor(ours.init_noise_sigma) == torch.is_tensor(stock.init_noise_sigma)


@pytest.mark.parametrize("kind", VARIANCE_TYPES)
def test_ddpm_variances_are_diffusers(kind):
    ours, stock = pair("AtlasDDPMScheduler", variance_type=kind)
    predicted = torch.tensor([-0.5, 0.7])
    for steps in (None, 10):
        if steps:
            ours.set_timesteps(steps), stock.set_timesteps(steps)
        for t in (0, 500, 900):
            a, b = (s._get_variance(t, predicted_variance=predicted) for s in (ours, stock))
            torch.testing.assert_close(a, b, rtol=2e-3, atol=1e-12)  # Diffusers' float32 1 − ᾱ_t/ᾱ_s, of 1e-4
            assert int(ours.previous_timestep(t)) == int(stock.previous_timestep(t))
    assert not ours.custom_timesteps
    ours.set_timesteps(timesteps=[900, 17, 0])
    assert ours.custom_timesteps and ours.previous_timestep(torch.tensor(17)).item() == 0


def test_ddim_variance_and_final_level_are_diffusers():
    for one in (True, False):
        ours, stock = pair("AtlasDDIMScheduler", set_alpha_to_one=one)
        torch.testing.assert_close(ours.final_alpha_cumprod, stock.final_alpha_cumprod)
        for t, before in ((980, 960), (420, 400), (487, 486), (10, -10)):
            torch.testing.assert_close(ours._get_variance(t, before), stock._get_variance(t, before), rtol=1e-3, atol=1e-7)


# ------------------------------------------------------------------ PNDM's two halves


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("skip", [False, True])
def test_pndm_by_its_halves_is_diffusers(skip, prediction_type):
    results = []
    ours, stock = pair("AtlasPNDMScheduler", skip_prk_steps=skip, prediction_type=prediction_type)
    for scheduler in (ours, stock):
        scheduler.set_timesteps(12)
        x = noise()
        for half, timesteps in (("step_prk", scheduler.prk_timesteps), ("step_plms", scheduler.plms_timesteps)):
            for t in timesteps:
                x = getattr(scheduler, half)(network(x), t, x).prev_sample
        results.append(x)
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(ours.prk_timesteps, stock.prk_timesteps)
    np.testing.assert_array_equal(ours.plms_timesteps, stock.plms_timesteps)
    assert ours.counter == stock.counter == len(ours.timesteps) and len(ours.ets) == len(stock.ets) == 4
    for mine, theirs in zip(ours.ets, stock.ets):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    ours.set_timesteps(12)
    torch.testing.assert_close(sample(ours, noise()), results[0])


def test_pndms_halves_take_any_timestep_and_past_as_diffusers_do():
    past = [noise(seed).double() for seed in range(4)]
    results = []
    ours, stock = pair("AtlasPNDMScheduler")
    stock.alphas_cumprod = stock.alphas_cumprod.double()
    for scheduler in (ours, stock):
        scheduler.set_timesteps(50)
        scheduler.ets = past[:]
        x = scheduler.step_prk(network(past[0]), 45, past[0]).prev_sample
        x = scheduler.step_prk(network(x), 31, x).prev_sample
        results.append([x, *(scheduler.step_plms(network(x), t, x).prev_sample for t in (900, 7, 3, 500))])
    for mine, theirs in zip(*results):
        torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-6)  # its final ᾱ stays in float32


def test_pndms_halves_out_of_turn_are_named():
    scheduler = atlas_diffusers.AtlasPNDMScheduler()
    assert scheduler.prk_timesteps is None and scheduler.plms_timesteps is None
    with pytest.raises(ValueError, match="before set_timesteps"):
        scheduler.step_plms(noise(), 1, noise())
    scheduler.set_timesteps(10)
    with pytest.raises(ValueError, match="3 predictions that step_prk"):
        scheduler.step_plms(noise(), 1, noise())
    scheduler.counter = 12
    with pytest.raises(ValueError, match="more often than the 12 calls"):
        scheduler.step_prk(noise(), 1, noise())


def test_pndm_warns_where_its_runge_kutta_steps_cannot_start():
    """The remedies that the warning names give the mean of the data."""
    data, start = Gaussian(1.5, 0.5), torch.randn(500, 1, dtype=torch.float64, generator=seeded())
    remedies = ({"skip_prk_steps": True}, {"timestep_spacing": "leading"})
    for options, broken in (({}, True), *((remedy, False) for remedy in remedies)):
        config = {"beta_schedule": "cosine", "timestep_spacing": "trailing", "set_alpha_to_one": True, **options}
        scheduler, x = atlas_diffusers.AtlasPNDMScheduler(**config), start
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            scheduler.set_timesteps(60)
        assert any("σ/α = 20291 their differences ruin" in str(w.message) for w in caught) == broken
        for t, level in zip(scheduler.timesteps, scheduler._grid.source):
            x = scheduler.step(data.network("epsilon", x, *level), t, x).prev_sample
        assert (abs(x.mean().item() - 1.5) > 1000) == broken
        assert broken or x.mean().item() == pytest.approx(1.5, abs=0.1)


# ------------------------------------------------------------------ position


@pytest.mark.parametrize("convert", [lambda t: t, torch.clone, lambda t: t[:7]], ids=["view", "copy", "part"])
@EVERY_SAMPLER
def test_a_part_of_the_timesteps_may_take_their_place(name, convert):
    scheduler = getattr(atlas_diffusers, name)()
    start = 3 * scheduler.order
    scheduler.set_timesteps(12)
    part = convert(scheduler.timesteps[start:])
    expected = sample(scheduler, noise(), scheduler.timesteps[start : start + len(part)])
    scheduler.set_timesteps(12)
    scheduler.timesteps = convert(scheduler.timesteps[start:])
    assert scheduler.index_for_timestep(scheduler.timesteps[1]) == 1
    assert torch.equal(sample(scheduler, noise()), expected)
    assert scheduler.step_index == len(part) and torch.equal(scheduler.timesteps, part)


def test_other_timesteps_are_refused():
    scheduler = atlas_diffusers.AtlasDDIMScheduler()
    scheduler.set_timesteps(4)
    for wrong in (scheduler.timesteps[::2], scheduler.timesteps[:0], torch.tensor([750, 251]), scheduler.timesteps.flip(0)):
        with pytest.raises(ValueError, match="are not a part of those that set_timesteps chose"):
            scheduler.timesteps = wrong
    assert scheduler.timesteps.tolist() == [750, 500, 250, 0]


def test_a_step_may_be_repeated():
    """As Diffusers' Cosmos pipelines do by way of ``_step_index``."""
    scheduler = atlas_diffusers.AtlasHeunScheduler()
    scheduler.set_timesteps(4)
    t = scheduler.timesteps[1].item()
    scheduler.step(noise(), scheduler.timesteps[0], noise())
    assert not torch.equal(scheduler.step(noise(1), t, noise()).prev_sample, noise())
    scheduler._step_index -= 1  # of two equal timesteps the first, a corrector, which has nothing to correct now
    assert scheduler.step_index == 1 and torch.equal(scheduler.step(noise(1), t, noise()).prev_sample, noise())


# ------------------------------------------------------------------ tensors and numbers


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@EVERY_SAMPLER
def test_a_step_returns_tensors_of_its_own(name, prediction_type):
    """The first step, and the last one, where the sample is the data prediction."""
    scheduler = getattr(atlas_diffusers, name)(prediction_type=prediction_type, clip_sample=False)
    scheduler.set_timesteps(1)
    output, x = noise(1), noise()
    before = output.clone()
    for result in scheduler.step(output, scheduler.timesteps[0], x, return_dict=False):
        result.fill_(7)
        assert torch.equal(output, before) and torch.equal(x, noise())


@pytest.mark.parametrize("betas", [{"beta_start": 0.01, "beta_end": 0.2}, {"beta_start": 0.1, "beta_end": 2.0}], ids=str)
@EVERY_SAMPLER
def test_timesteps_without_signal_are_refused(name, betas):
    """Diffusers takes such betas, and gives NaN or divides by zero; where signal is left the numbers are its own."""
    with pytest.warns(UserWarning, match=r"steps cannot start at timestep \d+ and above: betas must lie in \(0, 1\)"):
        scheduler = getattr(atlas_diffusers, name)(**betas, timestep_spacing="trailing")
    scheduler.set_timesteps(10)
    with pytest.raises(ValueError, match=r"timestep .*betas must lie in \(0, 1\) and keep ᾱ above 0 in float32"):
        scheduler.step(noise(), scheduler.timesteps[0], noise())
    if name == "AtlasDDIMScheduler":
        stock = diffusers.DDIMScheduler(**betas, timestep_spacing="trailing")
        stock.set_timesteps(10)
        a, b = (s.step(network(noise()), 0, noise()).prev_sample for s in (scheduler, stock))
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_heun_that_starts_at_a_corrector_corrects_nothing():
    scheduler = atlas_diffusers.AtlasHeunScheduler()
    scheduler.set_timesteps(5)
    start = noise() * 3
    x = scheduler.step(network(start), scheduler.timesteps[3], start).prev_sample
    assert torch.equal(x, start) and scheduler.state_in_first_order
    rest = sample(scheduler, x, scheduler.timesteps[4:])
    scheduler.set_timesteps(5)
    assert torch.equal(rest, sample(scheduler, start, scheduler.timesteps[4:]))


def test_heun_in_a_loop_that_keeps_the_scaled_sample_is_diffusers():
    results = []
    for scheduler in pair("AtlasHeunScheduler"):
        scheduler.set_timesteps(8)
        scheduler.set_begin_index(0)
        x = noise() * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            x = scheduler.scale_model_input(x, t)
            x = scheduler.step(network(x), t, x).prev_sample
        results.append(x)
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_a_subclass_outside_adds_options():
    from atlas_diffusers.schedulers import extend_config

    class Brighter(atlas_diffusers.AtlasHeunScheduler):
        seen = None

        @extend_config
        def __init__(self, brightness: float = 0.1, beta_end: float = 0.02):
            self.seen = brightness, beta_end

    scheduler = Brighter(500, 0.001, brightness=0.3, use_karras_sigmas=True)
    assert scheduler.seen == (0.3, 0.02) and scheduler.betas[[0, -1]].tolist() == pytest.approx([0.001, 0.02])
    own = {"brightness": 0.3, "num_train_timesteps": 500, "use_karras_sigmas": True, "timestep_spacing": "linspace"}
    assert scheduler.config.items() >= own.items()
    assert Brighter.from_config(scheduler.config).config == scheduler.config
    with pytest.raises(TypeError, match="brightnes"):
        Brighter(brightnes=1)


@pytest.fixture
def said(monkeypatch):
    texts = []
    monkeypatch.setattr(conversion.logger, "warning", texts.append)
    return texts


@pytest.mark.parametrize("cls", [atlas_diffusers.AtlasDDIMScheduler, atlas_diffusers.AtlasEulerScheduler])
def test_overrides_that_a_class_has_not_are_named(cls, said):
    stock = diffusers.PNDMScheduler(skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1).config
    assert cls.from_config(stock, beta_end=0.01).config.beta_end == 0.01 and not said
    assert cls.from_config(stock, return_unused_kwargs=True, solver_order=3)[1]["solver_order"] == 3 and not said
    cls.from_config(stock, solver_order=3, beta_ent=1)
    assert said == [f"{cls.__name__} has no solver_order=3, beta_ent=1: without effect"]


def test_continuous_timesteps_that_a_class_does_not_give_are_named(said):
    """As of Stable Video Diffusion, whose network is told ¼ log σ̂."""
    options = {"timestep_type": "continuous", "prediction_type": "v_prediction", "use_karras_sigmas": True}
    stock = diffusers.EulerDiscreteScheduler(**options).config
    assert atlas_diffusers.AtlasEulerScheduler.from_config(stock).config.timestep_type == "continuous" and not said
    atlas_diffusers.AtlasDDIMScheduler.from_config(stock)
    assert len(said) == 1 and "gives a network whole timesteps, but this one learned timestep_type='continuous'" in said[0]
