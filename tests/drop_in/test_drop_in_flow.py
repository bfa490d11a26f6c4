"""Diffusers' flow pipelines, each with every class of ours swapped in as a user does it."""

import functools

import pytest
import torch
from flow_networks import DEVIATION, MEAN
from flow_pipelines import KINDS, Run, build_flow_pipeline, run_flow
from stock_pipelines import silence, swap


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
