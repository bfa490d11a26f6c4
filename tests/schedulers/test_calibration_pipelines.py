"""Any pipeline is calibrated by its own call: tables are those of its bare network, and calls end where the report says."""

import functools

import diffusers
import pytest
import torch
from conftest import build_tiny_pipeline, seeded
from flow_networks import exact_end, exact_velocity
from flow_pipelines import KINDS as FLOWS
from flow_pipelines import build_flow_pipeline
from stock_pipelines import STABLE_DIFFUSION, WIDTH, build_stock_pipeline, deterministic

from atlas_diffusers import AtlasMultistepScheduler
from atlas_diffusers.schedulers.calibration.fit import follow
from atlas_diffusers.schedulers.calibration.model import FunctionModel
from atlas_diffusers.schedulers.calibration.pipeline import PipelineModel
from atlas_diffusers.schedulers.calibration.teacher import Trajectories, run_teacher, teacher_sigmas

SMALL = {"num_trajectories": 9, "teacher_steps": 8, "budget": 9 * 24, "batch_size": 9, "progress": False}
SIZES = {"height": 64, "width": 64}
quiet = pytest.mark.filterwarnings("ignore:.*calibration gives")


@deterministic
def build_pixart_network():
    options = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8, "patch_size": 2, "norm_num_groups": 1}
    network = diffusers.PixArtTransformer2DModel(
        sample_size=8, in_channels=4, out_channels=8, cross_attention_dim=16, caption_channels=WIDTH, **options
    )
    for weights in (network.proj_out.weight, network.scale_shift_table):  # where nothing is trained, these are zero
        torch.nn.init.normal_(weights, std=0.2)
    return network.eval()


def build_pixart():
    scheduler = diffusers.DDIMScheduler.from_config(STABLE_DIFFUSION)
    vae = build_stock_pipeline("text2img").vae
    parts = {"tokenizer": None, "text_encoder": None, "transformer": build_pixart_network()}
    return diffusers.PixArtAlphaPipeline(vae=vae, scheduler=scheduler, **parts)


def embeddings(*shape, seed=1):
    return torch.randn(1, *shape, generator=seeded(seed))


def guided(network, sample, w, **conditions):
    """``m_∅ + w (m_c − m_∅)`` in one batch; conditions are the unconditional and the conditional one."""
    count = len(sample)
    both = {name: torch.cat([part.expand(count, *part.shape[1:]) for part in pair]) for name, pair in conditions.items()}
    unconditional, conditional = network(torch.cat([sample] * 2), both).chunk(2)
    return unconditional + w * (conditional - unconditional)


def stable_diffusion():
    pipeline = build_stock_pipeline("text2img")
    negative, positive = embeddings(77, WIDTH, seed=2), embeddings(77, WIDTH)
    call = {"prompt_embeds": positive, "negative_prompt_embeds": negative, "guidance_scale": 3.0, **SIZES}

    def function(x, t):
        def network(both, conditions):
            return pipeline.unet(both, t, encoder_hidden_states=conditions["states"])[0]

        return guided(network, x, 3.0, states=(negative, positive))

    return pipeline, call, function


def stable_diffusion_xl():
    pipeline = build_stock_pipeline("xl")
    states = embeddings(77, 2 * WIDTH, seed=2), embeddings(77, 2 * WIDTH)
    pooled = embeddings(WIDTH), embeddings(WIDTH, seed=2)
    call = {
        "prompt_embeds": states[1], "negative_prompt_embeds": states[0], "pooled_prompt_embeds": pooled[1],
        "negative_pooled_prompt_embeds": pooled[0], "guidance_scale": 5.0, **SIZES,
    }  # fmt: skip

    def function(x, t):
        def network(both, conditions):
            sizes = torch.tensor([[64.0, 64, 0, 0, 64, 64]]).expand(len(both), 6)
            added = {"text_embeds": conditions["pooled"], "time_ids": sizes}
            return pipeline.unet(both, t, encoder_hidden_states=conditions["states"], added_cond_kwargs=added)[0]

        return guided(network, x, 5.0, states=states, pooled=pooled)

    return pipeline, call, function


def pixart():
    pipeline, states = build_pixart(), (embeddings(5, WIDTH, seed=2), embeddings(5, WIDTH))
    masks = torch.ones(1, 5), torch.tensor([[1.0, 1, 1, 0, 0]])
    call = {
        "prompt_embeds": states[1], "prompt_attention_mask": masks[1], "negative_prompt_embeds": states[0],
        "negative_prompt_attention_mask": masks[0], "negative_prompt": None, "guidance_scale": 2.0,
        "use_resolution_binning": False, **SIZES,
    }  # fmt: skip

    def function(x, t):
        def network(both, conditions):
            return pipeline.transformer(
                both, timestep=t.expand(len(both)), encoder_hidden_states=conditions["states"],
                encoder_attention_mask=conditions["mask"], added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            )[0].chunk(2, dim=1)[0]  # fmt: skip

        return guided(network, x, 2.0, states=states, mask=masks)

    return pipeline, call, function


def atlas():
    pipeline = build_tiny_pipeline()
    states, negative = pipeline.encode_prompt(["red heart"], torch.device("cpu"), 1, True)[:2]

    def function(x, t):
        def network(both, conditions):
            return pipeline.unet(both, t, encoder_hidden_states=conditions["states"], return_dict=False)[0]

        return guided(network, x, 2.0, states=(negative, states))

    return pipeline, {"prompt": "red heart", "guidance_scale": 2.0}, function


KINDS = {"SD 1.5": stable_diffusion, "SDXL": stable_diffusion_xl, "PixArt": pixart, "AtlasPipeline": atlas}


def tables(scheduler):
    """All numbers of its tables."""
    stored = scheduler.config.calibration["tables"].values()
    rows = (row for table in stored for row in (table["sigmas"], table["scales"], *table["weights"], [table["start"]]))
    return torch.tensor([number for row in rows for number in row], dtype=torch.float64)


@quiet
@pytest.mark.parametrize("kind", KINDS)
def test_the_tables_are_those_of_the_bare_network(kind):
    pipeline, call, function = KINDS[kind]()
    before, config = pipeline.scheduler, dict(pipeline.config)
    found = AtlasMultistepScheduler.calibrate(pipeline, (3,), call=call, generator=seeded(0), **SMALL)
    assert pipeline.scheduler is before and dict(pipeline.config) == config and "encode_prompt" not in vars(pipeline)
    shape = (pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer).config.in_channels, 8, 8
    expected = AtlasMultistepScheduler.calibrate(
        function, (3,), config=before.config, sample_shape=shape, generator=seeded(0), **SMALL
    )
    report, bare = found.calibration_report, expected.calibration_report
    assert report.network_calls == bare.network_calls + 2 * 9  # rehearsals
    assert report.steps[3].uncalibrated == pytest.approx(bare.steps[3].uncalibrated, rel=1e-5)
    assert report.steps[3].calibrated == pytest.approx(bare.steps[3].calibrated, rel=1e-5)
    assert found.config.calibration["tables"].keys() == expected.config.calibration["tables"].keys()
    torch.testing.assert_close(tables(found), tables(expected), rtol=1e-5, atol=1e-5)
    assert found.config.calibration["guidance_scale"] == call["guidance_scale"]


@quiet
@pytest.mark.parametrize("kind", ["SD3", "Flux", "Wan 2.1"])
def test_the_tables_of_a_flow_are_those_of_its_bare_network(kind):
    pipeline, call = build_flow_pipeline(kind), FLOWS[kind].inputs()
    config = pipeline.scheduler.config
    found = AtlasMultistepScheduler.calibrate(pipeline, (3,), call=call, generator=seeded(0), **SMALL)
    seeds = torch.randint(2**62, (9,), generator=seeded(0)).tolist()
    model = PipelineModel(pipeline, AtlasMultistepScheduler.from_config(config), call, seeds, 9, 3)
    table = found._calibration.table(3)
    assert table is not None and table.start == 1 and table.sigmas[0] == 1e6  # such pipelines do not scale their noise
    noise = model.march([1e6], lambda n, x, v: x)
    bare = FunctionModel(lambda x, t: exact_velocity(x, t / 1000), model.scheduler, model.shape, seeds, 9, "cpu")
    bare.noise = noise
    teacher = run_teacher(bare, teacher_sigmas(model.scheduler.process.ends[1].sigma_hat, bare.top, 8))
    for own, other in ((run_teacher(model, teacher.sigmas).ends, teacher.ends), (follow(model, teacher, table).way.ends, None)):
        other = follow(bare, teacher, table).way.ends if other is None else other
        torch.testing.assert_close(own, other, rtol=0, atol=1e-4)
    pipeline.scheduler = found
    rows = {key: torch.cat([value] * 9) if torch.is_tensor(value) else value for key, value in call.items()}
    generators = [seeded(seed) for seed in seeds]
    ends = pipeline(**rows, num_inference_steps=3, generator=generators, output_type="latent")[0]
    torch.testing.assert_close(ends.flatten(1), follow(bare, teacher, table).way.ends, rtol=0, atol=1e-3)
    assert (ends.flatten(1) - exact_end(noise, 1.0)).square().mean().sqrt() < 0.02


@quiet
def test_batches_walk_together():
    """Tables do not depend on how many trajectories go through the network at once, nor a guidance that needs all texts."""
    pipeline, call, _ = stable_diffusion()
    whole, parts = (
        AtlasMultistepScheduler.calibrate(pipeline, (3,), call=call, generator=seeded(0), **{**SMALL, "batch_size": size})
        for size in (9, 4)
    )
    torch.testing.assert_close(tables(whole), tables(parts), rtol=0, atol=1e-3)


@quiet
def test_texts_are_taken_in_turn_and_encoded_once():
    pipeline, encoded = build_stock_pipeline("text2img"), []
    encode = pipeline.text_encoder.forward

    @functools.wraps(encode)
    def watched(ids, *args, **kwargs):
        encoded.append(ids.tolist())
        return encode(ids, *args, **kwargs)

    pipeline.text_encoder.forward = watched
    try:
        call = {"prompt": ["a red heart", "a blue star"], "negative_prompt": "blurry", "guidance_scale": 2.0, **SIZES}
        AtlasMultistepScheduler.calibrate(pipeline, (3,), call=call, generator=seeded(0), **{**SMALL, "batch_size": 3})
    finally:
        del pipeline.text_encoder.forward
    # batches that begin with the first text and with the second, and one of a single trajectory, each with the negative text
    assert [len(set(map(tuple, ids))) for ids in encoded] == [2, 1, 2, 1, 1, 1]


@quiet
@pytest.mark.parametrize("kind", ["img2img", "AtlasPipeline"])
def test_image_to_image_has_tables_for_its_strength(kind):
    """A call with the tables goes where the calibration went with them, from the level where an even grid starts."""
    pipeline = build_stock_pipeline("img2img") if kind == "img2img" else build_tiny_pipeline()
    size = 64 if kind == "img2img" else 8
    picture = torch.linspace(0, 1, 3 * size * size).view(1, 3, size, size)
    call = {"prompt": "a red heart", "image": picture, "strength": 0.6, "guidance_scale": 1.0}
    even = [pipeline.scheduler.alphas_cumprod[401 if kind == "img2img" else 599].item()]
    options = {**SMALL, "teacher_steps": 12, "budget": 9 * 48}
    scheduler = AtlasMultistepScheduler.calibrate(pipeline, (5,), call=call, generator=seeded(0), **options)
    assert list(scheduler.config.calibration["tables"]) == ["5 from 2"]
    table = scheduler._calibration.table(5, 2)
    assert [1 / (1 + sigma**2) for sigma in table.sigmas[:1]] == pytest.approx(even, rel=1e-4) and table.start == 1
    seeds = torch.randint(2**62, (9,), generator=seeded(0)).tolist()
    model = PipelineModel(pipeline, AtlasMultistepScheduler.from_config(scheduler.config), call, seeds, 9, 5)
    teacher = Trajectories(table.sigmas, *(torch.zeros(9, 1) for _ in range(3)))
    expected = follow(model, teacher, table).way.ends
    pipeline.scheduler = scheduler
    prompts, generators = {"prompt": ["a red heart"] * 9}, [seeded(seed) for seed in seeds]
    found = pipeline(**{**call, **prompts}, num_inference_steps=5, generator=generators, output_type="latent")[0]
    torch.testing.assert_close(found.flatten(1), expected, rtol=0, atol=1e-3)


@quiet
@pytest.mark.parametrize("kind", ["SD3 img2img", "Flux img2img", "SD3 inpaint", "Flux inpaint"])
def test_a_flow_has_tables_for_its_strength_and_mask(kind):
    """They begin where the pipeline begins, 0.75 of five steps being four, and go where the calibration went with them."""
    pipeline, call = build_flow_pipeline(kind), FLOWS[kind].inputs()
    run = {"num_inference_steps": 5, "output_type": "latent"}
    pipeline(**call, **run, generator=seeded(0))
    first = pipeline.scheduler.sigmas[1].item()
    options = {**SMALL, "teacher_steps": 12, "budget": 9 * 48}
    found = AtlasMultistepScheduler.calibrate(pipeline, (5,), call=call, generator=seeded(0), **options)
    assert list(found.config.calibration["tables"]) == ["5 from 1"]
    table, report = found._calibration.table(5, 1), found.calibration_report.steps[5]
    assert table.sigmas[0] / (1 + table.sigmas[0]) == pytest.approx(first, rel=1e-4) and table.start == 1
    assert report.calibrated < 0.5 * report.uncalibrated
    seeds = torch.randint(2**62, (9,), generator=seeded(0)).tolist()
    model = PipelineModel(pipeline, AtlasMultistepScheduler.from_config(found.config), call, seeds, 9, 5)
    expected = follow(model, Trajectories(table.sigmas, *(torch.zeros(9, 1) for _ in range(3))), table).way.ends
    pipeline.scheduler = found
    rows = {key: torch.cat([value] * 9) if torch.is_tensor(value) else value for key, value in call.items()}
    rows |= {key: [call[key]] * 9 for key in ("image", "mask_image") if key in call}
    ends = pipeline(**rows, **run, generator=[seeded(seed) for seed in seeds])[0]
    expected, half = expected.view_as(ends), ends.shape[-2] // 2
    if "mask_image" in call:  # after the last step, the pipeline puts back the half that the mask keeps
        ends, expected = ends[..., half:, :], expected[..., half:, :]
    torch.testing.assert_close(ends, expected, rtol=0, atol=1e-3)


class Fixed(diffusers.DiffusionPipeline):
    """Calls its network without asking anybody for noise."""

    def __init__(self, scheduler):
        super().__init__()
        self.register_modules(scheduler=scheduler)

    def __call__(self, num_inference_steps=3):
        return None


class Restless(Fixed):
    def __call__(self, num_inference_steps=3, batch_size=1, generator=None):
        self.scheduler.set_timesteps(num_inference_steps)
        self.times = getattr(self, "times", 0) + 1
        x = torch.full((batch_size, 2), float(self.times))
        for t in self.scheduler.timesteps:
            x = self.scheduler.step(x, t, x).prev_sample


class Hasty(Restless):
    """Leaves out the last step."""

    def __call__(self, num_inference_steps=3, batch_size=1, generator=None):
        self.scheduler.set_timesteps(num_inference_steps)
        x = torch.ones(batch_size, 2)
        for t in self.scheduler.timesteps[: max(1, num_inference_steps - 1)]:
            x = self.scheduler.step(x, t, x).prev_sample


@pytest.mark.parametrize("cls, message", [
    (Fixed, "Fixed takes no generator, so its start noise varies; calibrate a function f"),
    (Restless, "Restless starts from other noise when it is called again; calibrate a function f"),
    (Hasty, "Hasty made only 7 network calls; calibrate a function f"),
])  # fmt: skip
def test_a_pipeline_that_cannot_be_driven_says_so(cls, message):
    pipeline = cls(diffusers.DDIMScheduler())
    scheduler = pipeline.scheduler
    with pytest.raises(ValueError, match=message):
        AtlasMultistepScheduler.calibrate(pipeline, (3,), **SMALL)
    assert pipeline.scheduler is scheduler


@pytest.mark.parametrize("call, message", [
    ({"generator": 0}, r"call has \['generator'\], which a calibration sets itself"),
    ({"num_images_per_prompt": 4}, r"call has \['num_images_per_prompt'\], which"),
    ({"colour": 1}, r"call has \['colour'\], which AtlasPipeline does not take"),
    ({"prompt": "red heart", "image": torch.zeros(1, 3, 8, 8), "strength": 0.4}, "the call leaves 1 of 3 steps"),
])  # fmt: skip
def test_calls_that_cannot_be_calibrated_are_named(call, message, tiny_pipeline):
    with pytest.raises(ValueError, match=message):
        AtlasMultistepScheduler.calibrate(tiny_pipeline, (3,), call=call, **SMALL)


def test_an_interrupt_leaves_the_pipeline_as_it_was(tiny_pipeline):
    scheduler, forward, calls = tiny_pipeline.scheduler, tiny_pipeline.unet.forward, []

    @functools.wraps(forward)
    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) > 12:
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    tiny_pipeline.unet.forward = interrupted
    with pytest.raises(KeyboardInterrupt):
        AtlasMultistepScheduler.calibrate(tiny_pipeline, (3,), **{**SMALL, "batch_size": 4})
    assert tiny_pipeline.scheduler is scheduler and len(calls) == 13
