import os

import pytest
import torch
import torch.nn.functional as F
from conftest import seeded
from peft import LoraConfig

from atlas_diffusers import AtlasTransformer2DModel

KINDS = ("cross", "joint")
TINY = {
    "sample_size": 8, "width": 16, "num_layers": 2, "num_heads": 2, "patch_size": 2, "cross_attention_dim": 12,
    "addition_embed_type": "text", "num_class_embeds": 5,
}  # fmt: skip


def build(kind="cross", **changes):
    """A tiny transformer whose gates are open; a new one predicts zero."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = AtlasTransformer2DModel(**{**TINY, "text_attention": kind, **changes}).eval()
        for parameter in network.parameters():
            if not parameter.abs().max() > 0:
                torch.nn.init.normal_(parameter, std=0.2)
    return network


def inputs(batch=2, dtype=torch.float32):
    generator = seeded(1)
    return {
        "sample": torch.randn(batch, 3, 8, 8, generator=generator).to(dtype),
        "timestep": torch.arange(batch) * 400 + 7,
        "encoder_hidden_states": torch.randn(batch, 6, 12, generator=generator).to(dtype),
        "class_labels": torch.arange(batch) % 5,
    }


@torch.no_grad()
def run(network, **changes):
    return network(**{**inputs(dtype=network.dtype), **changes}).sample


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_network_predicts_zero_and_every_parameter_learns(kind):
    with torch.random.fork_rng():
        network = AtlasTransformer2DModel(**TINY, text_attention=kind)
    assert run(network).abs().max() == 0
    network = build(kind)
    network(**inputs()).sample.square().sum().backward()
    # nothing reads the words after the last joint block, and a constant added to every key leaves a softmax as it is
    unread = {"add_embedding.pool.k_proj.bias"}
    last = "transformer_blocks.1."
    for name, parameter in network.named_parameters():
        read_no_more = kind == "joint" and name.startswith(last) and any(
            part in name for part in ("ff_context", "to_add_out", "add_q_proj", "norm_added_q", "norm1_context")
        )  # fmt: skip
        learns = parameter.grad is not None and parameter.grad.abs().max() > 1e-9
        assert learns or name in unread or read_no_more, name


@pytest.mark.parametrize("kind", KINDS)
def test_save_and_load(kind, tmp_path):
    network = build(kind)
    network.save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "diffusion_pytorch_model.safetensors"]
    with torch.random.fork_rng():
        loaded = AtlasTransformer2DModel.from_pretrained(tmp_path).eval()
    assert torch.equal(run(loaded), run(network)) and run(network).abs().max() > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_every_condition_matters(kind):
    network, given = build(kind), inputs()
    reference = run(network)
    changes = {
        "timestep": given["timestep"] + 50,
        "encoder_hidden_states": given["encoder_hidden_states"].flip(-1),
        "class_labels": given["class_labels"] + 1,
    }
    for name, value in changes.items():
        assert (run(network, **{name: value}) - reference).abs().max() > 1e-4, name


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_batch_do_not_mix(kind):
    network, given = build(kind).double(), inputs(batch=3, dtype=torch.float64)
    together = run(network, **given)
    for i in range(3):
        alone = run(network, **{name: value[i : i + 1] for name, value in given.items()})
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_attention_sees_where_patches_are_to_each_other_only(kind):
    """The angle between two patches depends on their offset alone; rows and columns turn different halves of a head."""
    network = build(kind)
    cos, sin = network.positions(3, 4, 0, torch.device("cpu"))
    angle = torch.atan2(sin, cos)
    assert cos.shape == (12, 8)
    # along a row only the second half turns, by the same angle a column; down a column only the first half
    step_right, step_down = angle[1] - angle[0], angle[4] - angle[0]
    torch.testing.assert_close(angle[3] - angle[2], step_right)
    assert step_right[:4].abs().max() == 0 and step_right[4:].abs().min() > 0
    assert step_down[4:].abs().max() == 0 and step_down[:4].abs().min() > 0
    words = network.positions(3, 4, 5, torch.device("cpu"))
    assert (words[0][:5] == 1).all() and (words[1][:5] == 0).all() and torch.equal(words[0][5:], cos)


def test_positions_matter():
    network = build()
    flipped = run(network, sample=inputs()["sample"].flip(-1)).flip(-1)
    assert (flipped - run(network)).abs().max() > 1e-3


def test_patches_are_space_to_depth():
    patched = build(patch_size=2)
    inner = build(patch_size=1, in_channels=12, out_channels=12, sample_size=4)
    inner.load_state_dict(patched.state_dict())
    sample = inputs()["sample"]
    expected = F.pixel_shuffle(run(inner, sample=F.pixel_unshuffle(sample, 2)), 2)
    assert torch.equal(run(patched), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_other_sizes_are_taken(kind):
    assert run(build(kind), sample=torch.ones(2, 3, 4, 12)).shape == (2, 3, 4, 12)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_gives_the_same_gradients(kind):
    gradients = []
    for checkpointing in (False, True):
        network = build(kind).double().train()
        if checkpointing:
            network.enable_gradient_checkpointing()
        network(**inputs(dtype=torch.float64)).sample.square().mean().backward()
        gradients.append({name: p.grad for name, p in network.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-10, atol=1e-14, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_lora_scales_and_fuses(kind):
    network = build(kind)
    plain = run(network)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        modules = ["to_q", "to_k", "to_v", "to_out.0"]
        network.add_adapter(LoraConfig(r=2, target_modules=modules, init_lora_weights=False))
    adapted = run(network)
    assert (adapted - plain).abs().max() > 1e-4
    torch.testing.assert_close(run(network, attention_kwargs={"scale": 0.0}), plain, rtol=0, atol=1e-5)
    network.fuse_lora()
    network.unload_lora()
    torch.testing.assert_close(run(network), adapted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_graph_is_whole(kind):
    network = build(kind)
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(**inputs()).sample, network(**inputs()).sample)


@pytest.mark.parametrize(
    "changes, found",
    [
        ({"sample": torch.zeros(2, 4, 8, 8)}, r"\(2, 4, 8, 8\).*\(batch, 3, height, width\)"),
        ({"sample": torch.zeros(2, 3, 8, 9)}, "8x9.*multiples of 2"),
        ({"encoder_hidden_states": None}, r"expected \(batch, tokens, 12\), got None"),
        ({"class_labels": None}, "class_labels.*num_class_embeds=5"),
    ],
)
def test_wrong_inputs_are_named(changes, found):
    with pytest.raises(ValueError, match=found):
        run(build(), **changes)


@pytest.mark.parametrize(
    "changes, found",
    [
        ({"num_heads": 3}, "width=16.*num_heads=12"),
        ({"text_attention": "none"}, "text_attention='none'.*'cross', 'joint'"),
        ({"addition_embed_type": "image"}, "addition_embed_type='image'"),
        ({"cross_attention_dim": None}, "need cross_attention_dim"),
        ({"text_attention": "joint", "dropout": 0.1}, "dropout=0.1 has no effect"),
    ],
)
def test_wrong_configurations_are_named(changes, found):
    with pytest.raises(ValueError, match=found):
        AtlasTransformer2DModel(**{**TINY, **changes})
