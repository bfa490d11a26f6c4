"""Flow pipelines called with texts: tokenizers and text encoders made here, and every class of ours swapped in."""

import dataclasses

import pytest
import torch
from flow_pipelines import KINDS, build_flow_pipeline, run_flow
from stock_pipelines import STOCK, WIDTH, build_clip_text_encoder, build_clip_tokenizer, deterministic, silence, swap
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

WORDS = {"<pad>": 0, "</s>": 1, "<unk>": 2, "red": 3, "heart": 4}
T5 = {"vocab_size": len(WORDS), "d_model": WIDTH, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Of words."""
    words = Tokenizer(models.WordLevel(WORDS, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=16, **names)


@deterministic
def texts(kind: str) -> dict:
    """The components that encode the prompts of a pipeline."""
    clip = {"tokenizer": build_clip_tokenizer(), "text_encoder": build_clip_text_encoder(projection=kind == "SD3")}
    if kind == "SD3":
        return {**clip, "tokenizer_2": clip["tokenizer"], "text_encoder_2": clip["text_encoder"]}
    if kind == "Flux":
        return {**clip, "tokenizer_2": build_tokenizer(), "text_encoder_2": T5EncoderModel(T5Config(**T5)).eval()}
    return {"tokenizer": build_tokenizer(), "text_encoder": UMT5EncoderModel(UMT5Config(**T5)).eval()}


@pytest.mark.parametrize("name", [*STOCK, "AtlasMultistepScheduler"])
@pytest.mark.parametrize("kind", ["SD3", "Flux", "Wan 2.1"])
def test_a_text_gives_what_its_embeddings_give(kind, name, monkeypatch):
    """The networks know the velocity whatever the text, so both ways end at one place, in as many calls."""
    given = KINDS[kind].inputs()
    with silence():
        expected = run_flow(kind, swap(build_flow_pipeline(kind), name))
        pipeline = swap(build_flow_pipeline(kind), name)
        pipeline.register_modules(**texts(kind))
        call = {"prompt": "red heart", **{key: value for key, value in given.items() if "embeds" not in key}}
        monkeypatch.setitem(KINDS, kind, dataclasses.replace(KINDS[kind], inputs=lambda: call))
        run = run_flow(kind, pipeline)
    assert run.calls == expected.calls
    torch.testing.assert_close(run.end, expected.end, rtol=0, atol=1e-6)
    encode = {"device": torch.device("cpu")} if kind == "Wan 2.1" else {"prompt_2": None, "device": torch.device("cpu")}
    encode |= {"prompt_3": None} if kind == "SD3" else {}
    one, other = (pipeline.encode_prompt(prompt=text, **encode)[0] for text in ("red heart", "heart heart"))
    assert one.shape == other.shape and not torch.allclose(one, other)
