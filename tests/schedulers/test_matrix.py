"""
Every sampler with every prediction type, spacing, sigma grid, zero terminal SNR and thresholding, against closed forms.

The network is the exact one of Gaussian data. It is called with the timestep that the sampler hands out and finds its own
noise level, so a sampler that calls it at the wrong time fails too. Where thresholding is on, the data of the first element
are the number 3, which the threshold makes 1, and the others stay inside [-1, 1].
"""

import itertools

import numpy as np
import pytest
import torch
from conftest import seeded
from oracles import PREDICTION_TYPES, Gaussian, order_of_convergence, prediction

import atlas_diffusers

SPACINGS = ("linspace", "leading", "trailing")
GRIDS = (None, "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
ORDER = {"DDIM": 1, "PNDM": 2, "Euler": 1, "Heun": 2, "Multistep": 3}
VARIANCE_EXPLODING = ("Euler", "EulerAncestral", "Heun")
BETA_0 = 0.1  # times 1/T
OPTIONS = [(zero_snr, thresholding) for zero_snr in (False, True) for thresholding in (False, True)]


def cells(samplers):
    return pytest.mark.parametrize(
        "sampler, prediction_type, spacing, grid", list(itertools.product(samplers, PREDICTION_TYPES, SPACINGS, GRIDS))
    )


def build(sampler, prediction_type, spacing, grid, zero_snr, thresholding, T):
    options = {
        "num_train_timesteps": T,
        "beta_start": BETA_0 / T,
        "beta_end": 20 / T,
        "prediction_type": prediction_type,
        "timestep_spacing": spacing,
        "rescale_betas_zero_snr": zero_snr,
        "final_sigmas_type": "sigma_min",
    }
    if grid:  # fixed ends: those of the leading and trailing spacings move with the number of steps
        options |= {grid: True, "sigma_min": (BETA_0 / (T - BETA_0)) ** 0.5, "sigma_max": 20.0}
    if thresholding:
        options |= {"thresholding": True, "dynamic_thresholding_ratio": 0.5, "sample_max_value": 10.0}
    if sampler == "Multistep":
        options |= {"angle_power": None, "angle_scale": 1.0}  # at the default, errors change sign at some step counts
    return getattr(atlas_diffusers, f"Atlas{sampler}Scheduler")(**options)


class Network:
    """The exact network at a timestep, for a sample in VP coordinates."""

    def __init__(self, scheduler, data, pinned):
        c = scheduler.config
        alphas = scheduler.alphas_cumprod.double().numpy()
        # zero signal is replaced by 2^-24 where x_0 would be lost: with ε, and in VE coordinates
        if c.rescale_betas_zero_snr and scheduler.process.exact is scheduler.process.finite:
            alphas = np.maximum(alphas, 2.0**-24)
        with np.errstate(divide="ignore"):
            self.sigma_hats = np.sqrt((1 - alphas) / alphas)
        self.on_grid = any(c[grid] for grid in GRIDS[1:])
        self.prediction_type, self.data, self.pinned = c.prediction_type, data, pinned

    def sigma_hat(self, t):
        """log-linear in the timestep for sigma grids, linear for fractional spaced timesteps (as in Diffusers)."""
        at = np.arange(len(self.sigma_hats))
        if float(t).is_integer():
            return self.sigma_hats[int(t)]
        if self.on_grid:
            return np.exp(np.interp(t, at, np.log(np.minimum(self.sigma_hats, 4096))))
        return np.interp(t, at, self.sigma_hats)

    def level(self, t):
        sigma_hat = self.sigma_hat(t)
        scale = np.hypot(1, sigma_hat)
        return (0.0, 1.0) if np.isinf(sigma_hat) else (1 / scale, sigma_hat / scale)

    def __call__(self, x, t):
        alpha, sigma = self.level(float(t))
        data = self.data.data_prediction(x, alpha, sigma)
        if self.pinned is not None:
            data[:, 0] = self.pinned
        return prediction(self.prediction_type, data, (x - alpha * data) / sigma, alpha, sigma)


def flow(network, z, alpha, sigma):
    x = network.data.flow(z, alpha, sigma)
    if network.pinned is not None:
        x[:, 0] = alpha + sigma * z[:, 0]
    return x


def flow_error(cell, steps, T, stop):
    """Largest error against the probability-flow ODE, from the first level down to timestep ``stop``."""
    sampler, *_, thresholding = cell
    scheduler = build(*cell, T)
    network = Network(scheduler, Gaussian(0.2, 0.5), 3.0 if thresholding else None)
    scheduler.set_timesteps(steps)
    z = torch.linspace(-1.4, 1.4, 6, dtype=torch.float64)[None]
    exploding = sampler in VARIANCE_EXPLODING
    alpha, sigma = network.level(float(scheduler.timesteps[0]))
    x = flow(network, z, alpha, sigma) / (alpha if exploding else 1)
    options = {"use_clipped_model_output": True} if sampler == "DDIM" else {}
    for t in scheduler.timesteps:
        if t <= stop - 1:
            break
        x = scheduler.step(network(scheduler.scale_model_input(x, t), t), t, x, **options).prev_sample
    alpha, sigma = network.level(float(t) if stop else 0)
    return (x * (alpha if exploding else 1) - flow(network, z, alpha, sigma)).abs().max().item()


def expected_order(sampler, prediction_type, spacing, grid, zero_snr, thresholding):
    if sampler == "PNDM" and spacing == "linspace" and not grid:
        return 1  # as in Diffusers, steps of ⌊T/N⌋ on timesteps (T − 1)/(N − 1) apart: off by O(1/N) of a step each
    if sampler == "PNDM" and prediction_type == "v_prediction" and not thresholding:
        return 1  # as in Diffusers, averages of v are read at the start of the step
    return ORDER[sampler]


@cells(ORDER)
def test_deterministic_samplers_converge_to_the_flow(sampler, prediction_type, spacing, grid):
    steps, T, stop = (50, 100), 1000, 0
    if sampler == "PNDM" and grid == "use_beta_sigmas":
        steps = (250, 500)  # the quantiles' spacing becomes even only slowly at their ends
    elif not grid and (sampler == "Multistep" or sampler == "PNDM" and spacing != "linspace"):
        # σ̂ grows as √t near clean data, where neighbouring steps stay unequal however many there are: stop above
        steps, T, stop = (200, 400), 4000, 800
    for options in OPTIONS:
        cell = (sampler, prediction_type, spacing, grid, *options)
        errors = [flow_error(cell, n, T, stop) for n in steps]
        order, expected = order_of_convergence(steps, errors), expected_order(*cell)
        assert order == pytest.approx(expected, abs=0.3 if expected == 3 else 0.2), (options, errors)


def moments(network, sigma_hats):
    """Mean and variance of ``x/α`` after ancestral steps through the levels, started at the exact distribution."""
    m, s = network.data.mean, network.data.std
    mean, variance = m, s**2 + sigma_hats[0] ** 2
    for now, after in zip(sigma_hats, sigma_hats[1:]):
        if np.isinf(now):
            mean, variance = m, after**2
            continue
        gain, keep = s**2 / (s**2 + now**2), (after / now) ** 2
        factor = gain + keep * (1 - gain)
        mean = factor * mean + (1 - factor) * m
        variance = factor**2 * variance + keep * (now**2 - after**2)
    return mean, variance


def ancestral_samples(cell, steps, rows):
    """The samples over α, with the network and the noise levels of the run."""
    sampler, *_, thresholding = cell
    scheduler = build(*cell, 1000)
    network = Network(scheduler, Gaussian(0.2, 0.15), 3.0 if thresholding else None)
    scheduler.set_timesteps(steps)
    sigma_hats = [network.sigma_hat(float(t)) for t in scheduler.timesteps] + [network.sigma_hat(0)]
    generator = seeded(11)
    z = torch.randn(rows, 9, generator=generator, dtype=torch.float64)
    exploding = sampler in VARIANCE_EXPLODING
    alpha, sigma = network.level(float(scheduler.timesteps[0]))
    x = flow(network, z, alpha, sigma) / (alpha if exploding else 1)
    options = {"eta": 1.0, "use_clipped_model_output": True} if sampler == "DDIM" else {}
    for t in scheduler.timesteps:
        x = scheduler.step(network(scheduler.scale_model_input(x, t), t), t, x, generator=generator, **options).prev_sample
    return x / (1 if exploding else network.level(0)[0]), network, sigma_hats


@cells(["DDPM", "EulerAncestral", "DDIM"])
def test_stochastic_samplers_have_the_moments_of_the_reverse_process(sampler, prediction_type, spacing, grid):
    if sampler == "DDIM" and spacing == "linspace" and not grid:
        pytest.skip("steps of ⌊T/N⌋ on timesteps (T − 1)/(N − 1) apart are not steps of the reverse process")
    rows = 500
    for options in OPTIONS:
        x, network, sigma_hats = ancestral_samples((sampler, prediction_type, spacing, grid, *options), 20, rows)
        mean, variance = moments(network, sigma_hats)
        values = x[:, 1:]
        error = (variance / values.numel()) ** 0.5
        assert values.mean().item() == pytest.approx(mean, abs=5 * error), options
        assert values.var().item() == pytest.approx(variance, abs=5 * variance * (2 / values.numel()) ** 0.5), options
        if options[1]:
            assert x[:, 0].mean().item() == pytest.approx(1, abs=5 * sigma_hats[-1] / rows**0.5)


@pytest.mark.parametrize("spacing, grid", list(itertools.product(SPACINGS, GRIDS)))
def test_the_reverse_process_ends_at_the_data(spacing, grid):
    """The moments that the test above compares with converge to those of the data, at order 1."""
    scheduler = build("EulerAncestral", "epsilon", spacing, grid, False, False, 1000)
    network = Network(scheduler, Gaussian(0.2, 0.15), None)
    steps, errors = (250, 500, 1000), []
    for n in steps:
        scheduler.set_timesteps(n)
        levels = [network.sigma_hat(float(t)) for t in scheduler.timesteps] + [network.sigma_hat(0)]
        mean, variance = moments(network, levels)
        assert mean == pytest.approx(0.2)
        errors.append(abs((variance - levels[-1] ** 2) ** 0.5 - 0.15))
    assert order_of_convergence(steps, errors) == pytest.approx(1, abs=0.2)


@cells([*ORDER, "DDPM", "EulerAncestral"])
def test_thresholding_rescales_what_lies_beyond(sampler, prediction_type, spacing, grid):
    """A network sure of data 3 is rescaled to 1; all but the few-step solver then go straight to 1, whatever the grid."""
    if sampler == "PNDM" and spacing == "linspace" and not grid:
        pytest.skip("steps of ⌊T/N⌋ on timesteps (T − 1)/(N − 1) apart do not meet the levels of the calls")
    for zero_snr in (False, True):
        scheduler = build(sampler, prediction_type, spacing, grid, zero_snr, True, 1000)
        scheduler.register_to_config(final_sigmas_type="zero", **({"set_alpha_to_one": True} if sampler == "PNDM" else {}))
        network = Network(scheduler, Gaussian(3.0, 0.0), 3.0)
        scheduler.set_timesteps(100 if sampler == "Multistep" else 10)
        alpha, sigma = network.level(float(scheduler.timesteps[0]))
        x = alpha + sigma * torch.randn(2, 5, generator=seeded(3), dtype=torch.float64)
        x = x / alpha if sampler in VARIANCE_EXPLODING else x
        options = {"use_clipped_model_output": True} if sampler == "DDIM" else {}
        if sampler in ("DDPM", "EulerAncestral"):
            options["generator"] = seeded(4)
        for t in scheduler.timesteps:
            x = scheduler.step(network(scheduler.scale_model_input(x, t), t), t, x, **options).prev_sample
        torch.testing.assert_close(x, torch.ones_like(x), rtol=0, atol=1e-4)


# ------------------------------------------------------------------ the same on a flow

FLOW_GRIDS = (None, "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
SHIFTS = ({"shift": 1.0}, {"shift": 3.0}, {"shift": 1.0, "use_dynamic_shifting": True}, {"shift": 1.0, "invert_sigmas": True})
LEAST = 1e-5  # the least sigma of training, from which one step of first order leads to the data


def flow_cells(samplers):
    return pytest.mark.parametrize(
        "sampler, prediction_type, grid", list(itertools.product(samplers, PREDICTION_TYPES, FLOW_GRIDS))
    )


def build_flow(sampler, prediction_type, grid, process, steps):
    """A scheduler ready for its steps."""
    options = {**process, "prediction_type": prediction_type, "num_train_timesteps": round(1 / LEAST)}
    if sampler == "Multistep":
        options |= {"use_angle_nodes": False, "angle_scale": 1.0}
    if grid:
        options[grid] = True
    scheduler = getattr(atlas_diffusers, f"Atlas{sampler}Scheduler")(**options)
    scheduler.set_timesteps(steps, mu=1.15)
    return scheduler


def flow_network(scheduler, data, x, t):
    """The exact network of a flow at a timestep."""
    s, norm = float(t) * LEAST, 1.0
    s = 1 - s if scheduler.config.invert_sigmas else s
    s = min(s, 4096 / 4097) if scheduler.config.prediction_type == "epsilon" else s  # where ε says something about x_0
    if scheduler.config.prediction_type == "v_prediction":
        norm = np.hypot(1 - s, s)
    x_0 = data.data_prediction(x, 1 - s, s)
    output = prediction(scheduler.config.prediction_type, x_0, (x - (1 - s) * x_0) / s, (1 - s) / norm, s / norm)
    return -output if scheduler.config.invert_sigmas else output


@flow_cells(ORDER)
def test_deterministic_samplers_converge_to_the_flow_of_flow_matching(sampler, prediction_type, grid):
    data, z = Gaussian(0.2, 0.5), torch.linspace(-1.4, 1.4, 6, dtype=torch.float64)[None]
    # Adams-Bashforth begins with one step of order 1, which at pure noise is of order 2 in the end
    expected = 2 if sampler == "Multistep" else ORDER[sampler]
    if grid:
        counts = (160, 320) if grid == "use_lu_lambdas" or sampler in ("PNDM", "Multistep") else (60, 120)
    else:
        counts = (8, 16) if sampler == "PNDM" else (60, 120)  # which meets the rounding of float32 timesteps soon
    for process in SHIFTS:
        errors = []
        for steps in counts:
            scheduler = build_flow(sampler, prediction_type, grid, process, steps)
            x = data.flow(z, *scheduler._grid.source[0])
            for t in scheduler.timesteps:
                x = scheduler.step(flow_network(scheduler, data, x, t), t, x).prev_sample
            errors.append((x - data.flow(z, 1.0, 0.0)).abs().max().item())
        order = order_of_convergence(counts, errors)
        assert order > expected - 0.3, (process, errors)


@flow_cells(["DDPM", "EulerAncestral", "DDIM"])
def test_stochastic_samplers_have_the_moments_of_the_reverse_flow(sampler, prediction_type, grid):
    data, rows = Gaussian(0.2, 0.15), 4000
    for process in SHIFTS:
        scheduler, generator = build_flow(sampler, prediction_type, grid, process, 20), seeded(11)
        x = data.flow(torch.randn(rows, generator=generator, dtype=torch.float64), *scheduler._grid.source[0])
        for t in scheduler.timesteps:
            options = {"eta": 1.0} if sampler == "DDIM" else {}
            x = scheduler.step(flow_network(scheduler, data, x, t), t, x, generator=generator, **options).prev_sample
        mean, variance = moments_of_flow(data, [*scheduler._grid.source, scheduler._grid.target[-1]])
        assert x.mean().item() == pytest.approx(mean, abs=5 * (variance / rows) ** 0.5), process
        assert x.var().item() == pytest.approx(variance, abs=5 * variance * (2 / rows) ** 0.5), process


def moments_of_flow(data, levels):
    """:func:`moments` from exact samples at the first of some levels ``(α, σ)``."""
    sigma_hats = [level.sigma_hat for level in levels]
    return moments(type("Exact", (), {"data": data}), sigma_hats)
