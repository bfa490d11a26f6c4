import diffusers
import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from scipy.stats import beta

from atlas_diffusers.schedulers import AtlasDDIMScheduler
from atlas_diffusers.schedules import TIMESTEP_SPACINGS, sigma_grid, spaced_timesteps

LOW, HIGH = 0.03, 14.6
SPACINGS = {
    "linspace": lambda n, T: np.linspace(T - 1, 0, n),
    "leading": lambda n, T: np.arange(n)[::-1] * (T // n),
    "trailing": lambda n, T: np.round(T - np.arange(n) * T / n) - 1,
}
SIGMAS = {
    "karras": lambda u: (HIGH ** (1 / 7) + u * (LOW ** (1 / 7) - HIGH ** (1 / 7))) ** 7,
    "exponential": lambda u: HIGH * (LOW / HIGH) ** u,
    "lambda": lambda u: HIGH * (LOW / HIGH) ** u,
    "beta": lambda u: LOW + (HIGH - LOW) * beta.ppf(1 - u, 0.6, 0.6),
}


@pytest.mark.parametrize("steps", [2, 7, 30, 1000])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_spacing_closed_form(spacing, steps):
    np.testing.assert_allclose(spaced_timesteps(spacing, steps, 1000), SPACINGS[spacing](steps, 1000), atol=1e-9)


def test_one_linspace_step_starts_at_noise():
    assert spaced_timesteps("linspace", 1, 1000) == [999]


def test_offset_moves_only_leading():
    assert spaced_timesteps("leading", 4, 1000, 1) == [751, 501, 251, 1]
    for spacing in ("linspace", "trailing"):
        assert spaced_timesteps(spacing, 4, 1000, 1) == spaced_timesteps(spacing, 4, 1000)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 1000), st.sampled_from(TIMESTEP_SPACINGS), st.integers(0, 1))
@example(31, "linspace", 0)
@example(48, "trailing", 0)
def test_spacing_is_diffusers(steps, spacing, offset):
    offset = offset if spacing == "leading" and steps < 1000 else 0
    atlas = AtlasDDIMScheduler(timestep_spacing=spacing, steps_offset=offset)
    atlas.set_timesteps(steps)
    for stock in (diffusers.DDIMScheduler, diffusers.DDPMScheduler, diffusers.EulerDiscreteScheduler):
        scheduler = stock.from_config(atlas.config)
        scheduler.set_timesteps(steps)
        # for 62 of the trailing spacings Diffusers' np.arange yields one step too many, at t = -1
        assume(len(scheduler.timesteps) == steps)
        ours = atlas.timesteps
        if stock is diffusers.EulerDiscreteScheduler:
            ours = spaced_timesteps(spacing, steps, 1000, offset)
        np.testing.assert_allclose(ours, scheduler.timesteps.numpy(), atol=1e-4)


@pytest.mark.parametrize("steps", [2, 10, 51])
@pytest.mark.parametrize("name", SIGMAS)
def test_sigma_grid_closed_form(name, steps):
    grid = sigma_grid(name, LOW, HIGH, steps)
    assert grid.dtype == torch.float64
    np.testing.assert_allclose(grid.numpy(), SIGMAS[name](np.linspace(0, 1, steps)), rtol=1e-9)
    assert grid[0].item() == pytest.approx(HIGH) and grid[-1].item() == pytest.approx(LOW)


@pytest.mark.parametrize("name, option", [(n, f"use_{n}_sigmas") for n in ("karras", "exponential", "beta")])
def test_sigma_grid_is_diffusers(name, option):
    euler = diffusers.EulerDiscreteScheduler(**{option: True})
    euler.set_timesteps(12)
    atlas = AtlasDDIMScheduler.from_config(euler.config)
    atlas.set_timesteps(12)
    np.testing.assert_allclose(atlas.sigmas.numpy(), euler.sigmas.numpy(), rtol=2e-6)
    np.testing.assert_allclose(atlas.timesteps.numpy(), euler.timesteps.numpy(), atol=2e-3)


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ValueError, match="'middle'.*linspace.*leading.*trailing"):
        spaced_timesteps("middle", 10, 1000)
    with pytest.raises(ValueError, match="'kerras'.*karras.*exponential.*beta.*lambda"):
        sigma_grid("kerras", LOW, HIGH, 10)
