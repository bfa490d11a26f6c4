"""Threads that share a pipeline get the pictures that each gets alone, and a call leaves nothing behind."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import build_tiny_pipeline, seeded

from atlas_diffusers.conditioning import tokenize
from atlas_diffusers.conditioning.clip import TOKENIZING


def generate(pipeline, prompt="red heart", seed=0, **options):
    return pipeline(prompt, generator=seeded(seed), output_type="latent", **options).images


def adapted_pipeline():
    """A pipeline with LoRA layers in both networks."""
    from peft import LoraConfig

    pipeline = build_tiny_pipeline()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for name, targets in {"unet": ["to_q", "to_v"], "text_encoder": ["q_proj", "v_proj"]}.items():
            config = LoraConfig(r=2, lora_alpha=0.7, target_modules=targets, init_lora_weights=False)
            getattr(pipeline, name).add_adapter(config)
    return pipeline


def scalings(pipeline):
    modules = [*pipeline.unet.modules(), *pipeline.text_encoder.modules()]
    return [dict(module.scaling) for module in modules if hasattr(module, "scale_layer")]


def test_a_tokenizer_is_one_threads_at_a_time(tiny_pipeline, monkeypatch):
    """A fast tokenizer keeps padding and truncation as state, which another thread would change before it is read."""
    tokenizer, texts = tiny_pipeline.tokenizer, ["red", "red heart and blue star and green leaf"]
    expected, shorter = tokenize(tokenizer, texts), tokenize(tokenizer, texts, 5)
    found, prepare = [], type(tokenizer).set_truncation_and_padding
    other = threading.Thread(target=lambda: found.append(tokenize(tokenizer, texts, 5)))

    def interrupted(self, *args, **kwargs):
        prepare(self, *args, **kwargs)
        if other.ident is None:
            other.start()
            other.join(0.2)

    monkeypatch.setattr(type(tokenizer), "set_truncation_and_padding", interrupted)
    assert torch.equal(tokenize(tokenizer, texts), expected)
    other.join()
    assert torch.equal(found[0], shorter) and shorter.shape == (2, 5)


def test_a_prompt_is_looked_through_by_one_thread_at_a_time(tiny_pipeline, monkeypatch):
    """For learned words, which sets how the tokenizer pads: another thread's padding must not be lost by it."""
    held, look = [], type(tiny_pipeline).maybe_convert_prompt

    def looking(self, prompt, tokenizer):
        held.append(TOKENIZING.locked())
        return look(self, prompt, tokenizer)

    monkeypatch.setattr(type(tiny_pipeline), "maybe_convert_prompt", looking)
    assert generate(tiny_pipeline).abs().max() > 0 and held == [True, True]


def test_threads_with_different_lora_scales():
    pipeline = adapted_pipeline()
    before, scales = scalings(pipeline), [0.25, 1.0, 0.25, 1.0]
    alone = {s: generate(pipeline, cross_attention_kwargs={"scale": s}) for s in (0.25, 1.0)}
    assert (alone[0.25] - alone[1.0]).abs().max() > 1e-3
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda s: generate(pipeline, cross_attention_kwargs={"scale": s}), scales * 5))
    assert all(torch.equal(image, alone[scale]) for image, scale in zip(found, scales * 5))
    assert scalings(pipeline) == before


@pytest.mark.parametrize("scale", [0.3, 0.0])
def test_a_lora_scale_is_undone_exactly_even_by_a_failure(scale, monkeypatch):
    pipeline = adapted_pipeline()
    before = scalings(pipeline)
    for network in (pipeline.text_encoder, pipeline.unet):
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="broken"):
            patch.setattr(network, "forward", lambda *a, **k: (_ for _ in ()).throw(RuntimeError("broken")))
            generate(pipeline, cross_attention_kwargs={"scale": scale})
        assert scalings(pipeline) == before
    generate(pipeline, cross_attention_kwargs={"scale": scale})
    assert scalings(pipeline) == before


def test_an_interrupt_is_its_own_threads(tiny_pipeline):
    expected, calls = generate(tiny_pipeline, "blue star", 3, num_inference_steps=4), []

    def other():
        calls.append(generate(tiny_pipeline, "blue star", 3, num_inference_steps=4))

    def stop(pipeline, index, t, tensors):
        calls.append(index)
        pipeline._interrupt = True
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        return {}

    generate(tiny_pipeline, callback_on_step_end=stop)
    assert calls[0] == 0 and len(calls) == 2, "stopped after the first step"
    assert torch.equal(calls[1], expected), "the other thread was not"


def test_a_call_leaves_nothing_behind(tiny_pipeline):
    names = ("guidance_scale", "do_classifier_free_guidance", "interrupt")
    before = {name: getattr(tiny_pipeline, name) for name in names}

    def stop(pipeline, index, t, tensors):
        assert pipeline.guidance_scale == 9.0 and pipeline.do_classifier_free_guidance
        pipeline._interrupt = True
        return {}

    generate(tiny_pipeline, guidance_scale=9.0, callback_on_step_end=stop)
    assert {name: getattr(tiny_pipeline, name) for name in names} == before
    with pytest.raises(ValueError, match="latents have shape"):
        generate(tiny_pipeline, guidance_scale=9.0, latents=torch.zeros(1, 3, 4, 4))
    assert {name: getattr(tiny_pipeline, name) for name in names} == before


def test_a_call_inside_a_call(tiny_pipeline):
    """A callback that draws a picture of its own changes nothing."""
    expected = generate(tiny_pipeline, guidance_scale=4.0)

    def draw(pipeline, index, t, tensors):
        generate(pipeline, "blue star", 1, guidance_scale=1.0)
        return {}

    assert torch.equal(generate(tiny_pipeline, guidance_scale=4.0, callback_on_step_end=draw), expected)
