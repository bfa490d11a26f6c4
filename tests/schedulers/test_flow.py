"""The samplers on a flow: equal to Diffusers' flow schedulers where those exist, and bad input."""

import itertools

import diffusers
import numpy as np
import pytest
import torch
from conftest import seeded

from atlas_diffusers import (
    AtlasDDIMScheduler,
    AtlasDDPMScheduler,
    AtlasEulerAncestralScheduler,
    AtlasEulerScheduler,
    AtlasHeunScheduler,
    AtlasMultistepScheduler,
    AtlasPNDMScheduler,
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
