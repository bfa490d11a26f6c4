"""Diffusers' flow pipelines, each with every class of ours swapped in as a user does it."""

import functools

import diffusers
import pytest
import torch
from flow_networks import DEVIATION, MEAN
from flow_pipelines import KINDS, Run, build_flow_pipeline, run_flow
from stock_pipelines import STOCK, silence, swap

SAMPLERS = (*STOCK, "AtlasMultistepScheduler")
UNEVEN = ("LTX-Condition", "LTX-Condition, a frame given", "Mochi", "StableAudio3")


@functools.cache
def stock_euler(kind: str) -> Run:
    return run_flow(kind, build_flow_pipeline(kind))


@functools.cache
def ours(kind: str, name: str, times: int = 1) -> Run:
    pipeline = build_flow_pipeline(kind)
    with silence():
        return run_flow(kind, swap(pipeline, name), times)


@pytest.mark.parametrize("kind", KINDS)
def test_the_exact_end_is_what_stock_euler_converges_to(kind):
    """First order: four times the calls leave a quarter of the error, with the clock and the sign of every pipeline right."""
    coarse, fine = stock_euler(kind), run_flow(kind, build_flow_pipeline(kind), times=4)
    assert coarse.calls == 10 and coarse.error > 0.09
    assert 3 < coarse.error / fine.error < 5


@pytest.mark.parametrize("name", ["AtlasDDIMScheduler", "AtlasEulerScheduler"])
@pytest.mark.parametrize("kind", KINDS)
def test_first_order_is_stock_euler(kind, name):
    stock, run = stock_euler(kind), ours(kind, name)
    assert run.calls == stock.calls
    torch.testing.assert_close(run.end, stock.end, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_multistep_solver_leaves_a_tenth_of_the_error(kind):
    """With nodes of its own, which it lays unasked where a pipeline's sigmas are even."""
    pipeline, options = build_flow_pipeline(kind), {"use_angle_nodes": True} if kind in UNEVEN else {}
    with silence():
        run = run_flow(kind, swap(pipeline, "AtlasMultistepScheduler", **options))
    assert run.calls == 10
    assert run.error < 0.1 * stock_euler(kind).error


@pytest.mark.parametrize("kind", UNEVEN)
def test_the_multistep_solver_takes_sigmas_that_are_not_even(kind):
    run, stock = ours(kind, "AtlasMultistepScheduler"), stock_euler(kind)
    assert run.calls == 10
    assert run.error < 0.6 * stock.error


@pytest.mark.parametrize("name", ["AtlasPNDMScheduler", "AtlasHeunScheduler"])
@pytest.mark.parametrize("kind", KINDS)
def test_second_order_is_more_accurate_than_first(kind, name):
    """By how much depends on the last step, which is of first order and long where a pipeline passes its own sigmas."""
    assert ours(kind, name).error < 0.9 * stock_euler(kind).error


@pytest.mark.parametrize("name", ["AtlasDDPMScheduler", "AtlasEulerAncestralScheduler"])
@pytest.mark.parametrize("kind", KINDS)
def test_samplers_that_draw_noise_end_at_the_data(kind, name):
    """
    Forty calls: steps of first order leave the deviation short, by up to 0.13 where levels bunch at the noise; the smallest
    samples have 128 coordinates.
    """
    end = ours(kind, name, times=4).end
    assert abs(end.mean() - MEAN) < 3 * DEVIATION / len(end.flatten()) ** 0.5
    assert -0.2 < end.std() - DEVIATION < 0.1


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("solver", ["UniPCMultistepScheduler", "DPMSolverMultistepScheduler", "DEISMultistepScheduler"])
@pytest.mark.parametrize("kind", ["Wan 2.1", "Wan 2.2", "Sana"])
def test_solvers_that_are_published_with_a_pipeline_are_the_same_flow(kind, solver, name):
    pipeline, expected = build_flow_pipeline(kind), build_flow_pipeline(kind, shift=4.0)
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 4.0}
    pipeline.scheduler = getattr(diffusers, solver)(**flow)
    with silence():
        run = run_flow(kind, swap(pipeline, name))
    torch.testing.assert_close(run.end, run_flow(kind, swap(expected, name)).end)
