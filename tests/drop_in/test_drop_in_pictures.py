"""Every sampler takes the place of a Diffusers scheduler in Diffusers' own pipelines, in silence, with the same pictures."""

import copy

import diffusers
import pytest
import torch
from conftest import seeded
from stock_pipelines import KINDS, STABLE_DIFFUSION, STOCK, build_stock_pipeline, run, silence, swap

import atlas_diffusers
from atlas_diffusers import BaseNoiseScheduler

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # Diffusers with numpy 2
SAMPLERS = pytest.mark.parametrize("name", STOCK)
# The network turns one float32 rounding of its input into 2e-6 of the latents (guidance 5); measured are at most 2.7e-6,
# and 1.2e-5 in the pictures.
LATENTS, PICTURES = 5e-6, 5e-5


def swap_stock(pipeline, name: str, **changes):
    """The pipeline with the scheduler of Diffusers that ``name`` reproduces, or ``None``."""
    config, cls = pipeline.scheduler.config, getattr(atlas_diffusers, name)
    if name in STOCK:
        pipeline.scheduler = getattr(diffusers, STOCK[name]).from_config(config, **changes)
    elif issubclass(cls, BaseNoiseScheduler):
        betas = cls.from_config(config, **changes).betas.tolist()
        pipeline.scheduler = diffusers.DDPMScheduler.from_config(config, trained_betas=betas, **changes)
    else:
        return None
    return pipeline


def lost_digits(scheduler) -> float:
    """
    Relative error of float32 in Diffusers' sigma types, in proportion to σ̂/σ̂': their Heun takes (x − (x − σ̂'ε))/σ̂' for
    ε, and near zero SNR x + (σ̂' − σ̂)d is the small rest of large terms. Ours have neither, and are within 4e-7 of float64.
    """
    if not isinstance(getattr(scheduler, "sigmas", None), torch.Tensor):
        return 0.0
    levels = scheduler.sigmas[scheduler.sigmas > 0].unique()
    return torch.finfo(torch.float32).eps * max((levels[1:] / levels[:-1]).tolist(), default=0.0)


def assert_same(actual, expected, latents: float = LATENTS, pictures: float = PICTURES):
    assert actual.latents.shape == expected.latents.shape
    size = expected.latents.flatten(1).abs().amax(1).clamp(min=1)
    error = ((actual.latents - expected.latents).flatten(1).abs().amax(1) / size).tolist()
    assert max(error) < latents, f"relative error of the latents, call by call: {error}"
    torch.testing.assert_close(actual.pictures, expected.pictures, rtol=0, atol=pictures)


def assert_silent(kind: str, name: str, steps: int, swaps=None, **options):
    """The run after a swap, neither of which may warn."""
    pipeline = build_stock_pipeline(kind)
    with silence():
        result = run(kind, swap(pipeline, name, **swaps or {}), steps, **options)
    assert type(pipeline.scheduler).__name__ == name
    assert result.pictures.isfinite().all() and result.pictures.std() > 0.05
    return result


def assert_drop_in(kind: str, name: str, steps: int, swaps=None, **options):
    """The swap and the pictures are silent, and the pictures are those of Diffusers' scheduler where there is one."""
    actual = assert_silent(kind, name, steps, swaps, **options)
    stock = swap_stock(build_stock_pipeline(kind), name, **swaps or {})
    if stock is not None:
        expected = run(kind, stock, steps, **options)
        assert_same(actual, expected, LATENTS + lost_digits(stock.scheduler))


# ------------------------------------------------------------------ every class, every pipeline


@pytest.mark.parametrize("name", atlas_diffusers.SCHEDULERS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_class_in_every_pipeline(kind, name):
    """Those with a beta schedule of their own are Diffusers' DDPM with the same betas; two pipelines show it."""
    if name in STOCK or kind in ("text2img", "img2img"):
        assert_drop_in(kind, name, steps=4 if "PNDM" in name else 3)
    else:
        assert_silent(kind, name, steps=2)


@pytest.mark.parametrize("kind", KINDS)
def test_the_smallest_mistake_shows(kind):
    """Timesteps that are off by one change latents and pictures far beyond the tolerances."""

    right, wrong = (
        run(kind, swap(build_stock_pipeline(kind), "AtlasDDIMScheduler", timestep_spacing="leading", steps_offset=offset), 2)
        for offset in (1, 2)
    )
    latents = (right.latents - wrong.latents).abs().max() / right.latents.abs().max().clamp(min=1)
    assert latents > 20 * LATENTS and (right.pictures - wrong.pictures).abs().max() > 20 * PICTURES


# ------------------------------------------------------------------ options of schedulers and pipelines


@SAMPLERS
@pytest.mark.parametrize("kind, steps", [("text2img", 2), ("text2img", 6), ("img2img", 5)])
def test_number_of_steps(kind, steps, name):
    assert_drop_in(kind, name, steps)


@SAMPLERS
def test_one_step(name):
    """With the default spacing of its sigma types, Diffusers' single step is at t = 0."""
    assert_drop_in("text2img", name, 1, {"timestep_spacing": "trailing"})


@SAMPLERS
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_predictions_and_spacings(prediction_type, spacing, name):
    assert_drop_in("text2img", name, 3, {"prediction_type": prediction_type, "timestep_spacing": spacing})


@pytest.mark.parametrize("grid", ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"])
@pytest.mark.parametrize("name", ["AtlasEulerScheduler", "AtlasHeunScheduler"])
def test_sigma_grids(name, grid):
    assert_drop_in("text2img", name, 3, {grid: True})


@SAMPLERS
def test_after_the_saved_config_of_dpm_solver(name, tmp_path):
    """The default of many published pipelines; their files say variance_type: null."""
    dpm = diffusers.DPMSolverMultistepScheduler.from_config(STABLE_DIFFUSION)
    dpm.save_pretrained(tmp_path)
    pipelines = [KINDS["text2img"].build(diffusers.DPMSolverMultistepScheduler.from_pretrained(tmp_path)) for _ in range(2)]
    with silence():
        actual = run("text2img", swap(pipelines[0], name), 3)
    stock = swap_stock(pipelines[1], name)
    assert_same(actual, run("text2img", stock, 3), LATENTS + lost_digits(stock.scheduler))


def assert_same_in_float64(kind: str, name: str, **config):
    """
    Our run of three steps and Diffusers', with networks and ᾱ in float64: what remains is the rounding of Diffusers' float32
    σ̂, times σ̂/σ̂', which is 1400 for zero terminal SNR. The autoencoder makes up to ten times as much of it.
    """
    pipeline = copy.deepcopy(build_stock_pipeline(kind, **config)).to(torch.float64)
    original = pipeline.scheduler
    actual = run(kind, swap(pipeline, name), 3)
    assert actual.latents.dtype == torch.float64
    pipeline.scheduler = original
    stock = swap_stock(pipeline, name).scheduler
    stock.alphas_cumprod = stock.alphas_cumprod.double()
    expected = run(kind, pipeline, 3)
    bound = 5e-7 + lost_digits(stock)
    assert_same(actual, expected, latents=bound, pictures=10 * bound)


@SAMPLERS
def test_in_float64_only_the_rounding_of_their_sigmas_remains(name):
    assert_same_in_float64("text2img", name)


@pytest.mark.parametrize(
    "name", ["AtlasDDIMScheduler", "AtlasDDPMScheduler", "AtlasEulerScheduler", "AtlasEulerAncestralScheduler"]
)
def test_zero_terminal_snr(name):
    """The samplers that know it in Diffusers; in float32 its two Euler methods are off by 1e-4."""
    config = {"prediction_type": "v_prediction", "timestep_spacing": "trailing", "rescale_betas_zero_snr": True}
    assert_same_in_float64("xl", name, **config)
    with silence():
        single = run("xl", swap(build_stock_pipeline("xl", **config), name), 3)
    assert single.pictures.isfinite().all()


@SAMPLERS
def test_two_pictures_with_a_generator_each_and_no_guidance(name):
    prompts = {"prompt": ["a red heart", "a blue star"], "negative_prompt": None, "guidance_scale": 1.0}
    generators = [seeded(5), seeded(6)], [seeded(5), seeded(6)]
    pipelines = swap(build_stock_pipeline("text2img"), name), swap_stock(build_stock_pipeline("text2img"), name)
    ours, stock = (run("text2img", p, 3, generator=g, **prompts) for p, g in zip(pipelines, generators))
    assert_same(ours, stock)
    double = copy.deepcopy(pipelines[0]).to(torch.float64)
    both = run("text2img", double, 3, generator=[seeded(5), seeded(6)], **prompts)
    alone = run("text2img", double, 3, generator=seeded(6), **{**prompts, "prompt": "a blue star"})
    torch.testing.assert_close(both.pictures[1:], alone.pictures)


@pytest.mark.parametrize(
    "name, grid",
    [
        ("AtlasDDPMScheduler", {"timesteps": [999, 640, 233, 24]}),
        ("AtlasEulerScheduler", {"timesteps": [999, 640, 233, 24]}),
        ("AtlasHeunScheduler", {"timesteps": [999, 640, 233, 24]}),
        ("AtlasEulerScheduler", {"sigmas": [14.615, 3.861, 0.963, 0.152, 0.0]}),
    ],
)
@pytest.mark.parametrize("kind", ["text2img", "xl"])
def test_steps_chosen_in_the_call(kind, name, grid):
    pipelines = swap(build_stock_pipeline(kind), name), swap_stock(build_stock_pipeline(kind), name)
    ours, stock = (run(kind, p, None, generator=seeded(3), **grid) for p in pipelines)
    assert_same(ours, stock)


def test_pipelines_hand_eta_to_ddim():
    assert_drop_in("text2img", "AtlasDDIMScheduler", 3, eta=1.0)


@SAMPLERS
def test_xl_stops_early_for_a_refiner(name):
    assert_drop_in("xl", name, 5, denoising_end=0.6, guidance_rescale=0.7)


# ------------------------------------------------------------------ state and other ways in


@SAMPLERS
def test_a_pipeline_can_be_called_again(name):
    """Also with other steps, and after a call that was interrupted between the two halves of a step."""
    pipeline = swap(build_stock_pipeline("text2img"), name)
    expected = run("text2img", pipeline, 4).pictures

    def stop(pipeline, index, timestep, tensors):
        pipeline._interrupt = True
        return {}

    sizes = {"height": 64, "width": 64, "output_type": "latent"}
    pipeline("another", num_inference_steps=5, callback_on_step_end=stop, generator=seeded(), **sizes)
    assert torch.equal(run("text2img", pipeline, 4).pictures, expected)


def test_there_and_back_makes_the_same_picture():
    """A stock pipeline, given one of our schedulers and then its own class again, is what it was."""
    changes = {"prediction_type": "v_prediction", "timestep_spacing": "trailing"}
    expected = run("text2img", build_stock_pipeline("text2img", **changes), 3)
    for name in STOCK:
        pipeline = build_stock_pipeline("text2img", **changes)
        with silence():
            swap(pipeline, name)
            pipeline.scheduler = diffusers.PNDMScheduler.from_config(pipeline.scheduler.config)
        assert torch.equal(run("text2img", pipeline, 3).pictures, expected.pictures), name


@SAMPLERS
def test_a_pipeline_is_built_with_it(name):
    """The constructor sets steps_offset=1 and clip_sample=False in the config of a scheduler that it is given."""
    cls = getattr(atlas_diffusers, name)
    with pytest.warns(FutureWarning, match="steps_offset|clip_sample"):
        pipeline = KINDS["text2img"].build(cls(clip_sample=True, timestep_spacing="leading"))
    with silence():
        expected = KINDS["text2img"].build(cls(clip_sample=False, steps_offset=1, timestep_spacing="leading"))
    assert torch.equal(run("text2img", pipeline, 2).pictures, run("text2img", expected, 2).pictures)


def test_a_swap_never_clips_latents_unasked():
    """Diffusers' DDIM and DDPM come back to their default clip_sample=True when swapped in; latents exceed 1."""
    with pytest.warns(FutureWarning, match="steps_offset"):
        pipeline = KINDS["text2img"].build(diffusers.PNDMScheduler())
    for name in atlas_diffusers.SCHEDULERS:
        swap(pipeline, name)
        assert not pipeline.scheduler.config.clip_sample, name


@SAMPLERS
def test_another_pipeline_takes_it_over(name):
    """``from_pipe`` keeps our class, and image-to-image goes on with it."""
    text2img = swap(build_stock_pipeline("text2img"), name)
    with silence():
        pipeline = diffusers.AutoPipelineForImage2Image.from_pipe(text2img)
    assert isinstance(pipeline, diffusers.StableDiffusionImg2ImgPipeline)
    assert type(pipeline.scheduler) is type(text2img.scheduler)
    direct = swap(build_stock_pipeline("img2img"), name)
    assert torch.equal(run("img2img", pipeline, 3).pictures, run("img2img", direct, 3).pictures)
