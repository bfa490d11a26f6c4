import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import build_tiny_unet, seeded
from diffusers.models.attention import BasicTransformerBlock
from diffusers.training_utils import EMAModel
from peft import LoraConfig
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from atlas_diffusers import AtlasUNet2DModel

pytestmark = pytest.mark.usefixtures("float64")

CONDITIONED = {
    "cross_attention_levels": (0, 1),
    "cross_attention_dim": 12,
    "addition_embed_type": "text",
    "num_class_embeds": 5,
}


def inputs(batch=2, size=8, channels=3):
    generator = seeded(1)
    return {
        "sample": torch.randn(batch, channels, size, size, generator=generator),
        "timestep": torch.arange(batch) * 400 + 7,
        "encoder_hidden_states": torch.randn(batch, 6, 12, generator=generator),
        "class_labels": torch.arange(batch) % 5,
    }


@pytest.fixture
def unet():
    return build_tiny_unet(**CONDITIONED)


@pytest.fixture
def lora_unet(unet):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False))
    return unet


@torch.no_grad()
def run(unet, **changes):
    return unet(**{**inputs(), **changes}).sample


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operator returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(t.numel() for t in tree_leaves(result) if isinstance(t, torch.Tensor))])
        return result


def test_same_weights_for_the_same_seed():
    first, second = build_tiny_unet(**CONDITIONED).state_dict(), build_tiny_unet(**CONDITIONED).state_dict()
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_save_and_load(unet, tmp_path):
    unet.save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "diffusion_pytorch_model.safetensors"]
    with torch.random.fork_rng():
        loaded = AtlasUNet2DModel.from_pretrained(tmp_path).eval()
    assert torch.equal(run(loaded), run(unet))
    assert {k: v for k, v in loaded.config.items() if k[0] != "_"} == {
        k: list(v) if isinstance(v, tuple) else v for k, v in unet.config.items() if k[0] != "_"
    }


def test_every_parameter_learns(unet):
    # a constant added to every key leaves a softmax as it is, so that bias has no gradient by construction
    invariant = {"add_embedding.pool.k_proj.bias"}
    unet(**inputs()).sample.square().sum().backward()
    names = {name for name, p in unet.named_parameters() if p.grad is None or not p.grad.abs().max() > 1e-7}
    assert names <= invariant


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        unet = build_tiny_unet(**CONDITIONED).train()
        if checkpointing:
            unet.enable_gradient_checkpointing()
        unet(**inputs()).sample.square().mean().backward()
        gradients.append({name: p.grad for name, p in unet.named_parameters()})
    plain, checkpointed = gradients
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-5, atol=1e-8, msg=name)


def test_gradient_checkpointing_runs_each_block_again():
    unet = build_tiny_unet().train()
    unet.enable_gradient_checkpointing()
    calls = []
    for block in unet.modules():
        if type(block).__name__ == "AtlasUNetBlock":
            block.resnet.register_forward_pre_hook(lambda *_: calls.append(1))
    output = unet(inputs()["sample"], 3).sample
    forward = len(calls)
    output.sum().backward()
    assert len(calls) == 2 * forward


@pytest.mark.parametrize("backward", [False, True])
def test_attention_memory_is_linear_in_tokens(backward):
    unet = build_tiny_unet(in_channels=1, out_channels=1, channel_mult=(1,), attention_levels=(0,))
    largest = {}
    for size in (32, 64):
        with LargestTensor() as record, torch.set_grad_enabled(backward):
            output = unet(torch.ones(1, 1, size, size), 5).sample
            if backward:
                output.sum().backward()
        largest[size] = record.numel
    tokens = 64 * 64
    assert largest[64] < tokens**2 / 50
    assert largest[64] / largest[32] == pytest.approx(4, rel=0.05)


def test_time_features_are_the_sinusoids_of_whole_timesteps():
    features = build_tiny_unet(base_channels=64).time_proj(torch.arange(1000)).double().numpy()
    angles = np.arange(1000)[:, None] * 10000 ** (-np.arange(32) / 32)
    np.testing.assert_allclose(features, np.concatenate([np.cos(angles), np.sin(angles)], axis=1), atol=2e-4)
    assert (features.std(axis=0) > 0.1).mean() > 0.7


def test_neighbouring_timesteps_have_different_embeddings():
    unet = build_tiny_unet(base_channels=64)
    with torch.no_grad():
        first, second = unet.embed(torch.zeros(2, 3, 8, 8), torch.tensor([998, 999]), None, None, None)
    assert (first - second).norm() / first.norm() > 1e-3


def test_timestep_may_be_a_number_or_a_tensor(unet):
    expected = run(unet, timestep=torch.tensor([31, 31]))
    for timestep in (31, 31.0, torch.tensor(31), torch.tensor([31])):
        assert torch.equal(run(unet, timestep=timestep), expected)


def test_patches_are_space_to_depth():
    patched = build_tiny_unet(patch_size=2)
    inner = build_tiny_unet(in_channels=12, out_channels=12)
    inner.load_state_dict(patched.state_dict())
    sample = inputs(size=16)["sample"]
    seen = []
    patched.conv_in.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        output = patched(sample, 9).sample
        expected = F.pixel_shuffle(inner(F.pixel_unshuffle(sample, 2), 9).sample, 2)
    assert torch.equal(seen[0], F.pixel_unshuffle(sample, 2))
    assert torch.equal(output, expected)


def test_called_as_diffusers_pipelines_do():
    unet = build_tiny_unet(**{**CONDITIONED, "num_class_embeds": None})
    given = inputs()
    with torch.no_grad():
        output = unet(
            given["sample"],
            torch.tensor(981),
            encoder_hidden_states=given["encoder_hidden_states"],
            timestep_cond=None,
            cross_attention_kwargs=None,
            added_cond_kwargs=None,
            return_dict=False,
        )
    assert isinstance(output, tuple) and len(output) == 1
    assert torch.equal(output[0], run(unet, timestep=981, class_labels=None))


def test_every_condition_matters(unet):
    given, reference = inputs(), run(unet)
    changes = {
        "timestep": given["timestep"] + 1,
        "encoder_hidden_states": given["encoder_hidden_states"].flip(-1),
        "class_labels": given["class_labels"] + 1,
    }
    for name, value in changes.items():
        assert (run(unet, **{name: value}) - reference).abs().max() > 1e-5, name


def test_guidance_embedding():
    unet = build_tiny_unet(time_cond_proj_dim=4)
    sample, condition = inputs()["sample"], torch.ones(2, 4)
    with torch.no_grad():
        plain, guided = unet(sample, 5).sample, unet(sample, 5, timestep_cond=condition).sample
        assert (guided - plain).abs().max() > 1e-5
        torch.testing.assert_close(unet(sample, 5, timestep_cond=0 * condition).sample, plain)


def test_rows_of_a_batch_do_not_mix(unet):
    given = inputs(batch=3)
    with torch.no_grad():
        together = unet(**given).sample
        for i in range(3):
            alone = unet(**{name: value[i : i + 1] for name, value in given.items()}).sample
            torch.testing.assert_close(together[i : i + 1], alone)


@pytest.mark.parametrize(
    "changes, found",
    [
        ({"sample": torch.zeros(2, 4, 8, 8)}, r"\(2, 4, 8, 8\).*\(batch, 3, height, width\)"),
        ({"sample": torch.zeros(3, 8, 8)}, r"\(3, 8, 8\)"),
        ({"sample": torch.zeros(2, 3, 8, 9)}, "8x9.*multiples of 2"),
        ({"encoder_hidden_states": None}, r"expected \(batch, tokens, 12\), got None"),
        ({"encoder_hidden_states": torch.zeros(2, 6, 16)}, r"\(batch, tokens, 12\), got \(2, 6, 16\)"),
        ({"class_labels": None}, "class_labels.*num_class_embeds=5"),
        ({"added_cond_kwargs": {"time_ids": torch.zeros(2, 6)}}, "added_cond_kwargs.*time_ids"),
    ],
)
def test_wrong_inputs_are_named(unet, changes, found):
    with pytest.raises(ValueError, match=found):
        run(unet, **changes)


def test_size_must_be_a_multiple_of_patch_and_levels():
    unet = build_tiny_unet(patch_size=2)
    assert unet.size_multiple == 4
    with pytest.raises(ValueError, match="6x8.*multiples of 4"):
        unet(torch.zeros(1, 3, 6, 8), 0)


@pytest.mark.parametrize(
    "changes, found",
    [
        ({"attention_levels": (1, 2)}, r"attention_levels has \[2\].*\[0, 1\]"),
        ({"cross_attention_levels": (-1,), "cross_attention_dim": 12}, r"cross_attention_levels has \[-1\]"),
        ({"num_heads": 3}, r"\[16\].*num_heads=3"),
        ({"norm_num_groups": 5}, r"\[8, 16\].*norm_num_groups=5"),
        ({"addition_embed_type": "image"}, "addition_embed_type='image'.*'text'"),
        ({"cross_attention_levels": (1,)}, "cross_attention_dim, got None"),
        ({"addition_embed_type": "text"}, "cross_attention_dim, got None"),
    ],
)
def test_wrong_configurations_are_named(changes, found):
    with pytest.raises(ValueError, match=found):
        build_tiny_unet(**changes)


def test_lora_switches_on_and_off(unet):
    plain = run(unet)
    with torch.random.fork_rng():
        unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False))
    adapted = run(unet)
    assert (adapted - plain).abs().max() > 1e-4
    unet.disable_lora()
    torch.testing.assert_close(run(unet), plain)
    unet.enable_lora()
    assert torch.equal(run(unet), adapted)


@pytest.mark.parametrize("name", ["attention_kwargs", "cross_attention_kwargs"])
def test_lora_scale(lora_unet, name):
    adapted = run(lora_unet)
    off = run(lora_unet, **{name: {"scale": 0.0}})
    assert torch.equal(run(lora_unet), adapted)
    lora_unet.disable_lora()
    torch.testing.assert_close(off, run(lora_unet))


def test_lora_save_and_load(lora_unet, tmp_path):
    lora_unet.save_lora_adapter(tmp_path)
    assert os.listdir(tmp_path) == ["pytorch_lora_weights.safetensors"]
    fresh = build_tiny_unet(**CONDITIONED)
    with torch.random.fork_rng():
        fresh.load_lora_adapter(tmp_path, use_safetensors=True, prefix=None)
    torch.testing.assert_close(run(fresh), run(lora_unet))


def test_lora_fuses(lora_unet):
    adapted = run(lora_unet)
    lora_unet.fuse_lora()
    lora_unet.unload_lora()
    torch.testing.assert_close(run(lora_unet), adapted)


def test_layerwise_casting_stays_close(unet):
    plain = run(unet)
    unet.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float64)
    assert unet.conv_out.weight.dtype == torch.bfloat16 and unet.time_embedding.linear_1.weight.dtype == torch.float64
    assert 0 < (run(unet) - plain).norm() / plain.norm() < 0.02


def test_exponential_moving_average(unet):
    start = [p.detach().clone() for p in unet.parameters()]
    ema = EMAModel(unet.parameters(), decay=0.75, min_decay=0.75, model_cls=AtlasUNet2DModel, model_config=unet.config)
    ema.step(unet.parameters())
    with torch.no_grad():
        for p in unet.parameters():
            p.add_(1.0)
    ema.step(unet.parameters())
    for average, first in zip(ema.shadow_params, start):
        torch.testing.assert_close(average, first + 0.25)


def test_attention_backend_can_be_chosen(unet):
    plain = run(unet)
    unet.set_attention_backend("native")
    torch.testing.assert_close(run(unet), plain)


@pytest.mark.parametrize("self_levels, width", [((1,), 16), ((), 12)], ids=["both", "text only"])
def test_a_level_with_both_attentions_looks_at_itself_and_at_the_text(self_levels, width):
    """Width 16 of the level, 12 of the text: the first attention is of the level itself where the level has self-attention."""
    unet = build_tiny_unet(attention_levels=self_levels, cross_attention_levels=(1,), cross_attention_dim=12)
    blocks = [module for module in unet.modules() if isinstance(module, BasicTransformerBlock)]
    assert len(blocks) > 2 and {block.attn1.to_k.in_features for block in blocks} == {width}
    assert all(block.attn2 is None or block.attn2.to_k.in_features == 12 for block in blocks)
