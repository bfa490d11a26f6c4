import functools
import itertools
import warnings

import diffusers
import numpy as np
import pytest
import torch
from conftest import seeded
from oracles import PREDICTION_TYPES, Gaussian, order_of_convergence, prediction

from atlas_diffusers.schedulers import AtlasDDIMScheduler, AtlasDDPMScheduler, BaseNoiseScheduler

BOTH = pytest.mark.parametrize("cls", [AtlasDDIMScheduler, AtlasDDPMScheduler])
STOCHASTIC = pytest.mark.parametrize("cls, options", [(AtlasDDIMScheduler, {"eta": 1.0}), (AtlasDDPMScheduler, {})])
STOCK = {AtlasDDIMScheduler: diffusers.DDIMScheduler, AtlasDDPMScheduler: diffusers.DDPMScheduler}
CLIPS = {
    "free": {},
    "clip": {"clip_sample": True, "clip_sample_range": 1.5},
    "threshold": {"thresholding": True, "sample_max_value": 1.5, "dynamic_thresholding_ratio": 0.9},
}
STABLE_DIFFUSION = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def network(x, channels=1):
    output = 0.5 * torch.tanh(x) + 0.3 * x.flip(-1)
    return torch.cat([output, 0.05 + torch.sigmoid(x)], dim=1) if channels == 2 else output


def noise(seed=0, batch=2):
    return torch.randn(batch, 3, 8, 8, generator=seeded(seed))


def sample(scheduler, x, steps=None, channels=1, seed=1, **options):
    """A whole trajectory, on the steps already chosen if ``steps`` is None."""
    if steps is not None:
        scheduler.set_timesteps(steps)
    generator = seeded(seed)
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, channels), t, x, generator=generator, **options).prev_sample
    return x


def assert_same_trajectory(ours, stock, steps, **options):
    expected = sample(stock, noise(), steps, **options)
    actual = sample(ours, noise(), steps, **options)
    assert torch.equal(ours.timesteps, stock.timesteps)
    error = (actual - expected).abs().max() / expected.abs().max().clamp(min=1)
    assert error < 1e-5, f"{steps} steps, {options}, {dict(stock.config)}"


# ------------------------------------------------------------------ parity with Diffusers


@BOTH
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2", "trained"])
def test_trajectory_is_diffusers(cls, schedule, prediction_type, spacing):
    betas = {"trained_betas": np.linspace(0.001, 0.01, 1000).tolist()}
    schedule = betas if schedule == "trained" else {"beta_schedule": schedule}
    for zero_snr, clip, steps in itertools.product([False, True], CLIPS, [7, 11]):
        if zero_snr and prediction_type == "epsilon":
            continue  # Diffusers divides by zero
        config = {"clip_sample": False, "prediction_type": prediction_type, "timestep_spacing": spacing, **schedule}
        config |= CLIPS[clip]
        config["rescale_betas_zero_snr"] = zero_snr
        assert_same_trajectory(cls(**config), STOCK[cls](**config), steps)


@pytest.mark.parametrize("steps", [1, 3, 13, 50])
@BOTH
def test_any_number_of_steps_is_diffusers(cls, steps):
    assert_same_trajectory(cls(clip_sample=True), STOCK[cls](clip_sample=True), steps)


@pytest.mark.parametrize("steps", [7, 999])
@BOTH
def test_trajectory_is_diffusers_in_float64(cls, steps):
    """In float32 Diffusers' 1 − ᾱ_t/ᾱ_s of neighbouring timesteps is off by 1e-4 of itself; in float64 both are exact."""
    ours, stock = cls(clip_sample=True), STOCK[cls](clip_sample=True)
    stock.alphas_cumprod = stock.alphas_cumprod.double()
    expected, actual = sample(stock, noise().double(), steps), sample(ours, noise().double(), steps)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("use_clipped_model_output", [False, True])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("config", [{"clip_sample": True}, STABLE_DIFFUSION], ids=["clipped", "stable-diffusion"])
def test_stochastic_ddim_is_diffusers(config, eta, use_clipped_model_output):
    options = {"eta": eta, "use_clipped_model_output": use_clipped_model_output}
    for steps in (7, 20):
        assert_same_trajectory(AtlasDDIMScheduler(**config), diffusers.DDIMScheduler(**config), steps, **options)


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_small_log", "fixed_large", "learned", "learned_range"])
def test_ddpm_variance_is_diffusers(variance_type):
    config = {"variance_type": variance_type, "clip_sample": True}
    channels = 2 if variance_type.startswith("learned") else 1
    ours, stock = AtlasDDPMScheduler(**config), diffusers.DDPMScheduler(**config)
    assert_same_trajectory(ours, stock, 12, channels=channels)


def test_ddpm_fixed_large_log_is_beta():
    scheduler = AtlasDDPMScheduler(variance_type="fixed_large_log", timestep_spacing="trailing", clip_sample=False)
    scheduler.set_timesteps(10)
    x = noise().double()
    z = torch.randn(x.shape, generator=seeded(5), dtype=torch.float64)
    now, after = scheduler.alphas_cumprod[[599, 499]].double().tolist()
    data = (x - (1 - now) ** 0.5 * network(x)) / now**0.5
    beta = 1 - now / after
    mean = after**0.5 * beta / (1 - now) * data + (now / after) ** 0.5 * (1 - after) / (1 - now) * x
    step = scheduler.step(network(x), scheduler.timesteps[4], x, generator=seeded(5))
    torch.testing.assert_close(step.prev_sample, mean + beta**0.5 * z)
    torch.testing.assert_close(step.pred_original_sample, data)


def test_ddpm_custom_timesteps_are_diffusers():
    ours, stock = AtlasDDPMScheduler(clip_sample=True), diffusers.DDPMScheduler()
    for scheduler in (ours, stock):
        scheduler.set_timesteps(timesteps=[980, 611, 610, 300, 12])
    torch.testing.assert_close(sample(ours, noise()), sample(stock, noise()), rtol=1e-5, atol=1e-5)


@BOTH
@pytest.mark.parametrize("zero_snr", [False, True])
def test_forward_process_is_diffusers(cls, zero_snr):
    config = {"rescale_betas_zero_snr": zero_snr, "prediction_type": "v_prediction"}
    ours, stock = cls(**config), STOCK[cls](**config)
    x, eps = noise(0, 4), noise(1, 4)
    for t in (torch.tensor([0, 17, 500, 999]), torch.tensor([250])):
        torch.testing.assert_close(ours.add_noise(x, eps, t), stock.add_noise(x, eps, t), rtol=0, atol=1e-6)
        torch.testing.assert_close(ours.get_velocity(x, eps, t), stock.get_velocity(x, eps, t), rtol=0, atol=1e-6)


@BOTH
def test_forward_process_between_timesteps(cls):
    scheduler = cls()
    x, eps = noise(0).double(), noise(1).double()
    t = torch.tensor([10.5, 500.25])
    log = np.log(1 / scheduler.alphas_cumprod.double().numpy() - 1) / 2
    sigma_hat = torch.from_numpy(np.exp(np.interp(t.numpy(), np.arange(1000), log))).view(2, 1, 1, 1)
    expected = (x + sigma_hat * eps) / (1 + sigma_hat**2).sqrt()
    torch.testing.assert_close(scheduler.add_noise(x, eps, t), expected, rtol=0, atol=1e-9)


# ------------------------------------------------------------------ closed forms


def flow_error(scheduler, data, final):
    """Largest error of DDIM with the exact network, against the ODE's solution; ``scheduler`` has its steps."""
    z = torch.linspace(-2, 2, 5, dtype=torch.float64)
    levels = [*scheduler._grid.source, final]
    x = data.flow(z, *levels[0])
    for t, level in zip(scheduler.timesteps, levels):
        x = scheduler.step(data.network(scheduler.config.prediction_type, x, *level), t, x).prev_sample
    return (x - data.flow(z, *final)).abs().max().item()


@pytest.mark.parametrize("grid", ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas"])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_ddim_converges_to_the_flow_at_order_one(prediction_type, grid):
    scheduler = AtlasDDIMScheduler(
        prediction_type=prediction_type, **{grid: True}, final_sigmas_type="sigma_min", clip_sample=False
    )
    numbers = [100, 250, 625]
    errors = []
    for steps in numbers:
        scheduler.set_timesteps(steps)
        errors.append(flow_error(scheduler, Gaussian(), scheduler.process.level_at(0)))
    assert errors[-1] < 0.04
    assert order_of_convergence(numbers, errors) == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_ddim_with_every_timestep_reaches_the_data(prediction_type):
    scheduler = AtlasDDIMScheduler(prediction_type=prediction_type, clip_sample=False)
    scheduler.set_timesteps(1000)
    assert flow_error(scheduler, Gaussian(), (1.0, 0.0)) < 0.01


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_a_ddim_step_with_the_true_prediction_keeps_data_and_noise(prediction_type):
    scheduler = AtlasDDIMScheduler(
        prediction_type=prediction_type, rescale_betas_zero_snr=prediction_type != "epsilon", clip_sample=False
    )
    scheduler.set_timesteps(4)
    data, eps = noise(0).double(), noise(1).double()
    (alpha, sigma), (after_alpha, after_sigma) = (
        (a**0.5, (1 - a) ** 0.5) for a in scheduler.alphas_cumprod[[750, 500]].double().tolist()
    )
    output = prediction(prediction_type, data, eps, alpha, sigma)
    step = scheduler.step(output, 750, alpha * data + sigma * eps)
    torch.testing.assert_close(step.pred_original_sample, data, rtol=0, atol=1e-9)
    torch.testing.assert_close(step.prev_sample, after_alpha * data + after_sigma * eps, rtol=0, atol=1e-9)


@BOTH
def test_the_first_step_from_zero_snr_believes_the_network(cls):
    scheduler = cls(
        prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True, clip_sample=False
    )
    scheduler.set_timesteps(4)
    x = noise().double()
    step = scheduler.step(-network(x), scheduler.timesteps[0], x, generator=seeded())
    torch.testing.assert_close(step.pred_original_sample, network(x))
    assert step.prev_sample.isfinite().all()


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_ddpm_has_the_moments_of_its_recursion(prediction_type):
    data, count = Gaussian(mean=2.0, std=0.5), 20_000
    scheduler = AtlasDDPMScheduler(prediction_type=prediction_type, clip_sample=False)
    scheduler.set_timesteps(200)
    generator = seeded(7)
    x = torch.randn(count, 1, generator=generator, dtype=torch.float64)
    for t, level in zip(scheduler.timesteps, scheduler._grid.source):
        x = scheduler.step(data.network(prediction_type, x, *level), t, x, generator=generator).prev_sample
    mean, std = data.ancestral_moments(scheduler.alphas_cumprod, scheduler.timesteps)
    assert x.mean().item() == pytest.approx(mean, abs=5 * std / count**0.5)
    assert x.std().item() == pytest.approx(std, abs=5 * std / (2 * count) ** 0.5)
    assert (mean, std) == pytest.approx((2.0, 0.5), abs=0.02)


# ------------------------------------------------------------------ position in the grid


@BOTH
def test_timesteps_are_found_by_value(cls):
    scheduler = cls()
    scheduler.set_timesteps(10)
    x = noise()
    expected = scheduler.step(network(x), scheduler.timesteps[4], x, generator=seeded()).prev_sample
    for t in (500, 500.0, torch.tensor(500), torch.tensor([500, 500]), torch.tensor(500.0), np.int64(500)):
        scheduler.set_timesteps(10)
        assert torch.equal(scheduler.step(network(x), t, x, generator=seeded()).prev_sample, expected)
    with pytest.raises(ValueError, match="501.5"):
        scheduler.step(network(x), 501.5, x)


@BOTH
def test_set_timesteps_starts_afresh(cls):
    scheduler = cls()
    first = sample(scheduler, noise(), 7)
    sample(scheduler, noise(), 4)
    scheduler.set_begin_index(2)
    assert torch.equal(sample(scheduler, noise(), 7), first)
    assert scheduler.begin_index is None


@BOTH
def test_explicit_sigmas_are_the_sigmas_of_a_grid(cls):
    grid, explicit = cls(use_karras_sigmas=True), cls()
    grid.set_timesteps(9)
    explicit.set_timesteps(sigmas=grid.sigmas.tolist())
    torch.testing.assert_close(explicit.timesteps, grid.timesteps, rtol=0, atol=1e-3)
    torch.testing.assert_close(sample(explicit, noise()), sample(grid, noise()), rtol=1e-5, atol=1e-5)


@BOTH
def test_explicit_timesteps_are_the_timesteps_of_a_spacing(cls):
    spaced, explicit = cls(), cls()
    spaced.set_timesteps(10)
    explicit.set_timesteps(timesteps=spaced.timesteps.tolist())
    assert torch.equal(sample(explicit, noise()), sample(spaced, noise()))


@pytest.mark.parametrize(
    "arguments, found",
    [
        ({}, "exactly one"),
        ({"num_inference_steps": 5, "timesteps": [5, 1]}, "num_inference_steps.*timesteps"),
        ({"timesteps": [5, 1], "sigmas": [1.0, 0.0]}, "timesteps.*sigmas"),
        ({"num_inference_steps": 0}, "num_inference_steps=0"),
        ({"num_inference_steps": -3}, "num_inference_steps=-3"),
        ({"num_inference_steps": 1001}, "num_inference_steps=1001.*1 to 1000"),
        ({"num_inference_steps": 2.5}, "num_inference_steps=2.5"),
        ({"timesteps": [1, 5]}, r"timesteps.*\[1, 5\]"),
        ({"timesteps": [5, 5]}, r"timesteps.*\[5, 5\]"),
        ({"timesteps": [1000, 5]}, r"timesteps.*999\], got \[1000, 5\]"),
        ({"timesteps": [5, -1]}, r"timesteps.*\[5, -1\]"),
        ({"timesteps": []}, "timesteps"),
        ({"sigmas": [1.0]}, r"sigmas.*\[1.0\]"),
        ({"sigmas": [1.0, 2.0, 0.0]}, r"sigmas.*2.0"),
        ({"sigmas": [1.0, -0.5]}, r"sigmas.*-0.5"),
        ({"sigmas": [float("inf"), 1.0]}, "sigmas.*inf"),
        ({"sigmas": [1.0, float("nan")]}, "sigmas.*nan"),
    ],
    ids=str,
)
@BOTH
def test_wrong_steps_are_named(cls, arguments, found):
    with pytest.raises(ValueError, match=found):
        cls().set_timesteps(**arguments)


def test_offset_past_the_last_timestep_is_named():
    with pytest.raises(ValueError, match="steps_offset=1.*1000"):
        AtlasDDIMScheduler(steps_offset=1).set_timesteps(1000)


@BOTH
def test_steps_out_of_order_are_named(cls):
    scheduler, x = cls(), noise()
    sample(scheduler, x, 3)
    with pytest.raises(ValueError, match="more often than the 3 steps"):
        scheduler.step(x, scheduler.timesteps[-1], x)


def test_wrong_step_arguments_are_named():
    ddim, ddpm, x = AtlasDDIMScheduler(), AtlasDDPMScheduler(variance_type="learned"), noise()
    for scheduler in (ddim, ddpm):
        scheduler.set_timesteps(3)
    with pytest.raises(ValueError, match="generator or variance_noise"):
        ddim.step(x, ddim.timesteps[0], x, eta=1.0, generator=seeded(), variance_noise=x)
    with pytest.raises(ValueError, match="'learned'.*6 channels, got 3"):
        ddpm.step(x, ddpm.timesteps[0], x)


# ------------------------------------------------------------------ configuration


@pytest.mark.parametrize(
    "config, found",
    [
        ({"prediction_type": "velocity"}, "prediction_type='velocity'.*v_prediction"),
        ({"timestep_spacing": "middle"}, "timestep_spacing='middle'.*trailing"),
        ({"beta_schedule": "parabolic"}, "beta_schedule='parabolic'.*quadratic"),
        ({"final_sigmas_type": "one"}, "final_sigmas_type='one'.*sigma_min"),
        ({"use_karras_sigmas": True, "use_beta_sigmas": True}, "use_karras_sigmas.*use_beta_sigmas"),
        ({"beta_start": -1.0}, r"\(0, 1\).*-1"),
        ({"steps_offset": -3}, "steps_offset=-3; expected 0 or more"),
    ],
)
@BOTH
def test_wrong_options_are_named(cls, config, found):
    with pytest.raises(ValueError, match=found):
        cls(**config)


def test_wrong_variance_type_is_named():
    with pytest.warns(UserWarning, match="variance_type='large'.*fixed_large"):
        scheduler = AtlasDDPMScheduler(variance_type="large")
    scheduler.set_timesteps(3)
    with pytest.raises(ValueError, match="variance_type='large'.*fixed_large"):
        scheduler.step(noise(), scheduler.timesteps[0], noise(), generator=seeded())


def public(config):
    return {key: value for key, value in config.items() if key != "_use_default_values"}


@BOTH
def test_save_and_load(cls, tmp_path):
    scheduler = cls(beta_schedule="sigmoid", prediction_type="flow_prediction", use_lu_lambdas=True, clip_sample=True)
    scheduler.save_pretrained(tmp_path)
    loaded = cls.from_pretrained(tmp_path)
    assert public(loaded.config) == public(scheduler.config)
    assert torch.equal(sample(loaded, noise(), 5), sample(scheduler, noise(), 5))


STOCK_NAMES = ["DDIM", "DDPM", "PNDM", "EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete", "DPMSolverMultistep"]
CHOSEN = {
    "num_train_timesteps": 500,
    "beta_start": 0.0002,
    "beta_end": 0.013,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "steps_offset": 1,
}


@pytest.mark.parametrize("name", STOCK_NAMES)
@BOTH
def test_config_travels_to_diffusers_and_back_in_silence(cls, name, diffusers_log):
    stock = getattr(diffusers, f"{name}Scheduler")
    original = stock(**CHOSEN)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        warnings.simplefilter("error", UserWarning)
        ours = cls.from_config(original.config)
        back = stock.from_config(ours.config)
    assert [record.getMessage() for record in diffusers_log] == []
    for key, value in CHOSEN.items():
        assert ours.config[key] == back.config[key] == value, key
    assert public(back.config).items() >= public(original.config).items()
    torch.testing.assert_close(ours.alphas_cumprod, back.alphas_cumprod, rtol=0, atol=1e-7)


@pytest.mark.parametrize("schedule", ["cosine", "quadratic", "sigmoid", "exponential"])
def test_own_schedules_travel_to_diffusers(schedule, diffusers_log):
    ours = AtlasDDIMScheduler(beta_schedule=schedule)
    for name in STOCK_NAMES:
        stock = getattr(diffusers, f"{name}Scheduler").from_config(ours.config)
        torch.testing.assert_close(stock.alphas_cumprod, ours.alphas_cumprod, rtol=0, atol=1e-6, msg=name)
    assert [record.getMessage() for record in diffusers_log] == []


def test_derived_betas_give_way_when_the_schedule_is_overridden():
    ours = AtlasDDIMScheduler(beta_schedule="quadratic")
    kept = AtlasDDPMScheduler.from_config(ours.config)
    changed = AtlasDDPMScheduler.from_config(kept.config, beta_schedule="linear")
    assert torch.equal(kept.betas, ours.betas)
    assert torch.equal(changed.betas, AtlasDDPMScheduler(beta_schedule="linear").betas)
    explicit = AtlasDDIMScheduler(trained_betas=[0.1, 0.2], num_train_timesteps=2)
    assert AtlasDDPMScheduler.from_config(explicit.config, beta_schedule="linear").betas.tolist() == explicit.betas.tolist()


@pytest.mark.parametrize("name", STOCK_NAMES)
def test_the_process_of_the_defaults_travels_to_diffusers(name):
    ours = AtlasDDPMScheduler()
    stock = getattr(diffusers, f"{name}Scheduler").from_config(ours.config)
    torch.testing.assert_close(stock.alphas_cumprod, ours.alphas_cumprod, rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", STOCK_NAMES)
def test_the_process_of_the_defaults_travels_from_diffusers(name):
    stock = getattr(diffusers, f"{name}Scheduler")()
    ours = AtlasDDPMScheduler.from_config(stock.config)
    torch.testing.assert_close(ours.alphas_cumprod, stock.alphas_cumprod, rtol=0, atol=1e-7)


def test_a_subclass_brings_its_own_betas():
    class HalvingScheduler(BaseNoiseScheduler):
        def _get_beta_schedule(self):
            return torch.full((self.config.num_train_timesteps,), 0.5)

        step = functools.partialmethod(AtlasDDIMScheduler.step)

    scheduler = HalvingScheduler(num_train_timesteps=8, clip_sample=False)
    assert scheduler.alphas_cumprod.tolist() == [0.5**k for k in range(1, 9)]
    assert scheduler.config._class_name == "HalvingScheduler"
    noisy = scheduler.add_noise(torch.ones(1, 1), torch.zeros(1, 1), torch.tensor([3]))
    assert noisy.item() == pytest.approx(0.25)
    scheduler.set_timesteps(4)
    x = torch.full((1, 1), 0.25)
    step = scheduler.step(torch.zeros(1, 1), 4, x)
    assert step.pred_original_sample.item() == pytest.approx(0.25 * 2**2.5)
    assert step.prev_sample.item() == pytest.approx(0.5)
