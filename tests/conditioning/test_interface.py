"""Encodings agree with each library's own, whatever the batch, the cache and the length of a prompt."""

import pytest
import torch
from conftest import build_tiny_text, seeded

from atlas_diffusers.conditioning import CLIPConditioningInterface, tokenize
from atlas_diffusers.config import ConditioningConfig

open_clip = pytest.importorskip("open_clip")
from open_clip.model import CLIP, CustomTextCLIP  # noqa: E402

pytestmark = pytest.mark.usefixtures("float64")

PROMPTS = ["red heart", "", "a green leaf beside a blue star", "blue"]
VISION = {"layers": 1, "width": 16, "image_size": 16, "patch_size": 8, "head_width": 8}
TEXT = {"context_length": 12, "vocab_size": 49408, "width": 24, "heads": 2, "layers": 2}


@pytest.fixture(params=[CLIP, CustomTextCLIP], ids=["CLIP", "CustomTextCLIP"])
def tower(request):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = request.param(embed_dim=20, vision_cfg=VISION, text_cfg=TEXT).eval()
        for p in model.parameters():
            p.data.add_(0.1 * torch.randn(p.shape))
    return model, open_clip.get_tokenizer("ViT-B-32", context_length=12)


def small(**options):
    return ConditioningConfig(**{"context_dim": 16, **options})


def transformers_interface(**options):
    tokenizer, encoder = build_tiny_text()
    return CLIPConditioningInterface(small(**options), encoder, tokenizer)


@torch.no_grad()
def test_transformers_own_encoding():
    tokenizer, encoder = build_tiny_text()
    found = transformers_interface().encode_text(PROMPTS)
    ids = tokenize(tokenizer, PROMPTS)
    expected = encoder(ids)
    torch.testing.assert_close(found.hidden_states, expected.last_hidden_state.float())
    torch.testing.assert_close(found.pooled, expected.pooler_output.float())
    lengths = [len(tokenizer(prompt).input_ids) for prompt in PROMPTS]
    assert found.mask.sum(1).tolist() == [min(length, 8) for length in lengths]


@torch.no_grad()
def test_open_clips_own_encoding(tower):
    model, tokenizer = tower
    interface = CLIPConditioningInterface(small(context_dim=24), model, tokenizer)
    found, ids = interface.encode_text(PROMPTS), tokenizer(PROMPTS)
    torch.testing.assert_close(found.pooled, model.encode_text(ids).float())
    # the pooled state is the one at the end-of-text mark, times the projection
    text = getattr(model, "text", model)
    ends = ids.argmax(1)
    pooled = found.hidden_states[torch.arange(4), ends] @ text.text_projection.float()
    torch.testing.assert_close(pooled, found.pooled)
    assert found.mask.sum(1).tolist() == (ends + 1).tolist()


def test_states_are_causal(tower):
    interface = CLIPConditioningInterface(small(context_dim=24), *tower)
    first, second = interface.encode_text(["red heart on a wall", "red heart in a box"]).hidden_states
    torch.testing.assert_close(first[:3], second[:3])
    assert (first[3:] - second[3:]).abs().max() > 1e-3


def test_batch_mates_change_nothing(tower):
    interface = CLIPConditioningInterface(small(context_dim=24, cache_size=0), *tower)
    together = interface.encode_text(PROMPTS)
    for i, prompt in enumerate(PROMPTS):
        alone = interface.encode_text(prompt)
        assert all(torch.equal(a[0], b[i]) for a, b in zip(alone, together))


def test_the_cache_is_bounded_and_changes_nothing():
    interface, calls = transformers_interface(cache_size=2), []
    encode = interface._encode
    interface._encode = lambda tower, prompt: (calls.append(prompt), encode(tower, prompt))[1]
    fresh = transformers_interface(cache_size=0).encode_text(["a", "b", "a", "c"])
    found = interface.encode_text(["a", "b", "a", "c"])
    assert calls == ["a", "b", "c"] and all(torch.equal(x, y) for x, y in zip(found, fresh))
    interface.encode_text(["a", "c"])
    assert calls == ["a", "b", "c"], "the two used last are kept"
    interface.encode_text("b")
    interface.clear_cache()
    interface.encode_text("b")
    assert calls == ["a", "b", "c", "b", "b"]


@torch.no_grad()
def test_long_prompts_are_encoded_in_chunks():
    tokenizer, encoder = build_tiny_text()
    prompt = "red heart blue star green leaf red heart"
    tokens = tokenizer(prompt, add_special_tokens=False).input_ids
    assert 6 < len(tokens) <= 12
    found = transformers_interface(max_chunks=2).encode_text([prompt, "red heart"])
    rows = [tokens[:6], tokens[6:]]
    ids = torch.tensor([
        [tokenizer.bos_token_id, *row, tokenizer.eos_token_id, *[tokenizer.pad_token_id] * (6 - len(row))] for row in rows
    ])  # fmt: skip
    expected = encoder(ids)
    assert found.hidden_states.shape == (2, 16, 16)
    torch.testing.assert_close(found.hidden_states[0], expected.last_hidden_state.flatten(0, 1).float())
    torch.testing.assert_close(found.pooled[0], expected.pooler_output[0].float())
    short = transformers_interface().encode_text("red heart").hidden_states[0]
    torch.testing.assert_close(found.hidden_states[1, :8], short)


def test_chunks_of_open_clip_are_its_own_tokens(tower):
    model, tokenizer = tower
    interface = CLIPConditioningInterface(small(context_dim=24, max_chunks=2), model, tokenizer)
    prompt = " ".join(["red heart"] * 8)
    found = interface.encode_text(prompt).hidden_states[0]
    head = CLIPConditioningInterface(small(context_dim=24), model, tokenizer).encode_text(" ".join(["red heart"] * 5))
    torch.testing.assert_close(found[:12], head.hidden_states[0])
    assert found.shape == (24, 24)


def test_the_payload_has_both_halves():
    interface = transformers_interface(guidance_scale=4.0)
    payload = interface.build_conditioning_payload(["red heart", "blue star"], "leaf")
    assert payload["guidance_scale"] == 4.0
    assert torch.equal(payload["encoder_hidden_states"], interface.encode_text(["red heart", "blue star"]).hidden_states)
    assert torch.equal(payload["negative_encoder_hidden_states"], interface.encode_text(["leaf", "leaf"]).hidden_states)
    empty = interface.build_conditioning_payload("red heart", guidance_scale=1.5)
    assert torch.equal(empty["negative_encoder_hidden_states"], interface.encode_text("").hidden_states)
    assert empty["guidance_scale"] == 1.5


@torch.no_grad()
def test_towers_are_loaded_from_folders_and_files(tmp_path):
    tokenizer, encoder = build_tiny_text()
    encoder.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    found = CLIPConditioningInterface(small(clip_model=str(tmp_path))).encode_text("red heart")
    assert torch.equal(found.hidden_states, transformers_interface().encode_text("red heart").hidden_states)


@torch.no_grad()
def test_an_architecture_of_open_clip_with_local_weights(tmp_path):
    from safetensors.torch import save_file

    open_clip.add_model_config(write_architecture(tmp_path))
    with torch.random.fork_rng():
        model = open_clip.create_model("atlas-tiny").eval()
    save_file(model.state_dict(), tmp_path / "tower.safetensors")
    config = ConditioningConfig(clip_model="atlas-tiny", clip_pretrained=str(tmp_path / "tower.safetensors"), context_dim=24)
    found = CLIPConditioningInterface(config).encode_text("red heart")
    expected = model.encode_text(open_clip.get_tokenizer("atlas-tiny")(["red heart"]))
    torch.testing.assert_close(found.pooled, expected.float())


def write_architecture(folder):
    import json

    file = folder / "atlas-tiny.json"
    file.write_text(json.dumps({"embed_dim": 20, "vision_cfg": VISION, "text_cfg": TEXT}))
    return file


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: transformers_interface().encode_text([]), "non-empty list of texts"),
        (lambda: transformers_interface().encode_text(["a", 3]), "non-empty list of texts"),
        (lambda: transformers_interface(context_dim=768), "context_dim=768, but the text encoder has states of width 16"),
        (lambda: transformers_interface(use_clip=False).encode_text("a"), "use_clip=False"),
        (lambda: transformers_interface(max_length=9), "max_length=9, but the text encoder has 8 places"),
        (lambda: transformers_interface().build_conditioning_payload(["a", "b"], ["c"]), "1 negative prompts for 2 prompts"),
        (lambda: CLIPConditioningInterface(text_encoder=object()), "and its tokenizer"),
        (lambda: CLIPConditioningInterface(ConditioningConfig(clip_model="ViT-Z")), "'ViT-Z' is no folder"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_encodings_of_the_networks_text_reach_the_sampler():
    from conftest import build_tiny_unet

    from atlas_diffusers.schedules import karras_noise_schedule
    from atlas_diffusers.solvers import AdvancedHierarchicalDiffusionSampler

    unet = build_tiny_unet(cross_attention_levels=(1,), cross_attention_dim=16)
    sampler = AdvancedHierarchicalDiffusionSampler(unet, karras_noise_schedule)

    def sample(prompts, *seeds):
        payload = transformers_interface().build_conditioning_payload(prompts)
        return sampler.sample((len(seeds), 3, 8, 8), 3, payload, generator=[seeded(seed) for seed in seeds])

    torch.testing.assert_close(sample(["red heart", "blue star"], 1, 2)[1:], sample(["blue star"], 2))
