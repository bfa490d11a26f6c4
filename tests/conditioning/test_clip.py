"""Tokenizers learned from captions, and the text encoder on top."""

import random

import pytest
import torch
from conftest import build_tiny_text
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPTextModel, CLIPTokenizer

from atlas_diffusers.conditioning import build_text_encoder, build_tokenizer, tokenize

CAPTIONS = ["red heart", "blue star", "green leaf", "slice of pizza", "face with big eyes", "red star", "ÀÉ größe 東京"]
TOKENIZER = build_tokenizer(CAPTIONS, 600, 16)


def naive_merges(words, limit):
    """Sennrich et al. 2016, algorithm 1, on lists of symbols with counts."""
    words, merges = [[list(symbols), count] for symbols, count in words.items()], []
    while len(merges) < limit:
        pairs = {}
        for symbols, count in words:
            for i in range(len(symbols) - 1):
                pair = symbols[i], symbols[i + 1]
                pairs[pair] = pairs.get(pair, 0) + count
        if not pairs:
            break
        best = sorted(pairs, key=lambda pair: (-pairs[pair], pair))[0]
        merges.append(best)
        for entry in words:
            symbols, i = entry[0], 0
            while i < len(symbols) - 1:
                if (symbols[i], symbols[i + 1]) == best:
                    symbols[i : i + 2] = ["".join(best)]
                i += 1
    return merges


def test_merges_are_those_of_byte_pair_encoding():
    captions = ["low lower lowest", "new newer newest wide", "low low newest"]
    words = {}
    for word in " ".join(captions).split():
        symbols = (*word[:-1], word[-1] + "</w>")
        words[symbols] = words.get(symbols, 0) + 1
    merges = naive_merges(words, 20)
    vocab = build_tokenizer(captions, 514 + 20).get_vocab()
    assert sorted(vocab, key=vocab.get)[512:-2] == ["".join(pair) for pair in merges]


def test_the_same_captions_give_the_same_tokenizer():
    again = build_tokenizer(list(CAPTIONS), 600, 16)
    assert again.get_vocab() == TOKENIZER.get_vocab()
    shuffled = list(CAPTIONS)
    random.Random(1).shuffle(shuffled)
    assert build_tokenizer(shuffled, 600, 16).get_vocab() == TOKENIZER.get_vocab()


@pytest.mark.parametrize("vocab_size", [514, 515, 530, 600])
def test_the_vocabulary_is_bounded_and_ids_are_dense(vocab_size):
    tokenizer = build_tokenizer(CAPTIONS, vocab_size)
    assert len(tokenizer) <= vocab_size and (vocab_size > 530 or len(tokenizer) == vocab_size)
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (len(tokenizer) - 2, len(tokenizer) - 1)


def test_no_captions_leave_the_bytes():
    assert len(build_tokenizer([], 2048)) == 514


def test_save_and_load_roundtrip(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    loaded = CLIPTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == TOKENIZER.get_vocab() and loaded.model_max_length == 16
    texts = [*CAPTIONS, "", "an unseen caption, with 3 marks!", "🍕" * 30]
    assert torch.equal(tokenize(loaded, texts), tokenize(TOKENIZER, texts))


@pytest.mark.parametrize("caption", CAPTIONS)
def test_captions_decode_back(caption):
    ids = tokenize(TOKENIZER, [caption])[0]
    assert TOKENIZER.decode(ids, skip_special_tokens=True).strip() == caption.lower()


def test_frequent_words_become_one_token():
    words = sorted({word for caption in CAPTIONS[:6] for word in caption.split()})
    tokenizer = build_tokenizer(CAPTIONS[:6], 2048)
    assert [tokenizer.tokenize(word) for word in words] == [[word + "</w>"] for word in words]


@settings(max_examples=150, deadline=None, database=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_any_text_has_known_tokens_only(text):
    ids = tokenize(TOKENIZER, [text])
    assert ids.shape == (1, 16) and ids[0, 0] == TOKENIZER.bos_token_id
    assert 0 <= ids.min() and ids.max() < len(TOKENIZER)
    inner = TOKENIZER(text, add_special_tokens=False).input_ids
    plain = "<|startoftext|>" not in text and "<|endoftext|>" not in text
    assert not plain or TOKENIZER.unk_token_id not in inner


@pytest.mark.parametrize("text", ["x", "🍕", "日本語", "naïve", "\u0301", "\x00", "ﬁ", "ß"])
def test_rare_symbols_keep_their_bytes(text):
    inner = TOKENIZER(text, add_special_tokens=False).input_ids
    assert inner and TOKENIZER.eos_token_id not in inner


def test_tokenize_pads_and_truncates():
    bos, eos = TOKENIZER.bos_token_id, TOKENIZER.eos_token_id
    empty, short, long = tokenize(TOKENIZER, ["", "red heart", "pizza " * 40])
    assert empty.tolist() == [bos] + [eos] * 15
    assert short[0] == bos and short.tolist().count(eos) == 16 - 1 - len(TOKENIZER.tokenize("red heart"))
    assert long[0] == bos and long[-1] == eos and eos not in long[1:-1]


def test_case_and_spaces_do_not_matter():
    assert torch.equal(*tokenize(TOKENIZER, ["Red  HEART ", "red heart"]))


@pytest.fixture(scope="module")
def text_encoder():
    return build_tiny_text()[1].double()


@pytest.fixture(scope="module")
def ids():
    return tokenize(build_tiny_text()[0], ["red heart", "", "blue star green leaf red star"])


def test_the_text_encoder_fits_its_tokenizer():
    with torch.random.fork_rng():
        encoder = build_text_encoder(TOKENIZER, 24, 3, 2)
    c = encoder.config
    assert (c.vocab_size, c.max_position_embeddings) == (len(TOKENIZER), 16)
    assert (c.hidden_size, c.intermediate_size, c.num_hidden_layers, c.num_attention_heads) == (24, 96, 3, 2)
    assert (c.bos_token_id, c.eos_token_id) == (TOKENIZER.bos_token_id, TOKENIZER.eos_token_id)
    assert encoder(tokenize(TOKENIZER, CAPTIONS)).last_hidden_state.shape == (len(CAPTIONS), 16, 24)


def test_the_pooled_state_is_at_the_first_end_mark(text_encoder, ids):
    with torch.no_grad():
        output = text_encoder(ids)
    for row, states, pooled in zip(ids, output.last_hidden_state, output.pooler_output):
        assert torch.equal(pooled, states[row.tolist().index(text_encoder.config.eos_token_id)])


@pytest.mark.parametrize("position", [1, 4, 7])
def test_later_tokens_do_not_reach_earlier_states(text_encoder, ids, position):
    changed = ids.clone()
    changed[:, position] = (changed[:, position] + 100) % 512
    with torch.no_grad():
        before, after = text_encoder(ids).last_hidden_state, text_encoder(changed).last_hidden_state
    torch.testing.assert_close(before[:, :position], after[:, :position])
    assert (before[:, position:] - after[:, position:]).abs().amax((1, 2)).min() > 1e-3


def test_states_do_not_depend_on_the_batch(text_encoder, ids):
    with torch.no_grad():
        together = text_encoder(ids).last_hidden_state
        alone = torch.cat([text_encoder(row[None]).last_hidden_state for row in ids])
    torch.testing.assert_close(together, alone)


def test_text_encoder_roundtrip(tmp_path, text_encoder, ids):
    text_encoder.save_pretrained(tmp_path)
    loaded = CLIPTextModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(ids).last_hidden_state, text_encoder(ids).last_hidden_state)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_word_order_changes_the_states(text_encoder):
    ids = tokenize(build_tiny_text()[0], ["red star", "star red"])
    with torch.no_grad():
        first, second = text_encoder(ids).pooler_output
    assert (first - second).abs().max() > 1e-3


def test_weights_follow_the_seed():
    def weights(seed):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return build_text_encoder(TOKENIZER, 16, 1, 2).get_input_embeddings().weight

    assert torch.equal(weights(0), weights(0)) and not torch.equal(weights(0), weights(1))
