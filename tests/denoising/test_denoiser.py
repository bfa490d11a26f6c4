"""A denoiser calls networks of every kind; guidance, tiles and parts of a batch are closed forms of what the network gives."""

import math

import pytest
import torch
from conftest import seeded
from diffusers import DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from atlas_diffusers import AtlasDDIMScheduler, AtlasEulerScheduler
from atlas_diffusers.denoising import (
    ClassifierFreeGuidance,
    Denoiser,
    LangevinCorrector,
    SamplingState,
    SchedulerProcess,
    Tiles,
    noised,
    sample,
)
from atlas_diffusers.schedules import NoiseLevel

pytestmark = pytest.mark.usefixtures("float64")
T = torch.tensor(500)


def process(scheduler=None, steps=5):
    scheduler = scheduler or AtlasDDIMScheduler(timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    return SchedulerProcess(scheduler)


class Shift(nn.Module):
    """``x/2 + shift``; counts its rows."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def forward(self, x, t, shift=None, scale=1.0):
        self.rows.append(len(x))
        return 0.5 * scale * x + (0 if shift is None else shift.reshape(-1, *[1] * (x.ndim - 1)))


def shifted(**options):
    network = Shift()
    conditions = {"shift": torch.arange(5.0)}
    return network, Denoiser(network, process(), conditions, {"shift": torch.full((5,), -1.0)}, **options)


@settings(max_examples=30, deadline=None, database=None)
@given(st.floats(-3, 9), st.integers(1, 6))
def test_guidance_and_parts_are_the_formula(scale, batch_size):
    network, denoiser = shifted(guidance=ClassifierFreeGuidance(scale), batch_size=batch_size)
    x = torch.randn(5, 3, 2, 2, generator=seeded())
    expected = 0.5 * x + (-1 + scale * (torch.arange(5.0) + 1)).reshape(5, 1, 1, 1)
    torch.testing.assert_close(denoiser(x, T), expected)
    factor = 1 if scale == 1 else 2
    sizes = [min(batch_size, 5 - start) for start in range(0, 5, batch_size)]
    assert network.rows == [factor * size for size in sizes]


def test_a_part_of_a_denoiser_is_that_of_the_rows():
    network, denoiser = shifted(guidance=ClassifierFreeGuidance(2.0), options={"scale": 3.0})
    x = torch.randn(5, 3, generator=seeded())
    rows = torch.tensor([4, 1])
    torch.testing.assert_close(denoiser.part(rows)(x[rows], T), denoiser(x, T)[rows])
    assert len(denoiser.part(rows[:0])(x[:0], T)) == 0 and network.rows == [4, 10]


def test_guidance_holds_at_both_ends_of_its_interval():
    levels = [NoiseLevel.from_sigma_hat(s) for s in (0.5, 1.0, 2.0, 4.0)]
    guidance = ClassifierFreeGuidance(3.0, interval=(levels[1].sigma_hat, levels[2].sigma_hat))
    sizes = []

    def predict(x, conditions):
        sizes.append(len(x))
        return x

    for level in levels:
        guidance(predict, torch.zeros(1, 2), T, {"c": torch.ones(1)}, {"c": torch.zeros(1)}, lambda t, level=level: level)
    assert sizes == [1, 2, 2, 1]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"scale": math.nan}, "guidance_scale=nan"),
        ({"rescale": -0.1}, "guidance_rescale=-0.1"),
        ({"rescale": math.nan}, "guidance_rescale=nan"),
        ({"interval": (2.0, 1.0)}, r"guidance_interval=\(2.0, 1.0\)"),
        ({"interval": (math.nan, 1.0)}, "guidance_interval="),
    ],
)
def test_guidance_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        ClassifierFreeGuidance(**options)


def test_tiles_of_a_guided_network_are_blended():
    network, denoiser = shifted(guidance=ClassifierFreeGuidance(2.0), tiles=Tiles(4, 2))
    x = torch.randn(5, 3, 4, 8, generator=seeded())
    _, plain = shifted(guidance=ClassifierFreeGuidance(2.0))
    torch.testing.assert_close(denoiser(x, T), plain(x, T))
    assert network.rows == [10, 10, 10]


def test_a_transformer_of_diffusers_takes_its_arguments_by_name():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=4, in_channels=3, out_channels=3, num_layers=1, sample_size=4,
            num_embeds_ada_norm=10, norm_num_groups=1,
        ).eval()  # fmt: skip
        for parameter in network.parameters():  # the last layer starts at zero
            nn.init.normal_(parameter, std=0.1)
    x, labels = torch.randn(2, 3, 4, 4, generator=seeded()), torch.tensor([3, 7])
    denoiser = Denoiser(network, process(), {"class_labels": labels})
    with torch.no_grad():
        expected = network(x, timestep=torch.tensor([500, 500]), class_labels=labels).sample
        torch.testing.assert_close(denoiser(x, T), expected)
    assert expected.std() > 1e-2


def test_what_a_network_is_given_is_scaled_by_the_scheduler():
    seen, scheduler = [], AtlasEulerScheduler(timestep_spacing="trailing")
    denoiser = Denoiser(lambda x, t: seen.append(x) or x, process(scheduler))
    t, x = scheduler.timesteps[0], torch.ones(1, 2)
    denoiser(x, t)
    level = denoiser.process.level(t)
    assert level.alpha == 1
    torch.testing.assert_close(seen[0], x / math.hypot(1, level.sigma))


@settings(max_examples=20, deadline=None, database=None)
@given(st.sampled_from(["epsilon", "sample", "v_prediction", "flow_prediction"]), st.floats(0.05, 20))
def test_data_and_predictions_are_inverse(kind, sigma_hat):
    own, level = process(AtlasDDIMScheduler(prediction_type=kind)), NoiseLevel.from_sigma_hat(sigma_hat)
    x, data = torch.randn(2, 4, 3, generator=seeded()).unbind(0)
    torch.testing.assert_close(own.data(own.prediction(data, x, level), x, level), data, rtol=1e-9, atol=1e-9)


def test_a_flow_of_diffusers_is_a_process():
    own = process(FlowMatchEulerDiscreteScheduler(shift=3.0))
    for t, sigma in zip(own.scheduler.timesteps, own.scheduler.sigmas.tolist()):
        assert own.level(t) == pytest.approx((1 - sigma, sigma), abs=1e-7)
    assert own.prediction_type == "flow_prediction"
    x, data = torch.randn(2, 4, 3, generator=seeded()).unbind(0)
    level = NoiseLevel(0.3, 0.7)
    # v = ε − x_0 with ε = (x − 0.3 x_0)/0.7
    torch.testing.assert_close(own.prediction(data, x, level), (x - 0.3 * data) / 0.7 - data)


@pytest.mark.parametrize("scheduler", [
    AtlasEulerScheduler(shift=2.0, invert_sigmas=True), FlowMatchEulerDiscreteScheduler(shift=2.0, invert_sigmas=True),
])  # fmt: skip
def test_an_inverted_flow_is_followed_by_the_predictions_of_its_process(scheduler):
    scheduler.set_timesteps(6)
    own, (data, noise) = SchedulerProcess(scheduler), torch.randn(2, 4, 3, generator=seeded()).unbind(0)
    for t, after in zip(scheduler.timesteps[:-1], scheduler.timesteps[1:].tolist()):
        level, x = own.level(t), noised(scheduler, data, noise, t.reshape(1))
        assert level == pytest.approx((t.item() / 1000, 1 - t.item() / 1000), abs=1e-6)
        torch.testing.assert_close(x, level.alpha * data + level.sigma * noise)
        output = own.prediction(data, x, level)
        torch.testing.assert_close(own.data(output, x, level), data)
        moved = scheduler.step(output, t, x, return_dict=False)[0]
        torch.testing.assert_close(moved, after / 1000 * data + (1 - after / 1000) * noise)


def test_a_model_of_another_shape_is_named():
    with pytest.raises(ValueError, match=r"the model gives \(2, 1\) for a sample of \(2, 3\)"):
        Denoiser(lambda x, t: x[:, :1], process())(torch.zeros(2, 3), T)


def test_a_langevin_step_keeps_the_variance_of_its_level():
    """With the exact score −x/V of N(0, V): V (1 − 2r²)² + 4r² V = V (1 + 4r⁴), as ‖z‖²/‖s‖² is V in many dimensions."""
    scheduler, r, std = AtlasDDIMScheduler(timestep_spacing="trailing"), 0.3, 0.6
    scheduler.set_timesteps(4)
    corrector = LangevinCorrector(scheduler, 1, r, seeded(1))
    before, now = scheduler.timesteps[1:3]
    alpha, sigma = corrector.process.level(now)
    variance = alpha**2 * std**2 + sigma**2
    x = variance**0.5 * torch.randn(64, 4, 32, 32, generator=seeded())
    found = corrector(x, before, now, lambda x, t: sigma * x / variance)
    # 5 standard errors of a variance of 262,144 draws
    assert found.var() / x.var() == pytest.approx(1 + 4 * r**4, abs=5 * math.sqrt(2 / x.numel()) + 1e-3)
    assert torch.equal(corrector(x, now, now, None), x), "inside a step of several calls"


class Gaussian:
    """The exact noise prediction of N(0, 1): σ x."""

    def __init__(self, own):
        self.process = own

    def __call__(self, x, t):
        return self.process.level(t).sigma * x


def test_the_loop_is_the_scheduler_on_the_denoiser():
    own = process(steps=7)
    x = torch.randn(2, 3, generator=seeded())
    expected, again = x, AtlasDDIMScheduler(timestep_spacing="trailing")
    again.set_timesteps(7)
    states, watch = [], lambda state: states.append((state.index, int(state.timestep)))
    found = sample(Gaussian(own), own.scheduler, x, begin=2, first=4, callback=watch)
    for t in again.timesteps[2:]:
        expected = again.step(own.level(t).sigma * expected, t, expected).prev_sample
    torch.testing.assert_close(found, expected)
    assert states == list(zip(range(4, 9), again.timesteps[2:].tolist()))


def test_a_callback_replaces_sample_and_denoiser_and_stops():
    own = process(steps=7)

    def callback(state: SamplingState) -> None:
        state.sample = torch.full_like(state.sample, 5.0)
        state.denoiser = lambda x, t: calls.append(t) or torch.zeros_like(x)
        state.stopped = state.index == 2

    calls = []
    found = sample(Gaussian(own), own.scheduler, torch.ones(1, 2), callback=callback)
    assert torch.equal(found, torch.full((1, 2), 5.0)) and len(calls) == 2


def test_correctors_come_between_the_steps():
    own, seen = process(steps=4), []

    def corrector(x, before, now, predict):
        seen.append((int(before), int(now)))
        return 0 * x

    found = sample(Gaussian(own), own.scheduler, torch.ones(1, 2), corrector=corrector)
    steps = own.scheduler.timesteps.tolist()
    assert seen == list(zip(steps, steps[1:])) and not found.any()
