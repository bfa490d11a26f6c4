"""The few-step solver: its weights, its single step, its tables and where they may be used."""

import json
import math
import warnings

import diffusers
import pytest
import torch
from conftest import seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import Gaussian, order_of_convergence

from atlas_diffusers import AtlasDDIMScheduler, AtlasMultistepScheduler
from atlas_diffusers.schedulers.adams_bashforth import adams_bashforth
from atlas_diffusers.schedulers.calibration.tables import Calibration, StepTable

PROCESS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0.05, 0.5), min_size=1, max_size=4), st.floats(0.05, 0.5), st.integers(0, 99))
def test_weights_integrate_polynomials(gaps, step, seed):
    angles = [1.5]
    for gap in gaps[1:]:
        angles.append(angles[-1] - gap)
    target = angles[-1] - step
    coefficients = torch.randn(len(angles), generator=seeded(seed), dtype=torch.float64).tolist()

    def integral(x):
        return sum(c * x ** (k + 1) / (k + 1) for k, c in enumerate(coefficients))

    values = [sum(c * x**k for k, c in enumerate(coefficients)) for x in angles]
    found = sum(w * v for w, v in zip(adams_bashforth(angles, target), values))
    assert found == pytest.approx(integral(target) - integral(angles[-1]), abs=1e-8)


def test_weights_on_an_even_grid_are_the_classical_ones():
    assert adams_bashforth([3.0, 2.0, 1.0], 0.0) == pytest.approx([-5 / 12, 16 / 12, -23 / 12])
    assert adams_bashforth([2.0, 1.0], 0.0) == pytest.approx([1 / 2, -3 / 2])


def solve(scheduler, steps, data, x):
    """The scheduler on the exact network of Gaussian data, in float64."""
    scheduler.set_timesteps(steps)
    x = x * scheduler.init_noise_sigma
    for t, level in zip(scheduler.timesteps, scheduler._grid.source):
        x = scheduler.step(data.network(scheduler.config.prediction_type, x, *level), t, x).prev_sample
    return x


@pytest.mark.parametrize("order, least", [(1, 0.9), (2, 1.8), (3, 1.8), (4, 1.8)])
def test_order_on_its_own_nodes(order, least):
    """The first step, of order 1, is the longest; tests/schedulers/test_matrix.py measures order 3 on other grids."""
    data, z = Gaussian(0.2, 0.5), torch.linspace(-1.5, 1.5, 7, dtype=torch.float64)
    errors, counts = [], (160, 320)
    for steps in counts:
        scheduler = AtlasMultistepScheduler(beta_end=0.02, beta_start=1e-7, multistep_order=order)
        scheduler.set_timesteps(steps)
        start = data.flow(z, *scheduler._grid.source[0])
        errors.append((solve(scheduler, steps, data, start) - data.flow(z, 1.0, 0.0)).abs().max().item())
    assert order_of_convergence(counts, errors) >= least, errors


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction", "flow_prediction"])
def test_one_step_ends_at_the_data_prediction(prediction_type):
    data, x = Gaussian(), torch.linspace(-1, 1, 5, dtype=torch.float64)
    scheduler = AtlasMultistepScheduler(prediction_type=prediction_type, **PROCESS)
    scheduler.set_timesteps(1)
    expected = data.data_prediction(x, *scheduler._grid.source[0])
    torch.testing.assert_close(solve(scheduler, 1, data, x), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("steps", [1, 4, 20, 200, 1000])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_nodes_fall_within_the_training_process(steps, zero_snr):
    scheduler = AtlasMultistepScheduler(rescale_betas_zero_snr=zero_snr, prediction_type="v_prediction", **PROCESS)
    scheduler.set_timesteps(steps)
    sigmas = [level.sigma_hat for level in scheduler._grid.source]
    low, high = scheduler.process.sigma_hats[[0, -1]].tolist()
    assert len(sigmas) == steps and all(a > b for a, b in zip(sigmas, sigmas[1:]))
    assert sigmas[0] == pytest.approx(high) and sigmas[-1] >= low * (1 - 1e-9)
    if 1 < steps <= 4:
        c = 3 * scheduler.process.sigma_hats[500].sqrt().item()
        assert math.atan(sigmas[-1] / c) == pytest.approx(math.atan(high / c) / steps**2)


def calibrated(steps=3, start=0.9, **options):
    scheduler = AtlasMultistepScheduler(**{**PROCESS, **options})
    table = StepTable([10.0, 2.0, 0.5], [[0.1], [0.2, -0.9], [0.05, 0.1, -0.6]], [0.01, -0.02, 0.03], start)
    calibration = Calibration({(steps, 0): table}, scheduler.process_sigma_hats, scheduler.config.prediction_type, 1.0)
    return AtlasMultistepScheduler.from_config(scheduler.config, calibration=calibration.to_config())


def test_a_table_is_the_formula():
    scheduler = calibrated()
    table = scheduler._calibration.table(3)
    scheduler.set_timesteps(3)
    assert scheduler.init_noise_sigma == 0.9
    x = noise = torch.randn(2, 3, 4, 4, generator=seeded(0), dtype=torch.float64)
    x, y, velocities = x * 0.9, noise * 0.9, []
    for n, t in enumerate(scheduler.timesteps):
        alpha, sigma = 1 / math.hypot(1, table.sigmas[n]), table.sigmas[n] / math.hypot(1, table.sigmas[n])
        output = torch.tanh(y)
        velocities.append(alpha * output - sigma * (y - sigma * output) / alpha)
        x = scheduler.step(torch.tanh(x), t, x).prev_sample
        y = (1 + table.scales[n]) * y + sum(w * v for w, v in zip(table.weights[n], velocities))
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12)


def test_a_trajectory_that_begins_later_uses_plain_weights_on_the_same_nodes():
    scheduler, plain = calibrated(), AtlasMultistepScheduler(**PROCESS)
    scheduler.set_timesteps(3)
    plain.set_timesteps(sigmas=[10.0, 2.0, 0.5, 0.0])
    x = torch.randn(2, 3, 4, 4, generator=seeded(0), dtype=torch.float64)
    y = x
    for t in scheduler.timesteps[1:]:
        x, y = (s.step(torch.tanh(z), t, z).prev_sample for s, z in ((scheduler, x), (plain, y)))
    torch.testing.assert_close(x, y, rtol=0, atol=1e-12)


def test_tables_are_saved_as_plain_numbers(tmp_path):
    scheduler = calibrated()
    scheduler.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert stored["calibration"]["tables"]["3"]["sigmas"] == [10.0, 2.0, 0.5]
    loaded = AtlasMultistepScheduler.from_pretrained(tmp_path)
    assert loaded._calibration == scheduler._calibration and loaded.calibrated_steps == [3]


def test_other_step_counts_are_plain_and_say_so():
    scheduler, plain = calibrated(), AtlasMultistepScheduler(**PROCESS)
    with pytest.warns(UserWarning, match=r"4 steps are not calibrated, only \[3\]"):
        scheduler.set_timesteps(4)
    plain.set_timesteps(4)
    assert torch.equal(scheduler.timesteps, plain.timesteps) and scheduler.init_noise_sigma == 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler.set_timesteps(3)
        plain.set_timesteps(7)


def test_other_samplers_ignore_the_tables():
    config = calibrated().config
    for cls in (AtlasDDIMScheduler, diffusers.DDIMScheduler, diffusers.UniPCMultistepScheduler):
        assert cls.from_config(config).config.beta_start == PROCESS["beta_start"]
    assert diffusers.UniPCMultistepScheduler.from_config(config).config.solver_order == 2


@pytest.mark.parametrize("options, message", [
    ({"prediction_type": "v_prediction"}, "calibrated for prediction_type='epsilon', the scheduler has 'v_prediction'"),
    ({"beta_schedule": "linear"}, "calibrated for a noise process with sigmas .* the scheduler's are"),
    ({"calibration": {"tables": {"3": {"sigmas": [2.0, 1.0]}}}}, "calibration is not one of AtlasMultistepScheduler"),
    ({"calibration": {}}, "calibration is not one of AtlasMultistepScheduler"),
    ({"multistep_order": 5}, "multistep_order=5; expected 1, 2, 3 or 4"),
    ({"angle_scale": 0.0}, "angle_scale=0.0; expected a positive number"),
    ({"angle_power": -1.0}, "angle_power=-1.0; expected a positive number"),
], ids=str)  # fmt: skip
def test_what_does_not_fit_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        AtlasMultistepScheduler.from_config(calibrated().config, **options)


@pytest.mark.parametrize("table, message", [
    (([1.0], [[1.0]], [0.0]), "a table of 1 nodes"),
    (([2.0, 1.0], [[1.0], [1.0]], [0.0, 0.0]), r"got \[1, 1\]"),
    (([1.0, 2.0], [[1.0], [1.0, 1.0]], [0.0, 0.0]), "fall strictly"),
    (([2.0, 1.0], [[1.0], [1.0, math.nan]], [0.0, 0.0]), "not finite"),
], ids=str)  # fmt: skip
def test_tables_are_checked(table, message):
    with pytest.raises(ValueError, match=message):
        StepTable(*table)


def test_a_table_of_another_length_is_refused():
    with pytest.raises(ValueError, match="the table for 4 steps has 3 nodes"):
        calibrated(steps=4)


def test_another_guidance_scale_is_named():
    scheduler = calibrated()
    scheduler.set_timesteps(3)
    with pytest.warns(UserWarning, match="calibrated for guidance_scale=1, the call has 5"):
        scheduler.check_guidance_scale(5.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler.check_guidance_scale(1.1)
        scheduler.set_timesteps(sigmas=[5.0, 1.0, 0.0])
        scheduler.check_guidance_scale(5.0)


def test_a_scheduler_may_have_tables_for_several_guidance_scales(tmp_path):
    """The nearest serve a call; a scale far from all of them is named as before."""
    scheduler, other = calibrated(), calibrated(start=0.8)
    with pytest.raises(ValueError, match=r"need guidance scales that differ, these have \[1.0, 1.0\]"):
        scheduler.add_tables(other)
    stored = {**other.config.calibration, "guidance_scale": 6.0}
    scheduler.add_tables(AtlasMultistepScheduler.from_config(other.config, calibration=stored))
    scheduler.save_pretrained(tmp_path)
    for each in (scheduler, AtlasMultistepScheduler.from_pretrained(tmp_path)):
        for scale, start in ((2.0, 0.9), (5.0, 0.8), (1.0, 0.9), (6.5, 0.8)):
            each.set_guidance_scale(scale)
            each.set_timesteps(3)
            assert each.init_noise_sigma == pytest.approx(start)
    with pytest.warns(UserWarning, match="calibrated for guidance_scale=6, the call has 9"):
        scheduler.check_guidance_scale(9.0)


# ------------------------------------------------------------------ nodes on a flow

EVEN = [1.0, 0.8, 0.6, 0.4, 0.2]


@pytest.mark.parametrize("shift", [0.5, 1.0, 2.0, 3.0, 7.0])
def test_nodes_on_a_flow_are_even_powers_of_the_angle(shift):
    """``θ_k = π/2 (1 − k/N)^p`` with c = 3 and p = 2 up to a shift of 1, and 6 and 2.4 from one of 3 on."""
    scheduler = AtlasMultistepScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=EVEN)
    c, p = {0.5: (3, 2), 1.0: (3, 2), 2.0: (4.5, 2.2), 3.0: (6, 2.4), 7.0: (6, 2.4)}[shift]
    ratios = [c * math.tan(math.pi / 2 * (1 - k / 5) ** p) for k in range(1, 5)]
    expected = [1.0, *(ratio / (1 + ratio) for ratio in ratios), 0.0]
    assert scheduler.sigmas.tolist() == pytest.approx(expected, abs=1e-6)
    assert scheduler.timesteps.tolist() == pytest.approx([1000 * s for s in expected[:-1]], rel=1e-6)
    by_number = AtlasMultistepScheduler(shift=shift)
    by_number.set_timesteps(5)
    assert torch.equal(by_number.sigmas, scheduler.sigmas)


def test_which_sigmas_of_a_pipeline_give_way():
    uneven, shifted = [1.0, 0.95, 0.5, 0.1], [3 * s / (1 + 2 * s) for s in (1.0, 0.95, 0.5, 0.1)]
    kept = AtlasMultistepScheduler(shift=3.0)
    kept.set_timesteps(sigmas=uneven)
    assert kept.sigmas.tolist() == pytest.approx([*shifted, 0.0], abs=1e-6)
    moved = AtlasMultistepScheduler(shift=3.0, use_angle_nodes=True)
    moved.set_timesteps(sigmas=uneven)
    assert moved.sigmas[0] == 1 and abs(moved.sigmas[2].item() - shifted[2]) > 0.05
    off = AtlasMultistepScheduler(shift=3.0, use_angle_nodes=False)
    off.set_timesteps(sigmas=EVEN)
    assert off.sigmas.tolist() == pytest.approx([*(3 * s / (1 + 2 * s) for s in EVEN), 0.0], abs=1e-6)


def test_nodes_reach_down_to_where_a_pipeline_calls_its_network():
    """Stable Audio 3 has T = 1, which says nothing about the least noisy level of training."""
    scheduler = AtlasMultistepScheduler(shift=1.0, num_train_timesteps=1, use_angle_nodes=True)
    scheduler.set_timesteps(sigmas=[1.0, 0.99, 0.9, 0.1])
    c, last = 3.0, 1 / 16
    ratio = c * math.tan(math.pi / 2 * last)
    assert scheduler.sigmas[-2].item() == pytest.approx(ratio / (1 + ratio), abs=1e-6)


def test_nodes_keep_the_clock_of_a_pipeline():
    """CogView4's network is given times before the shift: T times the sigma that would be shifted to the node's."""
    scheduler = AtlasMultistepScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=EVEN, timesteps=[1000 * s for s in EVEN])
    before = scheduler.timesteps.double() / 1000
    torch.testing.assert_close(3 * before / (1 + 2 * before), scheduler.sigmas[:-1].double(), rtol=1e-5, atol=1e-6)


def test_nodes_of_a_stretched_flow_stay_above_its_terminal_sigma():
    scheduler = AtlasMultistepScheduler(shift=1.0, shift_terminal=0.1)
    scheduler.set_timesteps(sigmas=[1 - k / 10 for k in range(10)])
    assert scheduler.sigmas[-2].item() == pytest.approx(0.1, abs=1e-6) and scheduler.sigmas[0] == 1


def test_few_steps_on_a_flow_are_closer_than_euler():
    """To the end of the flow of a Gaussian, by a tenth, in 10 calls, with the shift of SD3 and without."""
    data, z = Gaussian(0.5, 0.7), torch.linspace(-1.5, 1.5, 7, dtype=torch.float64)
    for shift in (1.0, 3.0):
        errors = []
        for scheduler in (AtlasMultistepScheduler(shift=shift), AtlasDDIMScheduler(shift=shift)):
            end = solve(scheduler, 10, data, z)
            errors.append((end - data.flow(z, 1.0, 0.0)).square().mean().sqrt().item())
        assert errors[0] < 0.1 * errors[1], errors


def test_a_step_forgets_velocities_that_no_later_one_reads():
    """Their memory is the next one's, unless gradients may still want it; numbers do not change."""
    found = []
    for enabled in (True, False):
        scheduler = AtlasMultistepScheduler(multistep_order=2)
        scheduler.set_timesteps(8)
        x, kept = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)), []
        with torch.set_grad_enabled(enabled):
            for t in scheduler.timesteps:
                x = scheduler.step(x.cos(), t, x, return_dict=False)[0]
                kept.append(len(scheduler._history.velocities))
        assert kept == [1, 2, 2, 2, 2, 2, 2, 2]
        found.append(x)
    assert torch.equal(*found) and found[0].abs().min() > 0
