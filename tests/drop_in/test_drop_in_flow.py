"""Diffusers' flow pipelines: what the tiny ones measure."""

import pytest
from flow_pipelines import KINDS, build_flow_pipeline, run_flow


@pytest.mark.parametrize("kind", KINDS)
def test_the_exact_end_is_what_stock_euler_converges_to(kind):
    """First order: four times the calls leave a quarter of the error, with the clock and the sign of every pipeline right."""
    pipeline = build_flow_pipeline(kind)
    coarse, fine = run_flow(kind, pipeline), run_flow(kind, pipeline, times=4)
    assert coarse.calls == 10 and coarse.error > 0.09
    assert 3 < coarse.error / fine.error < 5
