import diffusers
import numpy as np
import pytest
import torch

from atlas_diffusers.schedulers import AtlasDDIMScheduler, AtlasHeunScheduler
from atlas_diffusers.schedules import BETA_SCHEDULES, get_betas, register_beta_schedule, rescale_zero_terminal_snr


def alpha_bar_betas(alpha_bar, T):
    u = np.arange(T + 1) / T
    return np.minimum(1 - alpha_bar(u[1:]) / alpha_bar(u[:-1]), 0.999)


def cosine(T, start, end):
    return alpha_bar_betas(lambda u: np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2, T)


CLOSED_FORMS = {
    "linear": lambda T, start, end: np.linspace(start, end, T),
    "scaled_linear": lambda T, start, end: np.linspace(start**0.5, end**0.5, T) ** 2,
    "cosine": cosine,
    "squaredcos_cap_v2": cosine,
    "quadratic": lambda T, start, end: start + (end - start) * (np.arange(T) / (T - 1)) ** 2,
    "sigmoid": lambda T, start, end: start + (end - start) / (1 + np.exp(6 - 12 * np.arange(T) / (T - 1))),
    "exponential": lambda T, start, end: start * (end / start) ** (np.arange(T) / (T - 1)),
}
STOCK = ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"]


@pytest.fixture
def own_name():
    yield "test_only"
    BETA_SCHEDULES.pop("test_only", None)


@pytest.mark.parametrize("T", [10, 1000])
@pytest.mark.parametrize("start, end", [(1e-4, 0.02), (0.00085, 0.012)])
@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_closed_form(name, start, end, T):
    betas = get_betas(name, T, start, end)
    assert betas.dtype == torch.float32
    np.testing.assert_allclose(betas.numpy(), CLOSED_FORMS[name](T, start, end), rtol=2e-6, atol=1e-8)


@pytest.mark.parametrize("start, end", [(1e-4, 0.02), (0.00085, 0.012)])
@pytest.mark.parametrize("name", STOCK)
def test_same_betas_as_diffusers(name, start, end):
    stock = diffusers.DDPMScheduler(beta_schedule=name, beta_start=start, beta_end=end)
    ours = AtlasDDIMScheduler(beta_schedule=name, beta_start=start, beta_end=end)
    assert torch.equal(ours.betas, stock.betas)
    assert torch.equal(ours.alphas_cumprod, stock.alphas_cumprod)


@pytest.mark.parametrize("name", STOCK)
def test_same_zero_terminal_snr_as_diffusers(name):
    stock = diffusers.DDPMScheduler(beta_schedule=name, rescale_betas_zero_snr=True)
    ours = AtlasDDIMScheduler(beta_schedule=name, rescale_betas_zero_snr=True)
    torch.testing.assert_close(ours.alphas_cumprod, stock.alphas_cumprod, rtol=0, atol=1e-7)
    assert ours.alphas_cumprod[-1] == 0


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_zero_terminal_snr_is_the_linear_map_of_the_signal(name):
    betas = get_betas(name)
    signal = np.sqrt(np.cumprod(1 - betas.double().numpy()))
    expected = (signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])
    rescaled = np.sqrt(np.cumprod(1 - rescale_zero_terminal_snr(betas).double().numpy()))
    np.testing.assert_allclose(rescaled, expected, atol=1e-4)
    assert rescaled[-1] == 0 and rescaled[0] == pytest.approx(signal[0], abs=1e-6)


def test_quadratic_is_not_scaled_linear():
    quadratic, scaled = get_betas("quadratic"), get_betas("scaled_linear")
    assert (scaled - quadratic).max() > 5e-4
    assert quadratic[500] == pytest.approx(1e-4 + 0.0199 * (500 / 999) ** 2, rel=1e-5)


def test_trained_betas_win_over_the_name():
    betas = [0.1, 0.2, 0.3]
    assert get_betas("linear", trained_betas=betas).tolist() == pytest.approx(betas)
    scheduler = AtlasDDIMScheduler(num_train_timesteps=3, trained_betas=betas)
    assert scheduler.alphas_cumprod.tolist() == pytest.approx([0.9, 0.72, 0.504])


def test_custom_schedule_is_open_to_every_scheduler(own_name):
    @register_beta_schedule(own_name)
    def constant(num_train_timesteps, beta_start, beta_end):
        return torch.full((num_train_timesteps,), beta_end)

    assert register_beta_schedule(own_name, constant) is constant
    scheduler = AtlasDDIMScheduler(num_train_timesteps=20, beta_schedule=own_name, beta_end=0.05)
    np.testing.assert_allclose(scheduler.alphas_cumprod.numpy(), 0.95 ** np.arange(1, 21), rtol=1e-5)


def test_duplicate_name_is_refused():
    before = BETA_SCHEDULES["linear"]
    with pytest.raises(ValueError, match="'linear' is registered already"):
        register_beta_schedule("linear", lambda T, start, end: torch.full((T,), 0.5))
    assert BETA_SCHEDULES["linear"] is before


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError) as error:
        get_betas("parabolic")
    assert "parabolic" in str(error.value) and all(name in str(error.value) for name in BETA_SCHEDULES)


@pytest.mark.parametrize("start, end", [(0.0, 0.02), (-0.1, 0.02), (1e-4, 1.0), (float("nan"), 0.02)])
def test_betas_outside_the_unit_interval_are_refused(start, end):
    with pytest.raises(ValueError, match=r"'linear'.*\(0, 1\)"):
        get_betas("linear", 10, start, end)


def test_trained_betas_of_two_dimensions_are_refused():
    with pytest.raises(ValueError, match=r"\(1, 2\)"):
        get_betas("linear", trained_betas=[[0.1, 0.2]])


def test_shap_es_schedule_is_diffusers():
    ours, stock = AtlasHeunScheduler(beta_schedule="exp"), diffusers.HeunDiscreteScheduler(beta_schedule="exp")
    torch.testing.assert_close(ours.alphas_cumprod, stock.alphas_cumprod, rtol=1e-6, atol=0)
    torch.testing.assert_close(ours.alphas_cumprod[-1].log().item(), -12.0, rtol=1e-3, atol=0)
