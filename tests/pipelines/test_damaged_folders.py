"""A damaged pipeline folder, whatever is wrong with it, is one error that says where."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from conftest import build_tiny_pipeline, seeded

from atlas_diffusers import AtlasPipeline

INDEX, UNET, SCHEDULER = "model_index.json", "unet/config.json", "scheduler/scheduler_config.json"
WEIGHTS, REFERENCES = "unet/diffusion_pytorch_model.safetensors", "references.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    pipeline = build_tiny_pipeline()
    pipeline.set_references(torch.rand(6, 3, 8, 8, generator=seeded()) * 2 - 1)
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "copy"))


@pytest.mark.parametrize("file", [INDEX, UNET, SCHEDULER])
@pytest.mark.parametrize("content", ["", "{", "null", "[]", "3", '"text"', "[" * 5000, b"\xff\xfe"], ids=repr)
def test_a_file_that_holds_no_configuration(folder, file, content):
    (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(OSError, match=rf"{file} (is damaged: |holds \w+; expected an object)"):
        AtlasPipeline.from_pretrained(folder)


VALUES = [
    (INDEX, {"_class_name": None}, "_class_name=None; expected the name of a pipeline's class"),
    (INDEX, {"unet": None}, "unet=None; expected a library and the name of a class"),
    (INDEX, {"vae": []}, r"vae=\[\]; expected a library"),
    (INDEX, {"scheduler": [1, 2]}, r"scheduler=\[1, 2\]; expected a library"),
    (INDEX, {"tokenizer": True}, "tokenizer=True; expected a library"),
    (INDEX, {"unet": ["atlas_diffusers", "Nothing"]}, "atlas_diffusers has no class 'Nothing'"),
    (INDEX, {"default_guidance_scale": "x"}, "default_guidance_scale='x'; expected float"),
    (INDEX, {"default_num_inference_steps": None}, "default_num_inference_steps=None; expected int"),
    (SCHEDULER, {"beta_end": "0.02"}, "beta_end='0.02'; expected float"),
    (SCHEDULER, {"beta_schedule": []}, r"beta_schedule=\[\]; expected str"),
    (SCHEDULER, {"num_train_timesteps": 1.5}, r"num_train_timesteps=1\.5; expected int"),
    (SCHEDULER, {"num_train_timesteps": -1}, "num_train_timesteps=-1; expected 1 to 1000000"),
    (SCHEDULER, {"num_train_timesteps": 10**12}, "num_train_timesteps=1000000000000; expected 1 to 1000000"),
    (UNET, {"sample_size": 10**9}, "sample_size=1000000000; expected at most 8192"),
    (UNET, {"base_channels": 2**30}, "base_channels=1073741824; expected at most 1048576"),
    (SCHEDULER, {"beta_start": [0.5]}, r"beta_start=\[0.5\]; expected float"),
    (SCHEDULER, {"trained_betas": "x"}, "trained_betas='x'; expected "),
    (SCHEDULER, {"clip_sample": None}, "clip_sample=None; expected bool"),
    (SCHEDULER, {"beta_schedule": "bogus"}, "beta_schedule='bogus' is unknown"),
    (UNET, {"channel_mult": 3}, "channel_mult=3; expected "),
    (UNET, {"dropout": {}}, "dropout={}; expected float"),
    (UNET, {"num_heads": 0}, "num_heads=0; expected at least 1"),
    (UNET, {"patch_size": -1, "num_class_embeds": 0}, "num_class_embeds=0, patch_size=-1; expected at least 1"),
    (UNET, {"cross_attention_dim": 0.5}, "cross_attention_dim=0.5; expected "),
    ("text_encoder/config.json", {"hidden_size": "x"}, "cannot be loaded|hidden_size"),
]


@pytest.mark.parametrize("file, changes, message", VALUES, ids=[f"{file}-{changes}" for file, changes, _ in VALUES])
def test_a_malformed_value_is_named(folder, file, changes, message):
    config = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(config | changes))
    with pytest.raises((OSError, ValueError), match=message):
        AtlasPipeline.from_pretrained(folder)


@pytest.mark.parametrize("file", [WEIGHTS, REFERENCES, "text_encoder/model.safetensors"])
def test_damaged_tensors(folder, file):
    content = (folder / file).read_bytes()
    for damaged in (b"", content[: len(content) // 2], b"\xff" + content[1:], content[:8] + b"{{{{" + content[12:]):
        (folder / file).write_bytes(damaged)
        with pytest.raises(OSError):
            AtlasPipeline.from_pretrained(folder)


def changed(file, **values):
    """Values of a JSON file; of nested objects by ``a__b``."""
    whole = json.loads(file.read_text())
    for path, value in values.items():
        *within, name = path.split("__")
        part = whole
        for key in within:
            part = part[key]
        part[name] = value
    file.write_text(json.dumps(whole))


@pytest.mark.parametrize("length", [10**9, 10**30, -1, 0, "x", [], True, None], ids=repr)
def test_a_tokenizer_pads_to_what_its_text_encoder_takes(folder, length):
    """A thousand million tokens take all of the memory."""
    changed(folder / "tokenizer/tokenizer_config.json", model_max_length=length)
    with pytest.raises(OSError, match=r"tokenizer has model_max_length=.*; its text encoder takes 2 to 8 tokens"):
        AtlasPipeline.from_pretrained(folder)


@pytest.mark.parametrize("values", [{"model__fuse_unk": -1}, {"model__type": "x"}, {"pre_tokenizer": {"type": "No"}}], ids=str)
def test_a_damaged_tokenizer(folder, values):
    """Which the library of tokenizers says by a bare ``Exception``."""
    changed(folder / "tokenizer/tokenizer.json", **values)
    with pytest.raises(OSError, match="cannot be loaded: "):
        AtlasPipeline.from_pretrained(folder)


def test_weights_of_other_names_are_missing_ones(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / WEIGHTS)
    name = next(iter(weights))
    save_file({f"of.{key}" if key == name else key: value for key, value in weights.items()}, folder / WEIGHTS)
    with pytest.raises(OSError, match=f"the weights of unet lack {name}$"):
        AtlasPipeline.from_pretrained(folder)


def test_what_a_text_encoder_cannot_encode(folder):
    pipeline = AtlasPipeline.from_pretrained(folder)
    pipeline.tokenizer.add_tokens(["zebra"])
    with pytest.raises(ValueError, match="the tokenizer gives token [0-9]+, but the text encoder knows 0 to"):
        pipeline("zebra")
    changed(folder / "text_encoder/config.json", eos_token_id=None)
    with pytest.raises(OSError, match="the text encoder of tokenizer has eos_token_id=None; expected the number of a token"):
        AtlasPipeline.from_pretrained(folder)


def test_a_shift_that_leaves_no_signal(folder):
    changed(folder / SCHEDULER, shift=1e18)
    with pytest.raises(ValueError, match="the shifts of the flow leave no signal there"):
        AtlasPipeline.from_pretrained(folder)("red heart", generator=seeded())


def test_captions_of_references_are_one_each(folder):
    from safetensors.torch import load_file, save_file

    for captions in ('"text"', "[1, 2, 3, 4, 5, 6]", '["one"]', "{"):
        save_file(load_file(folder / REFERENCES), folder / REFERENCES, metadata={"captions": captions})
        with pytest.raises(ValueError, match="references.safetensors has captions .*; expected 6 texts|Expecting"):
            AtlasPipeline.from_pretrained(folder)


def test_a_text_encoder_without_its_tokenizer(folder):
    index = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps(index | {"tokenizer": [None, None]}))
    with pytest.raises(ValueError, match="has no tokenizer; give prompt_embeds"):
        AtlasPipeline.from_pretrained(folder)("red heart")


def test_a_beginning_above_the_end_of_the_betas_draws_or_is_named(folder):
    """0.5 at the start leaves no signal at the end: steps from there are refused in one line."""
    config = json.loads((folder / SCHEDULER).read_text())
    (folder / SCHEDULER).write_text(json.dumps(config | {"beta_start": 0.5}))
    with pytest.warns(UserWarning, match="betas must lie in .*leave no signal"):
        pipeline = AtlasPipeline.from_pretrained(folder)
        with pytest.raises(ValueError, match="timestep 999: betas must lie in .*leave no signal"):
            pipeline("red heart", generator=seeded())


def test_values_drawn_at_random_never_escape(folder):
    """Any value of any type in any place: the pipeline loads, or one kind of error says why not."""
    choice, refused = random.Random(0), 0
    values = [None, "x", [], {}, -1, [1, 2], [None, None], 0.5, True, ["atlas_diffusers", "Nope"]]
    for file in (INDEX, UNET, SCHEDULER):
        config = json.loads((folder / file).read_text())
        for name in choice.sample(sorted(config), min(len(config), 8)):
            (folder / file).write_text(json.dumps(config | {name: choice.choice(values)}))
            try:
                AtlasPipeline.from_pretrained(folder)
            except (OSError, ValueError):
                refused += 1
        (folder / file).write_text(json.dumps(config))
    assert refused > 12
