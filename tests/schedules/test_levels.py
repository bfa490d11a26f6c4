import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas_diffusers.schedules import BETA_SCHEDULES, NoiseLevel, NoiseTable, get_betas

TABLES = {name: NoiseTable((1 - get_betas(name)).cumprod(0)) for name in sorted(BETA_SCHEDULES)}


@given(st.floats(1e-6, 1e6))
def test_level_is_its_sigma_hat(sigma_hat):
    level = NoiseLevel.from_sigma_hat(sigma_hat)
    assert level.alpha**2 + level.sigma**2 == pytest.approx(1, rel=1e-14)
    assert level.sigma_hat == pytest.approx(sigma_hat, rel=1e-14)
    assert level.log_snr == pytest.approx(-math.log(sigma_hat), abs=1e-12)
    assert NoiseLevel.from_sigma_hat(level.sigma_hat) == pytest.approx(level, rel=1e-14)


def test_limits():
    assert NoiseLevel(1.0, 0.0).log_snr == math.inf and NoiseLevel(1.0, 0.0).sigma_hat == 0
    assert NoiseLevel(0.0, 1.0).log_snr == -math.inf and NoiseLevel(0.0, 1.0).sigma_hat == math.inf


@pytest.mark.parametrize("name", TABLES)
def test_table_closed_form(name):
    alphas_cumprod = (1 - get_betas(name)).cumprod(0).double().numpy()
    np.testing.assert_allclose(TABLES[name].sigma_hats.numpy(), np.sqrt(1 / alphas_cumprod - 1), rtol=1e-10)
    for t in (0, 17, 999):
        expected = (alphas_cumprod[t] ** 0.5, (1 - alphas_cumprod[t]) ** 0.5)
        assert TABLES[name].level(t) == pytest.approx(expected, rel=1e-14)
    assert TABLES[name].level(-1) == (1.0, 0.0)


def test_floor_keeps_zero_snr_finite():
    alphas_cumprod = torch.tensor([0.9, 0.5, 0.0])
    assert NoiseTable(alphas_cumprod).sigma_hats[-1] == math.inf
    assert NoiseTable(alphas_cumprod, 2.0**-24).sigma_hats[-1].item() == pytest.approx(4096, rel=1e-6)


@settings(deadline=None)
@given(st.sampled_from(sorted(TABLES)), st.lists(st.floats(0, 999), min_size=1, max_size=8))
def test_timestep_at_inverts_sigma_hat_at(name, timesteps):
    t = torch.tensor(timesteps, dtype=torch.float64)
    torch.testing.assert_close(TABLES[name].timestep_at(TABLES[name].sigma_hat_at(t, log=True)), t, rtol=0, atol=1e-7)


@settings(deadline=None)
@given(st.sampled_from(sorted(TABLES)), st.floats(0, 999), st.booleans())
def test_interpolation_is_numpy_interp(name, t, log):
    table = TABLES[name].sigma_hats.numpy()
    expected = np.exp(np.interp(t, np.arange(1000), np.log(table))) if log else np.interp(t, np.arange(1000), table)
    ours = TABLES[name].sigma_hat_at(torch.tensor([t], dtype=torch.float64), log=log)
    np.testing.assert_allclose(ours.numpy(), [expected], rtol=1e-12)


def test_timesteps_beyond_the_table_are_clipped():
    table = TABLES["linear"]
    assert table.timestep_at(torch.tensor([0.0, 1e-9, 1e9])).tolist() == [0, 0, 999]
    assert table.sigma_hat_at(torch.tensor([-3.0, 2000.0])).tolist() == table.sigma_hats[[0, -1]].tolist()
