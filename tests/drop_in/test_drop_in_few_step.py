"""The few-step solver in stock pipelines. Diffusers has no such class: the formula is written out, and one step is DDIM's."""

import numpy as np
import pytest
import torch
from stock_pipelines import KINDS, build_stock_pipeline, run, silence, swap

NAME = "AtlasMultistepScheduler"
FROM_NOISE = ["text2img", "xl", "inpaint-9", "controlnet"]


def quadratic_weights(angles, target):
    """Integrals, from the last angle to ``target``, of the Lagrange polynomials of the last three angles."""
    angles, weights = angles[-3:], []
    for j, here in enumerate(angles):
        others = [angle for k, angle in enumerate(angles) if k != j]
        polynomial = np.poly1d(others, True) / np.prod([here - other for other in others])
        weights.append(polynomial.integ()(target) - polynomial.integ()(angles[-1]))
    return weights


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "animatediff"])
def test_every_pipeline_follows_the_formula_without_a_warning(kind):
    """Written out from the network's ε at every step, for images as start as well."""
    pipeline, calls = swap(build_stock_pipeline(kind), NAME), []
    step = pipeline.scheduler.step

    def watched(noise, t, x, **options):
        result = step(noise, t, x, **options)
        calls.append((float(t), noise.double(), x.double(), result[0].double()))
        return result

    pipeline.scheduler.step = watched
    with silence():
        run(kind, pipeline, 5)
    assert len(calls) >= 3
    alpha_bar = pipeline.scheduler.alphas_cumprod.double()
    log_sigmas = ((1 - alpha_bar) / alpha_bar).sqrt().log().numpy()
    sigmas = np.array([np.exp(np.interp(t, np.arange(1000), log_sigmas)) for t, *_ in calls] + [0.0])
    c = 3 * np.exp(log_sigmas[500] / 2)
    alphas, angles = 1 / np.sqrt(1 + sigmas**2), np.arctan(sigmas / c)
    radii = np.sqrt((alphas * sigmas) ** 2 + (c * alphas) ** 2)
    velocities = []
    for (_, noise, x, _), alpha, sigma, angle in zip(calls, alphas, sigmas, angles):
        velocities.append(np.cos(angle) * noise - np.sin(angle) * (x / alpha - sigma * noise) / c)
    for n, (_, _, x, found) in enumerate(calls):
        weights = quadratic_weights(angles[: n + 1], angles[n + 1])
        moved = x / radii[n] + sum(w * v for w, v in zip(weights, velocities[: n + 1][-3:]))
        expected = moved * radii[n + 1]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("kind", FROM_NOISE)
def test_one_step_is_that_of_ddim(kind):
    ours = run(kind, swap(build_stock_pipeline(kind), NAME), 1).latents[-1]
    options = {"timestep_spacing": "trailing", "set_alpha_to_one": True}
    ddim = run(kind, swap(build_stock_pipeline(kind), "AtlasDDIMScheduler", **options), 1).latents[-1]
    assert (ours - ddim).abs().max() < 1e-4 * ddim.abs().max()
