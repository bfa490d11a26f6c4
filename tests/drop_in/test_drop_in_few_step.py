"""The few-step solver in stock pipelines; Diffusers has no such class, but a single step is DDIM's."""

import pytest
from stock_pipelines import KINDS, build_stock_pipeline, run, silence, swap

NAME = "AtlasMultistepScheduler"
FROM_NOISE = ["text2img", "xl", "inpaint-9", "controlnet"]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "animatediff"])
def test_every_pipeline_takes_it_without_a_warning(kind):
    with silence():
        pictures = run(kind, swap(build_stock_pipeline(kind), NAME), 5).pictures
    assert pictures.isfinite().all() and pictures.std() > 0


@pytest.mark.parametrize("kind", FROM_NOISE)
def test_one_step_is_that_of_ddim(kind):
    ours = run(kind, swap(build_stock_pipeline(kind), NAME), 1).latents[-1]
    options = {"timestep_spacing": "trailing", "set_alpha_to_one": True}
    ddim = run(kind, swap(build_stock_pipeline(kind), "AtlasDDIMScheduler", **options), 1).latents[-1]
    assert (ours - ddim).abs().max() < 1e-4 * ddim.abs().max()
