"""Targets, weights and timesteps of the denoising objective."""

import pytest
import torch
from conftest import seeded
from oracles import prediction

from atlas_diffusers import AtlasDDIMScheduler
from atlas_diffusers.schedules import PREDICTION_TYPES
from atlas_diffusers.training import (
    denoising_loss,
    edm_weights,
    min_snr_weights,
    offset_noise,
    p2_weights,
    stratified_timesteps,
)

GAMMA = 5.0


def paper_weight(prediction_type, alpha, sigma, gamma):
    """Closed forms of arXiv 2303.09556; for ε − x_0 the data error is σ/(α + σ) times the output error."""
    snr = alpha**2 / sigma**2
    return {
        "epsilon": min(snr, gamma) / snr,
        "sample": min(snr, gamma),
        "v_prediction": min(snr, gamma) / (snr + 1),
        "flow_prediction": min(snr, gamma) * (sigma / (alpha + sigma)) ** 2,
    }[prediction_type]


def levels(log_snr):
    alpha = torch.sigmoid(2 * torch.tensor(log_snr)).sqrt()
    return alpha, (1 - alpha**2).sqrt()


@pytest.mark.parametrize("gamma", [None, GAMMA])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_denoising_loss_is_the_weighted_mean_of_per_sample_errors(prediction_type, gamma):
    output, data, noise = torch.randn(3, 4, 3, 5, 6, generator=seeded())
    alpha, sigma = levels([2.0, 0.5, -0.5, -2.0])
    expected = 0.0
    for i in range(4):
        a, s = alpha[i].item(), sigma[i].item()
        weight = 1.0 if gamma is None else paper_weight(prediction_type, a, s, gamma)
        error = output[i].double() - prediction(prediction_type, data[i].double(), noise[i].double(), a, s)
        expected += weight * error.square().mean().item() / 4
    weights = None if gamma is None else min_snr_weights(prediction_type, alpha, sigma, gamma)
    loss = denoising_loss(output, data, noise, alpha, sigma, prediction_type, weights)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_a_perfect_prediction_costs_nothing_and_its_gradient_is_the_residual(prediction_type):
    data, noise = torch.randn(2, 2, 3, 4, 4, generator=seeded())
    alpha, sigma = levels([1.0, -1.0])
    a, s = alpha.view(-1, 1, 1, 1), sigma.view(-1, 1, 1, 1)
    perfect = prediction(prediction_type, data, noise, a, s)
    assert denoising_loss(perfect, data, noise, alpha, sigma, prediction_type) == pytest.approx(0, abs=1e-12)
    output = (perfect + 0.5).requires_grad_()
    denoising_loss(output, data, noise, alpha, sigma, prediction_type).backward()
    torch.testing.assert_close(output.grad, torch.full_like(output, 2 * 0.5 / output.numel()), rtol=1e-5, atol=0)


@pytest.mark.parametrize("gamma", [0.5, GAMMA, 100.0])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_min_snr_weights_equal_the_papers_closed_forms(prediction_type, gamma):
    alpha, sigma = levels([4.0, 1.5, 0.8047, 0.0, -1.0, -4.0])
    expected = [paper_weight(prediction_type, a, s, gamma) for a, s in zip(alpha.tolist(), sigma.tolist())]
    weights = min_snr_weights(prediction_type, alpha, sigma, gamma)
    torch.testing.assert_close(weights, torch.tensor(expected), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "prediction_type, expected", [("epsilon", 1.0), ("sample", 0.0), ("v_prediction", 0.0), ("flow_prediction", 0.0)]
)
def test_min_snr_weights_are_finite_without_signal(prediction_type, expected):
    assert min_snr_weights(prediction_type, torch.zeros(1), torch.ones(1), GAMMA).tolist() == [expected]


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_min_snr_weights_are_finite_at_every_timestep_of_a_zero_terminal_snr_schedule(prediction_type):
    scheduler = AtlasDDIMScheduler(prediction_type=prediction_type, rescale_betas_zero_snr=True)
    alpha, sigma = scheduler.levels_at(torch.arange(1000), like=torch.zeros(1))
    weights = min_snr_weights(prediction_type, alpha, sigma, GAMMA)
    assert torch.isfinite(weights).all() and weights.min() >= 0 and weights.max() <= GAMMA * (1 + 1e-6)


def data_error_factor(prediction_type, alpha, sigma):
    """Error of the data over the error of the prediction."""
    return {
        "epsilon": sigma / alpha, "sample": 1.0, "v_prediction": sigma, "flow_prediction": sigma / (alpha + sigma)
    }[prediction_type]  # fmt: skip


@pytest.mark.parametrize("gamma, k", [(1.0, 1.0), (0.5, 2.0)])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_p2_weights_are_the_papers_on_the_noise_error(prediction_type, gamma, k):
    alpha, sigma = (level.double() for level in levels([3.0, 0.4, 0.0, -2.0]))
    expected = []
    for a, s in zip(alpha.tolist(), sigma.tolist()):
        noise_error = a / s * data_error_factor(prediction_type, a, s)
        expected.append((k + a**2 / s**2) ** -gamma * noise_error**2)
    found = p2_weights(prediction_type, alpha, sigma, gamma, k)
    torch.testing.assert_close(found, torch.tensor(expected).double(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("sigma_data", [0.5, 1.3])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_edm_weights_are_the_papers_on_the_data_error(prediction_type, sigma_data):
    alpha, sigma = (level.double() for level in levels([3.0, 0.4, 0.0, -2.0]))
    expected = []
    for a, s in zip(alpha.tolist(), sigma.tolist()):
        weight = ((s / a) ** 2 + sigma_data**2) / (s / a * sigma_data) ** 2
        expected.append(weight * data_error_factor(prediction_type, a, s) ** 2)
    found = edm_weights(prediction_type, alpha, sigma, sigma_data)
    torch.testing.assert_close(found, torch.tensor(expected).double(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction", "flow_prediction"])
def test_edm_and_p2_weights_are_finite_without_signal(prediction_type):
    assert edm_weights(prediction_type, torch.zeros(1), torch.ones(1), 0.5).item() == pytest.approx(1 / 0.5**2)
    assert p2_weights(prediction_type, torch.zeros(1), torch.ones(1)).item() == 0.0


def test_offset_noise_adds_one_number_a_sample_and_channel():
    noise = torch.randn(500, 3, 8, 8, generator=seeded(), dtype=torch.float64)
    shift = offset_noise(noise, 0.3, seeded(1)) - noise
    assert shift.flatten(2).std(2).max() < 1e-12
    assert shift[..., 0, 0].std().item() == pytest.approx(0.3, rel=0.1)


@pytest.mark.parametrize("batch", [1, 4, 20, 50, 1000])
def test_stratified_timesteps_put_one_in_every_stratum(batch):
    for seed in range(20):
        strata = stratified_timesteps(batch, 1000, seeded(seed)) // (1000 // batch)
        assert strata.sort().values.tolist() == list(range(batch))


@pytest.mark.parametrize("batch", [3, 7, 32, 1500])
def test_stratified_timesteps_stay_in_range_where_the_batch_does_not_divide_them(batch):
    for seed in range(20):
        found = stratified_timesteps(batch, 1000, seeded(seed)).sort().values
        low = torch.arange(batch) * 1000 // batch
        high = ((torch.arange(batch) + 1) * 1000 // batch).clamp(max=999)
        assert found.dtype == torch.int64 and ((low <= found) & (found <= high)).all()


def test_stratified_timesteps_are_uniform_at_every_place_of_the_batch():
    generator = seeded()
    draws = torch.stack([stratified_timesteps(4, 20, generator) for _ in range(4000)])
    for place in draws.T:
        counts = torch.bincount(place, minlength=20).double()
        # 19 degrees of freedom: mean 19, standard deviation 6.2
        assert ((counts - 200) ** 2 / 200).sum() < 19 + 5 * 6.2
    standard_error = ((20**2 - 1) / 12 / 4000) ** 0.5
    assert (draws.double().mean(0) - 9.5).abs().max() < 5 * standard_error


@pytest.mark.parametrize("shift", [0.5, 3.0])
def test_a_shift_moves_every_quantile_to_its_closed_form(shift):
    found = stratified_timesteps(1000, 1000, seeded(), shift).sort().values.double()
    u = (torch.arange(1000) + 0.5).double() / 1000
    expected = 1000 * shift * u / (1 + (shift - 1) * u)
    # half a stratum at the steepest slope (shift or 1/shift), and one for the floor
    assert (found - expected).abs().max() <= max(shift, 1 / shift) / 2 + 1
