"""The samplers on a flow: equal to Diffusers' flow schedulers where those exist, and bad input."""

import itertools

import diffusers
import numpy as np
import pytest
import torch
from conftest import seeded
from oracles import PREDICTION_TYPES, prediction
from torch.utils._python_dispatch import TorchDispatchMode

from atlas_diffusers import (
    AtlasDDIMScheduler,
    AtlasDDPMScheduler,
    AtlasEulerAncestralScheduler,
    AtlasEulerScheduler,
    AtlasHeunScheduler,
    AtlasMultistepScheduler,
    AtlasPNDMScheduler,
    LinearNoiseScheduler,
)

SAMPLERS = [
    AtlasDDIMScheduler, AtlasDDPMScheduler, AtlasEulerScheduler, AtlasEulerAncestralScheduler, AtlasHeunScheduler,
    AtlasMultistepScheduler, AtlasPNDMScheduler,
]  # fmt: skip
ALL = pytest.mark.parametrize("cls", SAMPLERS)
STEPS = 9
SIGMAS = np.linspace(1.0, 1 / STEPS, STEPS)
REQUESTS = {
    "text": {"num_inference_steps": STEPS},
    "sigmas": {"num_inference_steps": STEPS, "sigmas": SIGMAS},
    "timesteps": {"timesteps": (1000 * SIGMAS**2).tolist()},
    "both": {"sigmas": SIGMAS.tolist(), "timesteps": (1000 * SIGMAS).tolist()},
}
SHIFTS = {
    "none": {},
    "3": {"shift": 3.0},
    "dynamic": {"use_dynamic_shifting": True},
    "dynamic linear": {"use_dynamic_shifting": True, "time_shift_type": "linear"},
    "terminal": {"shift": 2.0, "shift_terminal": 0.1},
    "inverted": {"shift": 2.0, "invert_sigmas": True},
}
GRIDS = (None, "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
CELLS = list(itertools.product(REQUESTS, SHIFTS, GRIDS))


def network(x, t):
    return torch.tanh(x.flip(-1)) - 0.4 * x + 1e-4 * t


def noise(seed=0, shape=(2, 3, 4, 4)):
    return torch.randn(shape, generator=seeded(seed))


def ask(scheduler, request, shift, **more):
    mu = {"mu": 1.15} if SHIFTS[shift].get("use_dynamic_shifting") else {}
    scheduler.set_timesteps(**REQUESTS[request], **mu, **more)
    return scheduler


def sample(scheduler, x, start=0, **options):
    for t in scheduler.timesteps[start:]:
        x = scheduler.step(network(x, t), t, x, **options, return_dict=False)[0]
    return x


def stock_of(shift, grid):
    return diffusers.FlowMatchEulerDiscreteScheduler(**SHIFTS[shift], **({grid: True} if grid else {}))


@pytest.mark.filterwarnings("ignore:timesteps were given without sigmas")
@pytest.mark.parametrize("request_, shift, grid", CELLS)
@pytest.mark.parametrize("cls", [AtlasEulerScheduler, AtlasDDIMScheduler])
def test_first_order_is_the_stock_euler(cls, request_, shift, grid):
    stock = ask(stock_of(shift, grid), request_, shift)
    ours = ask(cls.from_config(stock.config), request_, shift)
    torch.testing.assert_close(ours.sigmas, stock.sigmas, rtol=0, atol=1e-6)
    torch.testing.assert_close(ours.timesteps / 1000, stock.timesteps / 1000, rtol=0, atol=1e-6)
    torch.testing.assert_close(sample(ours, noise()), sample(stock, noise()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", [{}, {"skip_prk_steps": False}], ids=str)
@pytest.mark.parametrize("cls", [AtlasHeunScheduler, AtlasPNDMScheduler])
def test_a_callback_may_change_the_sample_between_the_calls_of_a_step(cls, config):
    """From pure noise on; with a network that knows the velocity, the end moves by all changes."""
    if config and cls is AtlasHeunScheduler:
        pytest.skip("an option of PNDM")
    scheduler = cls(use_flow_sigmas=True, **config)
    scheduler.set_timesteps(8)
    x, velocity = noise().double(), noise(1).double()
    end = x - velocity + 0.1 * (len(scheduler.timesteps) - 1)
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(velocity, t, x + 0.1 if i else x).prev_sample
    torch.testing.assert_close(x, end, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_heun_is_the_stock_heun(shift):
    stock = diffusers.FlowMatchHeunDiscreteScheduler(shift=shift)
    ours = AtlasHeunScheduler.from_config(stock.config)
    for scheduler in (ours, stock):
        scheduler.set_timesteps(STEPS)
        scheduler.set_begin_index(0)
    torch.testing.assert_close(ours.timesteps, stock.timesteps, rtol=1e-6, atol=1e-3)
    torch.testing.assert_close(ours.sigmas, stock.sigmas, rtol=0, atol=1e-6)
    torch.testing.assert_close(sample(ours, noise()), sample(stock, noise()), rtol=1e-5, atol=1e-5)


def test_an_inverted_flow_renoises_from_its_first_step():
    """The timestep of pure noise is 0 there, where betas have clean data; any noise is as good as the posterior's mean."""
    inverted, plain = (AtlasDDPMScheduler(shift=1.0, invert_sigmas=inverted) for inverted in (True, False))
    x, data = noise().double(), noise(1).double()
    steps = []
    for scheduler, sign in ((inverted, -1), (plain, 1)):
        scheduler.set_timesteps(sigmas=[1.0, 0.8, 0.4])
        t = scheduler.timesteps[0]
        steps.append(scheduler.step(sign * (x - data), t, x, generator=seeded(2)).prev_sample)
    torch.testing.assert_close(*steps)
    assert (steps[0] - 0.2 * data).std().item() == pytest.approx(0.8, rel=0.2)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_midpoints_lie_within_their_steps_whatever_the_type_of_the_timesteps(shift):
    """Integers are shifted no more than fractions are: they are not training timesteps."""
    schedulers = [AtlasPNDMScheduler(shift=shift, skip_prk_steps=False) for _ in range(2)]
    for scheduler, kind in zip(schedulers, (int, float)):
        timesteps = [kind(t) for t in (1000, 800, 601, 400, 200)]
        scheduler.set_timesteps(timesteps=timesteps, sigmas=[t / 1000 for t in timesteps])
    assert [s._grid.source for s in schedulers] == [schedulers[1]._grid.source] * 2
    sigmas = [level.sigma for level in schedulers[0]._grid.source]
    assert sigmas == sorted(sigmas, reverse=True) and sigmas[0] == 1 and 0 < sigmas[1] < 1


@ALL
def test_samples_need_no_scale(cls):
    scheduler = ask(cls(shift=3.0), "text", "none")
    assert scheduler.init_noise_sigma == 1 and scheduler.timesteps[0] == 1000
    assert scheduler.scale_model_input(noise(), scheduler.timesteps[0]).equal(noise())


@pytest.mark.parametrize("cls", [AtlasEulerScheduler, AtlasDDIMScheduler, AtlasEulerAncestralScheduler])
def test_stochastic_sampling_is_the_stock_one(cls):
    stock = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True)
    runs = []
    for scheduler in (ask(cls.from_config(stock.config), "text", "3"), ask(stock, "text", "3")):
        runs.append(sample(scheduler, noise(), generator=seeded(7)))
    torch.testing.assert_close(*runs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", [{}, {"shift": 3.0}, {"use_dynamic_shifting": True}], ids=str)
def test_another_shift_is_that_of_the_stock_euler(config):
    stock = diffusers.FlowMatchEulerDiscreteScheduler(**config)
    ours = AtlasEulerScheduler.from_config(stock.config)
    for scheduler in (stock, ours):
        scheduler.set_timesteps(5, mu=0.3)  # mu is ignored unless shifting is dynamic
        scheduler.set_shift(7.0)
        scheduler.set_timesteps(5, mu=0.4)
    assert ours.shift == stock.shift == 7.0
    torch.testing.assert_close(ours.sigmas, stock.sigmas, rtol=0, atol=1e-6)


@ALL
def test_noise_is_scaled_as_in_diffusers(cls):
    stock = ask(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), "sigmas", "3")
    nodes = {"use_angle_nodes": False} if cls is AtlasMultistepScheduler else {}
    ours = ask(cls.from_config(stock.config, **nodes), "sigmas", "3")
    data, eps = noise(0, (3, 4)), noise(1, (3, 4))
    some = ours.timesteps[[2, 6, 6] if ours.order == 1 else [3, 9, 9]]
    expected = stock.scale_noise(data, stock.timesteps[[int((stock.timesteps - t).abs().argmin()) for t in some]], eps)
    torch.testing.assert_close(ours.scale_noise(data, some, eps), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.add_noise(data, eps, some), expected, rtol=1e-6, atol=1e-6)
    ours.set_begin_index(4)
    s = (ours.timesteps[4] / 1000).item()
    torch.testing.assert_close(ours.scale_noise(data, None, eps), s * eps + (1 - s) * data, rtol=1e-6, atol=1e-6)
    ours.step(data, ours.timesteps[4], data, generator=seeded())
    s = (ours.timesteps[5] / 1000).item()
    torch.testing.assert_close(ours.scale_noise(data, None, eps), s * eps + (1 - s) * data, rtol=1e-6, atol=1e-6)


def test_any_timestep_has_a_level_for_training():
    scheduler, data, eps = AtlasEulerScheduler(shift=3.0), noise(0, (4, 2)), noise(1, (4, 2))
    t = torch.tensor([0.0, 250.0, 801.5, 1000.0])
    s = t[:, None] / 1000
    torch.testing.assert_close(scheduler.add_noise(data, eps, t), (1 - s) * data + s * eps)
    torch.testing.assert_close(scheduler.get_velocity(data, eps, t), eps - data)


@ALL
def test_tokens_at_levels_of_their_own(cls):
    """As in LTX: the first tokens are given, or wait at a level below the step's; for Euler all is as in Diffusers."""
    stock = ask(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), "text", "3")
    ours, plain = (ask(cls.from_config(stock.config), "text", "3") for _ in range(2))
    x = noise(shape=(2, 5, 3))
    for t in ours.timesteps[:4]:
        tokens = t.repeat(2, 5)
        tokens[:, 0], tokens[:, 1] = 0.0, 600.0
        velocity = network(x, t)
        options = [{"generator": seeded(int(t))} for _ in range(2)]
        found = ours.step(-velocity, t, x, per_token_timesteps=tokens, return_dict=False, **options[0])[0]
        expected = plain.step(velocity, t, x, return_dict=False, **options[1])[0]
        torch.testing.assert_close(found[:, 2:], expected[:, 2:], rtol=1e-5, atol=1e-5)
        below = max(s for s in ours.sigmas.tolist() if s < 0.6)
        torch.testing.assert_close(found[:, 0], x[:, 0])
        torch.testing.assert_close(found[:, 1], x[:, 1] + (below - 0.6) * velocity[:, 1], rtol=1e-5, atol=1e-5)
        if cls is AtlasEulerScheduler:
            theirs = stock.step(-velocity, t, x, per_token_timesteps=tokens, return_dict=False)[0]
            torch.testing.assert_close(found, theirs, rtol=1e-5, atol=1e-5)
        x = expected


class Operations(TorchDispatchMode):
    """Names of the operations that touch memory."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "cls, passes", [(AtlasEulerScheduler, 1), (AtlasDDIMScheduler, 1), (AtlasHeunScheduler, 2), (AtlasMultistepScheduler, 5)]
)
def test_a_step_passes_over_memory_few_times_and_returns_what_diffusers_does(cls, passes):
    """Data prediction and velocity are made only where they are returned or remembered."""
    scheduler, x = cls(shift=3.0), noise()
    scheduler.set_timesteps(STEPS)
    for i, t in enumerate(scheduler.timesteps):
        output, before = noise(i + 1), x.clone()
        with Operations() as operations:
            (following,) = scheduler.step(output, t, x, return_dict=False)
        assert len(operations.names) <= passes, operations.names
        assert following is not x and following is not output and torch.equal(x, before)
        assert torch.equal(output, noise(i + 1))
        x = following
    assert len(operations.names) > 0
    data = cls(shift=3.0)
    data.set_timesteps(STEPS)
    result = data.step(noise(1), data.timesteps[0], noise())
    torch.testing.assert_close(result.pred_original_sample, noise() - noise(1))


# ------------------------------------------------------------------ configurations


FLOW_SCHEDULERS = {
    "FlowMatchEulerDiscreteScheduler": {"shift": 3.0, "shift_terminal": 0.1, "use_karras_sigmas": True},
    "FlowMatchHeunDiscreteScheduler": {"shift": 3.0},
    "UniPCMultistepScheduler": {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"},
    "DPMSolverMultistepScheduler": {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"},
    "DPMSolverSinglestepScheduler": {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"},
    "DEISMultistepScheduler": {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"},
    "SASolverScheduler": {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"},
}


@pytest.mark.parametrize("from_disk", [False, True])
@pytest.mark.parametrize("name", FLOW_SCHEDULERS)
@ALL
def test_a_flow_travels_from_diffusers_and_back_in_silence(cls, name, from_disk, tmp_path, diffusers_log):
    stock = getattr(diffusers, name)(**FLOW_SCHEDULERS[name])
    if from_disk:
        stock.save_pretrained(tmp_path / "stock")
        cls.from_pretrained(tmp_path / "stock").save_pretrained(tmp_path / "ours")
        ours = cls.from_pretrained(tmp_path / "ours")
        back = type(stock).from_pretrained(tmp_path / "ours")
    else:
        ours = cls.from_config(cls.from_config(stock.config).config)
        back = type(stock).from_config(ours.config)
    assert [record.getMessage() for record in diffusers_log] == []
    assert ours.shift == 3 and ours.config.prediction_type == "flow_prediction"
    for option, value in FLOW_SCHEDULERS[name].items():
        assert ours.config[option] == back.config[option] == value
    for scheduler in (stock, back):
        scheduler.set_timesteps(6)
    assert torch.equal(back.sigmas, stock.sigmas)
    reference = diffusers.FlowMatchEulerDiscreteScheduler.from_config(ours.config)
    for scheduler in (ours, reference):
        scheduler.set_timesteps(6)
    assert ours.sigmas[0] == reference.sigmas[0] and reference.config.shift == 3


@ALL
def test_a_file_without_options_is_a_flow_by_its_class(cls):
    ours = cls.from_config({"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 500})
    assert ours.shift == 1 and len(ours.process) == 500 and ours.config.prediction_type == "flow_prediction"


@ALL
def test_betas_can_become_a_flow(cls):
    config = cls.from_config(diffusers.DDIMScheduler(beta_end=0.01, set_alpha_to_one=False).config).config
    ours = cls.from_config(config, shift=2.0)
    assert ours.shift == 2 and ours.config.prediction_type == "flow_prediction"
    assert cls.from_config(ours.config, flow_shift=4.0).shift == cls.from_config(ours.config, shift=4.0).shift == 4


@ALL
@pytest.mark.parametrize("name", [
    "EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "KarrasVeScheduler", "FlowMatchLCMScheduler",
    "FlowMapEulerDiscreteScheduler", "SCMScheduler", "DDPMWuerstchenScheduler", "CMStochasticIterativeScheduler",
    "MiniMaxH3Scheduler", "HeliosDMDScheduler", "BlockRefinementScheduler", "DiscreteDDIMScheduler", "EntropyBoundScheduler",
])  # fmt: skip
def test_other_processes_are_refused_by_name(cls, name):
    in_memory = getattr(diffusers, name)().config
    for config in ({"_class_name": name}, *([in_memory] if name != "FlowMapEulerDiscreteScheduler" else [])):
        with pytest.raises(ValueError, match=f"{name} has a noise process that {cls.__name__} does not have; supported are"):
            cls.from_config(config)


@pytest.mark.parametrize("cls, stock", [
    (AtlasDDIMScheduler, diffusers.DDIMScheduler), (AtlasDDPMScheduler, diffusers.DDPMScheduler),
])  # fmt: skip
def test_the_same_algorithm_keeps_its_default_of_clipping(cls, stock):
    theirs, clipped = stock(), []
    for config in (theirs.config, {"_class_name": stock.__name__}):
        ours = cls.from_config(config)
        assert ours.config.clip_sample
        for scheduler in (ours, theirs):
            scheduler.set_timesteps(10)
            clipped.append(sample(scheduler, noise(), generator=seeded(3)))
        torch.testing.assert_close(*clipped[-2:], rtol=1e-5, atol=1e-5)
    assert not AtlasMultistepScheduler.from_config(theirs.config).config.clip_sample
    assert not cls.from_config(stock(clip_sample=False).config).config.clip_sample


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_shift_of_the_signal_to_noise_ratio_becomes_betas(scale):
    stock = diffusers.CogVideoXDDIMScheduler(snr_shift_scale=scale, rescale_betas_zero_snr=True, prediction_type="v_prediction")
    ours = AtlasDDIMScheduler.from_config(stock.config)
    expected = stock.alphas_cumprod.to(torch.float32)
    torch.testing.assert_close(ours.alphas_cumprod, expected, rtol=0, atol=2e-6)
    for back in (type(stock), diffusers.DDIMScheduler, AtlasEulerScheduler):
        travelled = back.from_config(ours.config).alphas_cumprod.to(torch.float32)
        torch.testing.assert_close(travelled, expected, rtol=0, atol=2e-6)
    assert AtlasDDIMScheduler.from_config({"_class_name": "CogVideoXDDIMScheduler"}).config.trained_betas is not None


# ------------------------------------------------------------------ bad input


@ALL
@pytest.mark.parametrize("given, message", [
    ({"sigmas": [0.5, 0.8]}, "sigmas of a flow must fall strictly within"),
    ({"sigmas": [0.5, 0.5]}, "sigmas of a flow must fall strictly within"),
    ({"sigmas": [1.2, 0.5]}, "sigmas of a flow must fall strictly within"),
    ({"sigmas": [0.5, -0.1]}, "sigmas of a flow must fall strictly within"),
    ({"sigmas": [float("nan"), 0.1]}, "sigmas of a flow must fall strictly within"),
    ({"sigmas": []}, "sigmas of a flow must fall strictly within"),
    ({"timesteps": [1200.0, 3.0]}, "timesteps of a flow must fall strictly within"),
    ({"timesteps": [900.0, 500.0], "sigmas": [0.9, 0.5, 0.1]}, "numbers of steps differ: timesteps has 2, sigmas has 3"),
    ({"num_inference_steps": 4, "sigmas": [0.9, 0.5]}, "numbers of steps differ: num_inference_steps has 4, sigmas has 2"),
    ({}, "give at least one of"),
    ({"num_inference_steps": 0}, "num_inference_steps=0"),
], ids=str)  # fmt: skip
def test_bad_requests_are_named(cls, given, message):
    scheduler = ask(cls(shift=3.0), "text", "none")
    before = scheduler.timesteps.clone()
    with pytest.raises(ValueError, match=message):
        scheduler.set_timesteps(**given)
    assert torch.equal(scheduler.timesteps, before)


@ALL
def test_dynamic_shifting_needs_mu(cls):
    scheduler = cls(shift=1.0, use_dynamic_shifting=True)
    with pytest.raises(ValueError, match="use_dynamic_shifting=True needs set_timesteps.*mu="):
        scheduler.set_timesteps(5)
    with pytest.raises(ValueError, match="mu=0; time_shift_type='linear' expects a positive number"):
        cls(shift=1.0, use_dynamic_shifting=True, time_shift_type="linear").set_timesteps(5, mu=0)
    for mu in (float("nan"), float("inf"), 1e3, -1e3):
        with pytest.raises(ValueError, match=f"mu={mu}; time_shift_type='exponential' expects a number from -30 to 30"):
            scheduler.set_timesteps(5, mu=mu)
    with pytest.raises(ValueError, match="mu=0.3 shifts a flow"):
        AtlasDDIMScheduler().set_timesteps(5, mu=0.3)
    assert scheduler.dynamic_shift(4096) == pytest.approx(1.15) and scheduler.dynamic_shift(2176) == pytest.approx(0.825)


@ALL
@pytest.mark.parametrize("options, message", [
    ({"shift": 0.0}, "shift=0.0; expected a positive number"),
    ({"shift": -1.0}, "shift=-1.0; expected a positive number"),
    ({"use_flow_sigmas": True, "flow_shift": 0.0}, "shift=0.0; expected a positive number"),
    ({"shift": 2.0, "flow_shift": 3.0}, "shift=2.0 and flow_shift=3.0 are two names of one option"),
    ({"shift": 1.0, "shift_terminal": 1.0}, "shift_terminal=1.0; expected a number between 0 and 1"),
    ({"shift": 1.0, "shift_terminal": 0.0}, "shift_terminal=0.0; expected a number between 0 and 1"),
    ({"shift": 1.0, "time_shift_type": "odd"}, "time_shift_type='odd' is unknown; allowed are"),
    ({"shift": 1.0, "beta_end": 0.5}, "beta_end=0.5 is an option of betas"),
    ({"shift": 1.0, "beta_schedule": "cosine"}, "beta_schedule='cosine' is an option of betas"),
    ({"use_flow_sigmas": True, "trained_betas": [0.1]}, "trained_betas=.* is an option of betas"),
    ({"use_flow_sigmas": True, "rescale_betas_zero_snr": True}, "rescale_betas_zero_snr=True is an option of betas"),
    ({"use_flow_sigmas": True, "snr_shift_scale": 3.0}, "snr_shift_scale=3.0 is an option of betas"),
    ({"flow_shift": 3.0}, "flow_shift=3.0 is an option of a flow; set use_flow_sigmas=True"),
    ({"shift_terminal": 0.1}, "shift_terminal=0.1 is an option of a flow; set use_flow_sigmas=True"),
    ({"use_dynamic_shifting": True}, "use_dynamic_shifting=True is an option of a flow"),
    ({"base_shift": 0.7}, "base_shift=0.7 is an option of a flow"),
    ({"max_image_seq_len": 8192}, "max_image_seq_len=8192 is an option of a flow"),
    ({"invert_sigmas": True}, "invert_sigmas=True is an option of a flow"),
], ids=str)  # fmt: skip
def test_bad_options_are_named(cls, options, message):
    with pytest.raises(ValueError, match=message):
        cls(**options)


def test_options_that_only_some_samplers_have_are_named():
    with pytest.raises(ValueError, match="variance_type='fixed_large' is an option of betas"):
        AtlasDDPMScheduler(shift=1.0, variance_type="fixed_large")
    with pytest.raises(ValueError, match="timestep_type='continuous' is an option of betas"):
        AtlasEulerScheduler(shift=1.0, timestep_type="continuous")
    for cls in (AtlasHeunScheduler, AtlasPNDMScheduler, AtlasMultistepScheduler, AtlasDDPMScheduler):
        with pytest.raises(ValueError, match=f"stochastic_sampling=True: {cls.__name__} has no"):
            cls(shift=1.0, stochastic_sampling=True)
    for given in ({"eta": 0.5}, {"variance_noise": noise()}):
        with pytest.raises(ValueError, match="stochastic_sampling=True draws all noise of a step anew"):
            ask(AtlasDDIMScheduler(shift=1.0, stochastic_sampling=True), "text", "none").step(noise(), 1000.0, noise(), **given)
    for ends in ({"sigma_max": 80.0}, {"sigma_min": 2.0}):
        with pytest.raises(ValueError, match="=.*; sigmas of a flow lie between 0 and 1"):
            AtlasEulerScheduler(shift=1.0, use_karras_sigmas=True, **ends).set_timesteps(5)
    with pytest.raises(ValueError, match="LinearNoiseScheduler has betas of its own"):
        LinearNoiseScheduler(shift=1.0)
    with pytest.raises(ValueError, match="shift=2.0 is an option of a flow"):
        AtlasDDIMScheduler().set_shift(2.0)
    with pytest.warns(UserWarning, match="timesteps were given without sigmas"):
        AtlasDDIMScheduler(shift=3.0).set_timesteps(timesteps=[900.0, 500.0])
    with pytest.raises(ValueError, match="per_token_timesteps need prediction_type='flow_prediction'"):
        ask(AtlasDDIMScheduler(shift=3.0, prediction_type="sample"), "text", "3").step(
            noise(), 1000.0, noise(), per_token_timesteps=torch.full((2, 3, 4), 500.0)
        )


@ALL
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize(
    "options", [{}, {"clip_sample": True}, {"thresholding": True}, {"final_sigmas_type": "sigma_min"}], ids=str
)
def test_steps_from_pure_noise_are_finite(cls, prediction_type, options):
    """And a network that is sure of its data ends there."""
    scheduler = ask(cls(shift=3.0, prediction_type=prediction_type, **options), "text", "3")
    data, x = torch.full((2, 3, 4, 4), 0.5, dtype=torch.float64), noise().double()
    for t, level in zip(scheduler.timesteps, scheduler._grid.source):
        norm = level.alpha**2 + level.sigma**2  # v_prediction is that of the level with α² + σ² = 1
        normal = [value / norm**0.5 for value in level]
        output = prediction(prediction_type, data, (x - level.alpha * data) / level.sigma, *normal)
        x = scheduler.step(output, t, x, generator=seeded(2)).prev_sample
    tolerance = 1e-4 if cls is AtlasMultistepScheduler else 1e-6  # whose coordinates bend there
    torch.testing.assert_close(x, data, rtol=0, atol=0.02 if options.get("final_sigmas_type") else tolerance)
