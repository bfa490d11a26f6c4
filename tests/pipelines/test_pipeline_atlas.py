import copy
import threading

import diffusers
import numpy as np
import pytest
import torch
from conftest import build_tiny_pipeline, build_tiny_unet, seeded
from diffusers import AutoencoderKL, EulerDiscreteScheduler
from diffusers.callbacks import SDCFGCutoffCallback
from PIL import Image

from atlas_diffusers import AtlasDDIMScheduler, AtlasDDPMScheduler, AtlasPipeline
from atlas_diffusers.conditioning import tokenize

pytestmark = pytest.mark.usefixtures("float64")


def generate(pipeline, *args, seed=0, **kwargs):
    return pipeline(*args, generator=seeded(seed), output_type="latent", **kwargs).images


class Recorder(torch.nn.Module):
    """Wraps a network; remembers what it was called with."""

    def __init__(self, unet):
        super().__init__()
        self.unet, self.calls = unet, []
        self.config, self.dtype, self.device = unet.config, unet.dtype, unet.device

    def forward(self, sample, t, **kwargs):
        self.calls.append((sample, t, kwargs))
        return self.unet(sample, t, **kwargs)


def test_call_equals_the_sampling_loop_written_out(tiny_pipeline):
    p, w = tiny_pipeline, 3.0
    states = p.text_encoder(tokenize(p.tokenizer, ["red heart"])).last_hidden_state
    empty = p.text_encoder(tokenize(p.tokenizer, [""])).last_hidden_state
    x = torch.randn(1, 3, 8, 8, generator=seeded())
    p.scheduler.set_timesteps(4)
    with torch.no_grad():
        for t in p.scheduler.timesteps:
            conditional, unconditional = p.unet(x, t, states).sample, p.unet(x, t, empty).sample
            prediction = unconditional + w * (conditional - unconditional)
            x = p.scheduler.step(prediction, t, x).prev_sample
    found = generate(p, "red heart", num_inference_steps=4, guidance_scale=w)
    torch.testing.assert_close(found, x)


def test_guidance_is_one_batched_call_and_guidance_one_is_half_of_it(tiny_pipeline):
    tiny_pipeline.unet = Recorder(tiny_pipeline.unet)
    generate(tiny_pipeline, ["red heart", "blue star"], guidance_scale=2.0)
    assert [len(sample) for sample, _, _ in tiny_pipeline.unet.calls] == [4, 4, 4]
    tiny_pipeline.unet.calls.clear()
    generate(tiny_pipeline, ["red heart", "blue star"], guidance_scale=1.0)
    assert [len(sample) for sample, _, _ in tiny_pipeline.unet.calls] == [2, 2, 2]


def test_guidance_interpolates_linearly_between_its_two_predictions(tiny_pipeline):
    one = {w: generate(tiny_pipeline, "red heart", num_inference_steps=1, guidance_scale=w) for w in (1.0, 2.0, 5.0)}
    torch.testing.assert_close(one[5.0] - one[1.0], 4 * (one[2.0] - one[1.0]))


def test_guidance_rescale_gives_the_conditional_standard_deviation():
    scheduler = AtlasDDIMScheduler(prediction_type="sample", timestep_spacing="trailing", clip_sample=False)
    pipeline = build_tiny_pipeline(scheduler=scheduler)
    arguments = {"num_inference_steps": 1}
    conditional = generate(pipeline, "red heart", guidance_scale=1.0, **arguments)
    rescaled = generate(pipeline, "red heart", guidance_scale=6.0, guidance_rescale=1.0, **arguments)
    plain = generate(pipeline, "red heart", guidance_scale=6.0, **arguments)
    torch.testing.assert_close(rescaled.std(), conditional.std())
    torch.testing.assert_close(rescaled / rescaled.std(), plain / plain.std())


def test_one_generator_a_picture_makes_pictures_independent_of_the_batch(tiny_pipeline):
    prompts = ["red heart", "blue star", "green leaf"]
    generators = [seeded(i) for i in range(3)]
    together = tiny_pipeline(prompts, generator=generators, output_type="latent").images
    for i, prompt in enumerate(prompts):
        alone = tiny_pipeline(prompt, generator=[seeded(i)], output_type="latent").images
        torch.testing.assert_close(together[i : i + 1], alone)


def test_order_of_prompts_and_copies(tiny_pipeline):
    noise = torch.randn(1, 3, 8, 8, generator=seeded()).expand(4, -1, -1, -1)
    found = tiny_pipeline(["red heart", "blue star"], num_images_per_prompt=2, latents=noise, output_type="latent").images
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[2], found[3])
    assert (found[1] - found[2]).abs().max() > 1e-3


def test_prompt_embeds_equal_prompts(tiny_pipeline):
    states, negative = tiny_pipeline.encode_prompt("red heart", negative_prompt="blue star")
    by_text = generate(tiny_pipeline, "red heart", negative_prompt="blue star")
    by_state = generate(tiny_pipeline, prompt_embeds=states, negative_prompt_embeds=negative)
    assert torch.equal(by_text, by_state)


def test_without_a_prompt_the_text_is_empty_and_unguided(tiny_pipeline):
    tiny_pipeline.unet = Recorder(tiny_pipeline.unet)
    unprompted = generate(tiny_pipeline, num_images_per_prompt=2, guidance_scale=5.0)
    assert [len(sample) for sample, _, _ in tiny_pipeline.unet.calls] == [2, 2, 2]
    assert torch.equal(unprompted, generate(tiny_pipeline, ["", ""], guidance_scale=1.0))


def test_class_labels_reach_the_network_and_are_guided_by_the_extra_label():
    pipeline = build_tiny_pipeline(unet=Recorder(build_tiny_unet(num_class_embeds=5)), text_encoder=None, tokenizer=None)
    generate(pipeline, class_labels=[3, 1], num_images_per_prompt=2, guidance_scale=2.0)
    assert pipeline.unet.calls[0][2]["class_labels"].tolist() == [5, 5, 5, 5, 3, 3, 1, 1]
    pipeline.unet.calls.clear()
    generate(pipeline, num_images_per_prompt=2)
    assert pipeline.unet.calls[0][2]["class_labels"].tolist() == [5, 5]


def test_output_types_show_the_same_picture(tiny_pipeline):
    images = {k: tiny_pipeline("red heart", generator=seeded(), output_type=k).images for k in ("latent", "pt", "np", "pil")}
    expected = (images["latent"] / 2 + 0.5).clamp(0, 1)
    assert torch.equal(images["pt"], expected)
    np.testing.assert_allclose(images["np"], expected.permute(0, 2, 3, 1).numpy())
    np.testing.assert_array_equal(np.array(images["pil"][0]), (images["np"][0] * 255).round().astype("uint8"))
    assert isinstance(tiny_pipeline("red heart", generator=seeded(), return_dict=False)[0][0], Image.Image)


def test_the_vae_decodes_what_the_network_made():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKL(
            block_out_channels=(4, 8),
            norm_num_groups=2,
            latent_channels=3,
            down_block_types=["DownEncoderBlock2D"] * 2,
            up_block_types=["UpDecoderBlock2D"] * 2,
        ).eval()
    pipeline = build_tiny_pipeline(vae=vae)
    latents = generate(pipeline, "red heart")
    assert latents.shape == (1, 3, 8, 8)
    with torch.no_grad():
        expected = (vae.decode(latents / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
    found = pipeline("red heart", generator=seeded(), output_type="pt").images
    assert found.shape == (1, 3, 16, 16) and torch.equal(found, expected)


@pytest.mark.parametrize("strength, calls", [(1.0, 10), (0.5, 5), (0.57, 5), (0.01, 1)])
def test_image_to_image_starts_from_the_noised_picture(tiny_pipeline, strength, calls):
    tiny_pipeline.unet = Recorder(tiny_pipeline.unet)
    picture = torch.rand(1, 3, 8, 8, generator=seeded(1))
    noise = torch.randn(1, 3, 8, 8, generator=seeded(2))
    tiny_pipeline("red heart", image=picture, latents=noise, strength=strength, num_inference_steps=10, guidance_scale=1)
    assert len(tiny_pipeline.unet.calls) == calls
    sample, t, _ = tiny_pipeline.unet.calls[0]
    torch.testing.assert_close(sample, tiny_pipeline.scheduler.add_noise(picture * 2 - 1, noise, t[None]))


STOCK = ["EulerDiscreteScheduler", "HeunDiscreteScheduler", "UniPCMultistepScheduler", "PNDMScheduler"]


@pytest.mark.parametrize("name", STOCK)
def test_diffusers_schedulers_can_be_swapped_in(tiny_pipeline, name):
    p, noise = tiny_pipeline, torch.randn(1, 3, 8, 8, generator=seeded())
    torch.set_default_dtype(torch.float32)  # in which Diffusers' UniPC solves for its coefficients
    p.scheduler = getattr(diffusers, name).from_config(p.scheduler.config)
    states, _ = p.encode_prompt("red heart", do_classifier_free_guidance=False)
    oracle = getattr(diffusers, name).from_config(p.scheduler.config)
    oracle.set_timesteps(5)
    x = noise * oracle.init_noise_sigma
    with torch.no_grad():
        for t in oracle.timesteps:
            x = oracle.step(p.unet(oracle.scale_model_input(x, t), t, states).sample, t, x).prev_sample
    found = generate(p, "red heart", num_inference_steps=5, guidance_scale=1.0)
    torch.testing.assert_close(found, x)


def test_explicit_timesteps_and_sigmas(tiny_pipeline):
    spaced = generate(tiny_pipeline, "red heart", num_inference_steps=4)
    explicit = generate(tiny_pipeline, "red heart", timesteps=[999, 749, 499, 249])
    torch.testing.assert_close(spaced, explicit)
    generate(tiny_pipeline, "red heart", sigmas=[10.0, 3.0, 1.0, 0.0])
    assert tiny_pipeline.num_timesteps == 3


def test_ddpm_draws_from_the_callers_generator():
    pipeline = build_tiny_pipeline(scheduler=AtlasDDPMScheduler())
    same = [generate(pipeline, "red heart", seed=s) for s in (1, 1, 2)]
    assert torch.equal(same[0], same[1]) and not torch.equal(same[0], same[2])


def test_the_scheduler_of_the_pipeline_is_not_touched(tiny_pipeline):
    tiny_pipeline.scheduler.set_timesteps(7)
    generate(tiny_pipeline, "red heart")
    assert tiny_pipeline.scheduler.num_inference_steps == 7 and tiny_pipeline.scheduler.step_index is None


def test_two_threads_share_a_pipeline(tiny_pipeline):
    tasks = [("red heart", 2.0, 5), ("blue star", 1.0, 9), ("green leaf", 4.0, 7), ("red heart", 1.5, 8)]
    found = {}

    def work(prompt, guidance, steps):
        found[prompt, guidance] = generate(tiny_pipeline, prompt, guidance_scale=guidance, num_inference_steps=steps)

    threads = [threading.Thread(target=work, args=task) for task in tasks]
    [t.start() for t in threads], [t.join() for t in threads]
    for prompt, guidance, steps in tasks:
        alone = generate(tiny_pipeline, prompt, guidance_scale=guidance, num_inference_steps=steps)
        assert torch.equal(found[prompt, guidance], alone)


def test_a_callback_reads_and_replaces_the_sample(tiny_pipeline):
    seen = []

    def callback(pipeline, index, t, tensors):
        seen.append((index, int(t), pipeline.guidance_scale, pipeline.num_timesteps, tuple(tensors)))
        return {"latents": torch.zeros_like(tensors["latents"])} if index == 2 else {}

    found = generate(tiny_pipeline, "red heart", guidance_scale=2.0, callback_on_step_end=callback)
    assert [s[:2] for s in seen] == [(0, 999), (1, 666), (2, 332)]
    assert seen[0][2:] == (2.0, 3, ("latents",)) and not found.any()


def test_a_diffusers_callback_switches_guidance_off(tiny_pipeline):
    tiny_pipeline.unet = Recorder(tiny_pipeline.unet)
    callback = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1)
    generate(tiny_pipeline, "red heart", callback_on_step_end=callback, num_inference_steps=4)
    assert [len(sample) for sample, _, _ in tiny_pipeline.unet.calls] == [2, 2, 1, 1]


def test_a_callback_gets_the_negative_states_first(tiny_pipeline):
    """As Diffusers' pipelines hand them over; what comes back in this order changes nothing."""
    seen = []

    def callback(pipeline, index, t, tensors):
        seen.append(tensors["prompt_embeds"])
        return {"prompt_embeds": tensors["prompt_embeds"].clone()}

    options = {"negative_prompt": "blue star", "guidance_scale": 3.0}
    called = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    found = generate(tiny_pipeline, "red heart", **options, **called)
    states, negative = tiny_pipeline.encode_prompt("red heart", negative_prompt="blue star")
    assert torch.equal(seen[0], torch.cat([negative, states])) and not torch.equal(states, negative)
    torch.testing.assert_close(found, generate(tiny_pipeline, "red heart", **options))


def test_states_of_a_callback_must_fit_the_guidance(tiny_pipeline):
    def halve(pipeline, index, t, tensors):
        return {"prompt_embeds": tensors["prompt_embeds"].chunk(2)[1]}

    inputs = ["latents", "prompt_embeds"]
    with pytest.raises(ValueError, match="a callback gave 1 rows of prompt_embeds; guidance needs 2"):
        generate(tiny_pipeline, "a", callback_on_step_end=halve, callback_on_step_end_tensor_inputs=inputs)


def test_interrupt_stops_after_the_step(tiny_pipeline):
    tiny_pipeline.unet = Recorder(tiny_pipeline.unet)

    def stop(pipeline, index, t, tensors):
        pipeline._interrupt = True
        return tensors

    generate(tiny_pipeline, "red heart", callback_on_step_end=stop)
    assert len(tiny_pipeline.unet.calls) == 1


def test_nan_of_the_network_stops_sampling_with_the_step(tiny_pipeline):
    class Broken(Recorder):
        def forward(self, sample, t, **kwargs):
            (output,) = super().forward(sample, t, **kwargs)
            return (output * float("nan") if len(self.calls) == 2 else output,)

    tiny_pipeline.unet = Broken(tiny_pipeline.unet)
    with pytest.raises(ValueError, match="NaN or infinity at step 2"):
        generate(tiny_pipeline, "red heart", num_inference_steps=5)
    assert len(tiny_pipeline.unet.calls) == 2


BAD_CALLS = [
    ({"prompt": []}, "non-empty list"),
    ({"prompt": 3}, "got 3"),
    ({"prompt": "a", "class_labels": [1]}, "no classes"),
    ({"prompt": ["a", "b"], "negative_prompt": ["a", "b", "c"]}, "3 negative prompts for 2"),
    ({"prompt": "a", "prompt_embeds": torch.zeros(1, 8, 16)}, "not both"),
    ({"prompt": "a", "height": 9}, "height=9 and width=8.*multiples of 2"),
    ({"prompt": "a", "num_inference_steps": 0}, "num_inference_steps=0"),
    ({"prompt": "a", "num_images_per_prompt": 0}, "num_images_per_prompt=0"),
    ({"prompt": "a", "strength": 1.5}, "strength=1.5"),
    ({"prompt": "a", "guidance_scale": float("nan")}, "guidance_scale=nan; expected a finite number"),
    ({"prompt": "a", "guidance_scale": float("inf")}, "guidance_scale=inf; expected a finite number"),
    ({"prompt": "a", "guidance_rescale": 1.5}, r"guidance_rescale=1.5; expected a number in \[0, 1\]"),
    ({"prompt": "a", "generator": [torch.Generator()] * 2}, "2 generators for 1"),
    ({"prompt": "a", "latents": torch.zeros(1, 3, 4, 4)}, r"\(1, 3, 4, 4\); expected \(1, 3, 8, 8\)"),
    ({"prompt": "a", "output_type": "jpeg"}, "'jpeg'.*pil"),
    ({"prompt": "a", "callback_on_step_end_tensor_inputs": ["noise"]}, r"\['noise'\]; allowed"),
    ({"prompt": "a", "timesteps": [5, 3], "sigmas": [1.0, 0.0]}, "timesteps.*sigmas"),
]


@pytest.mark.parametrize("arguments, message", BAD_CALLS, ids=[m for _, m in BAD_CALLS])
def test_bad_input_is_named(tiny_pipeline, arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_pipeline(**arguments)


def test_wrong_number_of_labels_is_named():
    pipeline = build_tiny_pipeline(unet=build_tiny_unet(num_class_embeds=5), text_encoder=None, tokenizer=None)
    with pytest.raises(ValueError, match="0 to 4, got .*7"):
        pipeline(class_labels=[7])
    with pytest.raises(ValueError, match="takes no text"):
        pipeline("red heart", class_labels=[1, 2])


def test_lora_of_unet_and_text_encoder_saves_loads_and_scales(tiny_pipeline, tmp_path):
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    plain = generate(tiny_pipeline, "red heart")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        targets = {"unet": ["to_q", "to_v"], "text_encoder": ["q_proj", "v_proj"]}
        layers = {}
        for name, modules in targets.items():
            component = getattr(tiny_pipeline, name)
            component.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=modules, init_lora_weights=False))
            layers[name] = get_peft_model_state_dict(component)
    adapted = generate(tiny_pipeline, "red heart")
    assert (adapted - plain).abs().max() > 1e-3
    AtlasPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers["unet"], text_encoder_lora_layers=layers["text_encoder"])

    fresh = build_tiny_pipeline()
    with torch.random.fork_rng():
        fresh.load_lora_weights(tmp_path)
    torch.testing.assert_close(generate(fresh, "red heart"), adapted)
    torch.testing.assert_close(generate(fresh, "red heart", cross_attention_kwargs={"scale": 0.0}), plain)
    fresh.unload_lora_weights()
    torch.testing.assert_close(generate(fresh, "red heart"), plain)


def test_from_pipe_shares_the_networks(tiny_pipeline):
    other = AtlasPipeline.from_pipe(tiny_pipeline, scheduler=EulerDiscreteScheduler())
    assert other.unet is tiny_pipeline.unet and isinstance(other.scheduler, EulerDiscreteScheduler)


def test_learned_words_are_read_as_their_vectors():
    """Textual inversion of two vectors: the text encoder is shown both tokens."""
    pipeline = copy.deepcopy(build_tiny_pipeline())
    vectors = torch.randn(2, 16, generator=seeded(4))
    with torch.random.fork_rng():
        pipeline.load_textual_inversion([{"<thing>": vectors}])
    seen = []
    pipeline.text_encoder.get_input_embeddings().register_forward_hook(lambda module, args, output: seen.append(output))
    pipeline.encode_prompt("red <thing>", do_classifier_free_guidance=False)
    rows = seen[0][0]
    assert all((rows - vector).abs().sum(-1).min() < 1e-6 for vector in vectors)


def test_adapters_that_read_pictures_are_refused():
    with pytest.raises(ValueError, match="AtlasPipeline takes no IP-adapter"):
        build_tiny_pipeline().load_ip_adapter("folder")
