"""What every sampler shares, and the agreement of PNDM, Euler, Euler ancestral and Heun with Diffusers."""

import inspect
import itertools
import warnings

import diffusers
import pytest
import torch
from conftest import seeded
from oracles import PREDICTION_TYPES
from torch.utils._python_dispatch import TorchDispatchMode

import atlas_diffusers
from atlas_diffusers import (
    AtlasDDIMScheduler,
    AtlasDDPMScheduler,
    AtlasEulerAncestralScheduler,
    AtlasEulerScheduler,
    AtlasHeunScheduler,
    AtlasMultistepScheduler,
    AtlasPNDMScheduler,
)
from atlas_diffusers.schedulers import SigmaScheduler

STOCK = {
    AtlasPNDMScheduler: diffusers.PNDMScheduler,
    AtlasEulerScheduler: diffusers.EulerDiscreteScheduler,
    AtlasEulerAncestralScheduler: diffusers.EulerAncestralDiscreteScheduler,
    AtlasHeunScheduler: diffusers.HeunDiscreteScheduler,
}
SAMPLERS = [AtlasDDIMScheduler, AtlasDDPMScheduler, AtlasMultistepScheduler, *STOCK]
WITH_A_MEMORY = (AtlasMultistepScheduler, AtlasPNDMScheduler)
ALL = pytest.mark.parametrize("cls", SAMPLERS)
STEP_OPTIONS = {AtlasDDIMScheduler: {"eta": 0.7}, AtlasEulerScheduler: {"s_churn": 2.0}}


def network(x):
    return 0.5 * torch.tanh(x) + 0.3 * x.flip(-1)


def noise(seed=0, batch=2):
    return torch.randn(batch, 3, 8, 8, generator=seeded(seed))


def sample(scheduler, x, start=0, seed=1, **options):
    """A trajectory over the steps chosen, from step ``start``; noise comes from ``seed`` where there is any."""
    if "generator" in inspect.signature(scheduler.step).parameters:
        options = {"generator": seeded(seed), **options}
    for t in scheduler.timesteps[start:]:
        x = scheduler.step(network(scheduler.scale_model_input(x, t)), t, x, **options).prev_sample
    return x


def trajectory(scheduler, steps, **options):
    scheduler.set_timesteps(steps)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)  # Diffusers would start at the second of two equal timesteps
    return sample(scheduler, noise() * scheduler.init_noise_sigma, **options)


def assert_same(actual, expected, tolerance=1e-5):
    error = (actual - expected).abs().max() / expected.abs().max().clamp(min=1)
    assert error < tolerance


# ------------------------------------------------------------------ parity with Diffusers


def shared_configs(cls):
    """Every combination of the options that Diffusers' class has too."""
    known = inspect.signature(STOCK[cls].__init__).parameters
    types = ["epsilon", "v_prediction"] + ["sample"] * (cls in (AtlasEulerScheduler, AtlasHeunScheduler))
    grids = [None, *(g for g in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas") if g in known)]
    extras = [{}, {"skip_prk_steps": True}, {"set_alpha_to_one": True}]
    extras += [{"final_sigmas_type": "sigma_min"}, {"clip_sample": True}]
    extras = [extra for extra in extras if set(extra) <= set(known)]
    schedules = ["linear", "scaled_linear"]
    for schedule, kind, spacing, grid, extra in itertools.product(
        schedules, types, ["linspace", "leading", "trailing"], grids, extras
    ):
        config = {"beta_schedule": schedule, "prediction_type": kind, "timestep_spacing": spacing, **extra}
        config["num_train_timesteps"] = 200
        config |= {"steps_offset": 1} if spacing == "leading" else {}
        yield config | ({grid: True} if grid else {})


@pytest.mark.parametrize("cls", STOCK)
def test_trajectory_is_diffusers(cls):
    for config in shared_configs(cls):
        for steps in (5, 12):
            ours, stock = cls(**config), STOCK[cls](**config)
            assert_same(trajectory(ours, steps), trajectory(stock, steps))
            torch.testing.assert_close(ours.timesteps, stock.timesteps, rtol=1e-6, atol=1e-6)


def in_float64(stock):
    """Diffusers' scheduler with its tables in float64."""
    if hasattr(stock, "sigmas"):
        stock.sigmas = stock.sigmas.double()
    stock.alphas_cumprod = stock.alphas_cumprod.double()
    return stock


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("cls", STOCK)
def test_trajectory_from_high_noise_is_diffusers(cls, prediction_type, zero_snr):
    """
    Where σ̂ starts in the thousands, Diffusers' float32 trajectories are off by up to 1e-3 of their own float64 ones; ours
    are not, so the comparison is with float64: 3e-4 is what Diffusers' float32 tables leave (relative error 2^-24 of σ̂
    times σ̂ ~ 4096).
    """
    config = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": prediction_type, "timestep_spacing": "trailing"}
    if zero_snr:
        if "rescale_betas_zero_snr" not in inspect.signature(STOCK[cls].__init__).parameters:
            pytest.skip("Diffusers' class has no zero terminal SNR")
        config["rescale_betas_zero_snr"] = True
    ours, stock = cls(**config), STOCK[cls](**config)
    single = trajectory(ours, 10)
    if cls is AtlasEulerAncestralScheduler:  # its noise has another dtype in float64
        return assert_same(single, trajectory(stock, 10), 1e-4)
    ours.set_timesteps(10)
    x = noise().double() * ours.init_noise_sigma
    stock.set_timesteps(10)
    assert_same(sample(ours, x), sample(in_float64(stock), x), 5e-4)
    ours.set_timesteps(10)
    assert_same(single.double(), sample(ours, x))


@pytest.mark.parametrize("config", [{}, {"prediction_type": "v_prediction"}, {"prediction_type": "sample"}], ids=str)
@pytest.mark.parametrize("options", [{"s_churn": 5.0}, {"s_churn": 40.0, "s_tmin": 0.1, "s_tmax": 10.0, "s_noise": 1.01}])
def test_churn_is_diffusers(config, options):
    ours, stock = AtlasEulerScheduler(**config), diffusers.EulerDiscreteScheduler(**config)
    assert_same(trajectory(ours, 9, **options), trajectory(stock, 9, **options))


@pytest.mark.parametrize(
    "given", [{"timesteps": [901.5, 700.0, 333.25, 20.0]}, {"sigmas": [12.0, 5.0, 1.0, 0.2, 0.0]}], ids=str
)
def test_custom_steps_are_diffusers(given):
    ours, stock = AtlasEulerScheduler(), diffusers.EulerDiscreteScheduler()
    for scheduler in (ours, stock):
        scheduler.set_timesteps(**given)
    torch.testing.assert_close(ours.timesteps, stock.timesteps)
    assert_same(sample(ours, 12 * noise()), sample(stock, 12 * noise()))


@pytest.mark.parametrize("config", [
    {"interpolation_type": "log_linear"},
    {"use_karras_sigmas": True, "sigma_min": 0.02, "sigma_max": 700.0},
    {"timestep_type": "continuous", "prediction_type": "v_prediction", "use_karras_sigmas": True},
], ids=str)  # fmt: skip
def test_euler_options_are_diffusers(config):
    ours, stock = AtlasEulerScheduler(**config), diffusers.EulerDiscreteScheduler(**config)
    assert_same(trajectory(ours, 10), trajectory(stock, 10), 1e-4 if "sigma_max" in config else 1e-5)
    torch.testing.assert_close(ours.timesteps, stock.timesteps)


@pytest.mark.parametrize("cls", [AtlasEulerScheduler, AtlasHeunScheduler, AtlasEulerAncestralScheduler])
def test_noise_is_added_as_in_diffusers(cls):
    x, eps = noise(0, 3), noise(1, 3)
    config = {} if cls is AtlasEulerAncestralScheduler else {"use_karras_sigmas": True}
    ours, stock = cls(**config), STOCK[cls](**config)
    training = torch.tensor([3, 500, 999])
    expected = x + (1 / ours.alphas_cumprod - 1).sqrt()[training][:, None, None, None] * eps
    torch.testing.assert_close(ours.add_noise(x, eps, training), expected)
    for scheduler in (ours, stock):
        scheduler.set_timesteps(8)
    for at in ([2, 2, 2], [1, 3, 5], [4]):
        actual = ours.add_noise(x[: len(at)], eps[: len(at)], ours.timesteps[at])
        expected = stock.add_noise(x[: len(at)], eps[: len(at)], stock.timesteps[at])
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-5)


# ------------------------------------------------------------------ dtypes, generators, devices


@pytest.mark.parametrize("dtype, rtol", [(torch.float16, 2e-3), (torch.bfloat16, 1.6e-2)])
@ALL
def test_half_precision_is_computed_in_float32(cls, dtype, rtol):
    """Half precision rounds once a step: the error after one step is that of the result's own rounding."""
    scheduler = cls()
    scheduler.set_timesteps(6)
    x = (noise() * scheduler.init_noise_sigma).to(dtype)
    t = scheduler.timesteps[0]
    stochastic = cls in (AtlasDDPMScheduler, AtlasEulerAncestralScheduler)
    half = scheduler.step(network(x), t, x, **({"generator": seeded()} if stochastic else {}))
    scheduler.set_timesteps(6)
    single = scheduler.step(network(x).float(), t, x.float(), **({"generator": seeded()} if stochastic else {}))
    assert half.prev_sample.dtype == half.pred_original_sample.dtype == dtype
    torch.testing.assert_close(half.pred_original_sample.float(), single.pred_original_sample, rtol=rtol, atol=1e-3)
    if not stochastic:  # whose noise has another dtype
        torch.testing.assert_close(half.prev_sample.float(), single.prev_sample, rtol=rtol, atol=1e-3)


@pytest.mark.parametrize("cls", [c for c in SAMPLERS if c not in (*WITH_A_MEMORY, AtlasHeunScheduler)])
def test_a_list_of_generators_is_single_runs(cls):
    def run(x, seeds):
        scheduler = cls()
        scheduler.set_timesteps(6)
        generators = [seeded(s) for s in seeds]
        return sample(scheduler, x * scheduler.init_noise_sigma, generator=generators, **STEP_OPTIONS.get(cls, {}))

    x = noise(batch=3)
    together = run(x, [3, 4, 5])
    for i in range(3):
        assert_same(together[i : i + 1], run(x[i : i + 1], [3 + i]), 1e-6)


class NoSynchronisation(TorchDispatchMode):
    """Refuses the operators that wait for a device."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "item", "is_nonzero", "equal")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in self.FORBIDDEN, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "config", [{}, {"clip_sample": True}, {"use_karras_sigmas": True}, {"prediction_type": "v_prediction"}], ids=str
)
@ALL
def test_steps_never_wait_for_the_device(cls, config):
    scheduler = cls(**config)
    scheduler.set_timesteps(6)
    x = noise() * scheduler.init_noise_sigma
    with NoSynchronisation():
        sample(scheduler, x, **STEP_OPTIONS.get(cls, {}))
        scheduler.add_noise(x, x, scheduler.timesteps[:2])
    assert scheduler.step_index == len(scheduler.timesteps)


def test_the_guard_against_waiting_works():
    with pytest.raises(AssertionError, match="waits"), NoSynchronisation():
        noise().max().item()


@pytest.mark.parametrize("config", [{}, {"thresholding": True}, {"prediction_type": "sample"}], ids=str)
@ALL
def test_steps_run_where_no_value_can_be_read(cls, config):
    scheduler = cls(**config)
    scheduler.set_timesteps(6, device="meta")
    x = sample(scheduler, torch.empty(2, 3, 8, 8, device="meta"))
    assert scheduler.step_index == len(scheduler.timesteps) and x.shape == (2, 3, 8, 8)


# ------------------------------------------------------------------ position in the grid


@pytest.mark.parametrize("config", [{}, {"use_karras_sigmas": True}], ids=["spaced", "karras"])
@pytest.mark.parametrize("cls", [c for c in SAMPLERS if c not in WITH_A_MEMORY])
def test_image_to_image_is_the_end_of_a_trajectory(cls, config):
    """Starting at a step with the sample that the whole trajectory had there gives the rest of that trajectory."""
    scheduler = cls(**config)
    scheduler.set_timesteps(8)
    start, x = 3 * scheduler.order, noise() * scheduler.init_noise_sigma
    generator = {"generator": seeded(5)} if "generator" in inspect.signature(scheduler.step).parameters else {}
    for t in scheduler.timesteps[:start]:
        x = scheduler.step(network(scheduler.scale_model_input(x, t)), t, x, **generator).prev_sample
    state = generator["generator"].get_state() if generator else None
    expected = sample(scheduler, x, start, **generator)
    for set_begin, convert in itertools.product([False, True], [lambda t: t, lambda t: t.clone(), lambda t: t.item()]):
        scheduler.set_timesteps(8)
        if set_begin:
            scheduler.set_begin_index(start)
        y = x
        if generator:
            generator["generator"].set_state(state)
        for t in scheduler.timesteps[start:]:
            t = convert(t)
            y = scheduler.step(network(scheduler.scale_model_input(y, t)), t, y, **generator).prev_sample
        assert torch.equal(y, expected)


def test_pndm_may_begin_inside_a_runge_kutta_step():
    """From any call on, a network that knows the data ends at the data."""
    scheduler = AtlasPNDMScheduler(set_alpha_to_one=True)
    scheduler.set_timesteps(10)
    data, eps = noise(0).double(), noise(1).double()
    for start in range(len(scheduler.timesteps)):
        scheduler.set_timesteps(10)
        x = scheduler.add_noise(data, eps, scheduler.timesteps[start : start + 1])
        for t in scheduler.timesteps[start:]:
            x = scheduler.step(eps, t, x).prev_sample
        torch.testing.assert_close(x, data, rtol=0, atol=1e-6)


@pytest.mark.parametrize("config", [{}, {"skip_prk_steps": True}, {"use_karras_sigmas": True}], ids=str)
@pytest.mark.parametrize("cls", [AtlasHeunScheduler, AtlasPNDMScheduler])
def test_a_callback_may_change_the_sample_between_the_calls_of_a_step(cls, config):
    """The sample is moved along with its data by δ after each call; with a network that knows ε, x_0 moves by all of them."""
    if "skip_prk_steps" in config and cls is AtlasHeunScheduler:
        pytest.skip("an option of PNDM")
    scheduler = cls(**config, **({"set_alpha_to_one": True} if cls is AtlasPNDMScheduler else {}))
    scheduler.set_timesteps(8)
    eps = noise(1).double()
    first = scheduler._grid.source[0]
    x = first.sigma * eps
    moved = 0.0
    called = scheduler._grid.source
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(eps, t, x).prev_sample
        level = called[i + 1] if i + 1 < len(called) else None
        if level is not None:
            x = x + 0.1 * level.alpha
            moved += 0.1
    torch.testing.assert_close(x, torch.full_like(x, moved), rtol=0, atol=1e-6)


# ------------------------------------------------------------------ bad input


@ALL
def test_ends_of_a_grid_that_is_off_are_named(cls):
    with pytest.warns(UserWarning, match="sigma_min and sigma_max: not read, because no sigma grid is on"):
        cls(sigma_min=0.1, sigma_max=20.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        grid = cls(sigma_min=0.1, sigma_max=20.0, use_karras_sigmas=True)
        cls.from_config(grid.config)
        cls(sigma_min=None)


@ALL
def test_bad_input_is_named(cls):
    with pytest.raises(ValueError, match="at most one sigma grid.*use_karras_sigmas.*use_lu_lambdas"):
        cls(use_karras_sigmas=True, use_lu_lambdas=True)
    with pytest.raises(ValueError, match="beta_schedule='cosin' is unknown; registered are"):
        cls(beta_schedule="cosin")
    for option in ("prediction_type", "timestep_spacing", "final_sigmas_type"):
        with pytest.raises(ValueError, match=f"{option}='odd' is unknown; allowed are"):
            cls(**{option: "odd"})
    with pytest.raises(ValueError, match="0 < sigma_min < sigma_max, got sigma_min=2"):
        cls(sigma_min=2.0, sigma_max=1.0)
    scheduler = cls()
    for given in ({"num_inference_steps": 5, "timesteps": [5]}, {"timesteps": [5], "sigmas": [1.0, 0.0]}, {}):
        with pytest.raises(ValueError, match="exactly one of"):
            scheduler.set_timesteps(**given)
    for timesteps in ([5, 7], [5, 5], [1000, 5], [5, -1], []):
        with pytest.raises(ValueError, match="timesteps must fall"):
            scheduler.set_timesteps(timesteps=timesteps)
    for sigmas in ([1.0], [1.0, 2.0], [1.0, -1.0], [float("inf"), 1.0], [float("nan"), 0.0]):
        with pytest.raises(ValueError, match="sigmas must be"):
            scheduler.set_timesteps(sigmas=sigmas)
    for steps in (0, 1001, -3, 2.5):
        with pytest.raises(ValueError, match="num_inference_steps"):
            scheduler.set_timesteps(steps)
    with pytest.raises(ValueError, match="timesteps cannot be set together with use_karras_sigmas"):
        cls(use_karras_sigmas=True).set_timesteps(timesteps=[5, 3])


@ALL
def test_steps_out_of_turn_are_refused(cls):
    scheduler, x = cls(), noise()
    if not cls.steps_unasked:
        with pytest.raises(ValueError, match="before set_timesteps"):
            scheduler.step(x, 999, x)
    scheduler.set_timesteps(6)
    sample(scheduler, x)
    with pytest.raises(ValueError, match="more often than the"):
        scheduler.step(x, scheduler.timesteps[-1], x)
    with pytest.raises(ValueError, match="is not among the"):
        scheduler.step(x, 1.5, x)


def test_ddim_steps_from_any_training_timestep_as_diffusers_does():
    ours, stock, x = AtlasDDIMScheduler(), diffusers.DDIMScheduler(), noise()
    for scheduler in (ours, stock):
        scheduler.set_timesteps(50)
    for t in (1, 10, 49, 777):
        assert_same(ours.step(network(x), t, x).prev_sample, stock.step(network(x), t, x).prev_sample)


@pytest.mark.parametrize("option", ["interpolation_type", "timestep_type"])
@pytest.mark.parametrize("cls", [c for c in SAMPLERS if issubclass(c, SigmaScheduler)])
def test_options_of_the_sigma_family_are_checked(cls, option):
    with pytest.raises(ValueError, match=f"{option}='odd' is unknown; allowed are"):
        cls(**{option: "odd"})
    with pytest.raises(ValueError, match="timesteps cannot be set with timestep_type='continuous'"):
        cls(timestep_type="continuous", prediction_type="v_prediction").set_timesteps(timesteps=[5, 3])


# ------------------------------------------------------------------ beta schedules as classes

NOISE_CLASSES = {
    "linear": "LinearNoiseScheduler",
    "scaled_linear": "ScaledLinearNoiseScheduler",
    "cosine": "CosineNoiseScheduler",
    "quadratic": "QuadraticNoiseScheduler",
    "sigmoid": "SigmoidNoiseScheduler",
    "exponential": "ExponentialNoiseScheduler",
    "laplace": "LaplaceNoiseScheduler",
    "karras": "KarrasNoiseScheduler",
}


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("schedule", NOISE_CLASSES)
def test_a_noise_scheduler_is_ddpm_on_its_own_betas(schedule, prediction_type):
    cls = getattr(atlas_diffusers, NOISE_CLASSES[schedule])
    ours = cls(prediction_type=prediction_type)
    ddpm = AtlasDDPMScheduler(beta_schedule=schedule, prediction_type=prediction_type)
    assert torch.equal(ours.betas, ddpm.betas)
    assert torch.equal(trajectory(ours, 7), trajectory(ddpm, 7))


@pytest.mark.parametrize("schedule", NOISE_CLASSES)
def test_a_noise_scheduler_keeps_its_schedule_through_configurations(schedule, tmp_path):
    cls = getattr(atlas_diffusers, NOISE_CLASSES[schedule])
    original = cls(num_train_timesteps=200, beta_start=0.001)
    original.save_pretrained(tmp_path)
    for copy in (
        cls.from_pretrained(tmp_path),
        cls.from_config(AtlasDDIMScheduler(num_train_timesteps=200, beta_start=0.001, beta_schedule="sigmoid").config),
        AtlasHeunScheduler.from_config(original.config),
        diffusers.DDPMScheduler.from_config(original.config),
    ):
        torch.testing.assert_close(copy.betas, original.betas)


def test_karras_noise_is_the_karras_grid():
    scheduler = atlas_diffusers.KarrasNoiseScheduler(num_train_timesteps=50)
    u = torch.linspace(0, 1, 50, dtype=torch.float64)
    expected = (0.002 ** (1 / 7) + u * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7
    sigma_hats = (1 / scheduler.alphas_cumprod.double() - 1).sqrt()
    torch.testing.assert_close(sigma_hats[5:], expected[5:], rtol=2e-3, atol=0)


def test_a_schedule_of_ones_own_by_subclassing():
    class ConstantNoiseScheduler(atlas_diffusers.BaseNoiseScheduler):
        def _get_beta_schedule(self):
            return torch.full((self.config.num_train_timesteps,), 0.01)

    scheduler = ConstantNoiseScheduler(num_train_timesteps=300, variance_type="fixed_large", clip_sample=False)
    torch.testing.assert_close(scheduler.alphas_cumprod[99].item(), 0.99**100, rtol=1e-5, atol=0)
    options = {"trained_betas": [0.01] * 300, "variance_type": "fixed_large", "clip_sample": False}
    stock = diffusers.DDPMScheduler(num_train_timesteps=300, **options)
    assert_same(trajectory(scheduler, 10), trajectory(stock, 10))
    torch.testing.assert_close(AtlasEulerScheduler.from_config(scheduler.config).betas, scheduler.betas)


def test_heun_that_starts_at_a_corrector_has_nothing_to_correct():
    """As an image-to-image call of Diffusers may: x stays, and the next step is that of a trajectory which starts there."""
    x, output = (torch.randn(1, 3, 4, 4, generator=seeded(seed)) for seed in (1, 2))
    late, plain = AtlasHeunScheduler(), AtlasHeunScheduler()
    for scheduler in (late, plain):
        scheduler.set_timesteps(5)
    late.set_begin_index(1)
    assert torch.equal(late.step(output, late.timesteps[1], x).prev_sample, x)
    ends = [each.step(output, each.timesteps[2], x).prev_sample for each in (late, plain)]
    assert torch.equal(*ends) and not torch.equal(ends[0], x)
