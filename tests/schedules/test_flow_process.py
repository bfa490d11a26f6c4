"""The process of flow matching: levels, their timesteps, shifts, and which places of a request are open."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from atlas_diffusers import AtlasEulerScheduler
from atlas_diffusers.schedules import Flow, VarianceExploding, VariancePreserving, get_betas
from atlas_diffusers.schedules.time_grid import Request

SHIFTS = st.floats(0.2, 20.0)


@given(st.floats(1e-4, 1.0), st.booleans())
def test_a_level_is_its_timestep(s, inverted):
    process = Flow(inverted=inverted)
    level = process.from_sigma_hat(s / (1 - s) if s < 1 else math.inf)
    assert level == pytest.approx((1 - s, s), abs=1e-12)
    (t,) = process.timesteps_of([level])
    assert t == pytest.approx(1000 * (1 - s if inverted else s), rel=1e-6, abs=1e-6)
    alpha, sigma = process.levels_at(torch.tensor([t], dtype=torch.float64))
    assert (alpha.item(), sigma.item()) == pytest.approx(level, abs=1e-6)
    assert process.level_at(t) == pytest.approx(level, abs=1e-6)
    assert process.sigma(level) == (level.alpha if inverted else level.sigma)


@given(SHIFTS, st.integers(2, 30))
def test_a_shift_multiplies_the_noise_to_signal_ratio(shift, steps):
    config = AtlasEulerScheduler(shift=1.0).config
    sigmas = np.linspace(1, 1 / steps, steps)
    plain, shifted = (Flow(shift=k).grid(config, Request(sigmas=sigmas), Flow().final_level("zero")) for k in (1.0, shift))
    assert shifted.shift == shift and shifted.source[0].alpha == pytest.approx(0, abs=1e-15)
    for a, b in zip(plain.source[1:], shifted.source[1:]):
        assert b.sigma_hat == pytest.approx(shift * a.sigma_hat, rel=1e-9)
    dynamic = Flow(dynamic=True).grid(config, Request(sigmas=sigmas, mu=math.log(shift)), Flow().final_level("zero"))
    linear = Flow(dynamic=True, time_shift_type="linear")
    linear = linear.grid(config, Request(sigmas=sigmas, mu=shift), Flow().final_level("zero"))
    for a, b, c in zip(shifted.source, dynamic.source, linear.source):
        assert a == pytest.approx(b, abs=1e-12) and a == pytest.approx(c, abs=1e-12)


@pytest.mark.parametrize("terminal", [0.05, 0.4])
def test_sigmas_are_stretched_to_the_terminal_one(terminal):
    config, sigmas = AtlasEulerScheduler(shift=1.0).config, [1.0, 0.7, 0.3]
    grid = Flow(terminal=terminal).grid(config, Request(sigmas=sigmas), Flow().final_level("zero"))
    expected = [1 - (1 - s) * (1 - terminal) / 0.7 for s in sigmas]
    assert [level.sigma for level in grid.source] == pytest.approx(expected) and expected[-1] == pytest.approx(terminal)
    alone = Flow(terminal=terminal).grid(config, Request(sigmas=[1.0]), Flow().final_level("zero"))
    assert alone.source == [(0.0, 1.0)]


def test_levels_between_a_network_can_use():
    """Where the output says nothing about x_0 at α = 0, steps start a little below; otherwise at pure noise."""
    assert Flow().ends == ((0.0, 1.0), pytest.approx((0.999, 0.001)))
    assert Flow(zero_signal=False).ends[0].sigma_hat == pytest.approx(4096)
    assert Flow(shift=3.0).ends[1].sigma == pytest.approx(3 * 0.001 / (1 + 2 * 0.001))
    assert Flow(terminal=0.2).lowest.sigma == pytest.approx(0.2)


@pytest.mark.parametrize("request_, whatever, steps", [
    (Request(num_inference_steps=5), False, 5),
    (Request(sigmas=np.linspace(1, 0.2, 5)), False, 5),
    (Request(sigmas=[1.0, 0.9, 0.2]), False, None),
    (Request(sigmas=[1.0, 0.9, 0.2]), True, 3),
    (Request(timesteps=[1000.0, 500.0]), False, 2),
    (Request(sigmas=[1.0, 0.5], timesteps=[1000.0, 500.0]), False, 2),
    (Request(sigmas=[1.0, 0.5], timesteps=[1000.0, 700.0]), True, None),
], ids=str)  # fmt: skip
def test_open_steps_of_a_flow(request_, whatever, steps):
    assert Flow().open_steps(request_, whatever) == steps


def test_every_process_answers_for_its_coordinates():
    """A sample α x_0 + σ ε gives back x_0 and ε from each prediction, in each process."""
    alphas_cumprod = (1 - get_betas("linear")).cumprod(0)
    data, noise = torch.tensor([0.3, -1.2], dtype=torch.float64), torch.tensor([0.7, 0.1], dtype=torch.float64)
    for process in (VariancePreserving(alphas_cumprod), VarianceExploding(alphas_cumprod), Flow()):
        level = process.from_sigma_hat(0.8)
        assert level.sigma / level.alpha == pytest.approx(0.8)
        x = level.alpha * data + level.sigma * noise
        for kind in ("epsilon", "sample", "v_prediction", "flow_prediction"):
            output = process.output(kind, data, x, level)
            torch.testing.assert_close(process.data(kind, output, x, level), data)
            torch.testing.assert_close(process.noise(kind, output, x, level), noise)
        scaled = x * process.input_scale(level)
        alpha, sigma = (value.item() for value in process.levels_at(torch.tensor(process.timesteps_of([level]))))
        torch.testing.assert_close(scaled, alpha * data + sigma * noise, rtol=1e-5, atol=1e-5)
