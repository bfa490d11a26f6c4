"""CLIP tokenizers and text encoders, made from a list of captions without any download."""

import threading
from collections import Counter, defaultdict
from typing import cast

import torch
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, PreTrainedModel, PreTrainedTokenizerBase

# a fast tokenizer keeps how it pads and cuts as state, which threads that share it would change under each other
TOKENIZING = threading.Lock()
BOS, EOS, END_OF_WORD = "<|startoftext|>", "<|endoftext|>", "</w>"


def build_tokenizer(captions: list[str], vocab_size: int = 2048, max_length: int = 16) -> CLIPTokenizer:
    """
    A ``CLIPTokenizer`` whose byte-pair vocabulary is learned from ``captions`` (every byte stays representable).

    The same captions always give the same vocabulary: equally frequent pairs are merged in alphabetical order.
    Sennrich et al. 2016 (arXiv 1508.07909).

    Args:
        captions: training texts.
        vocab_size: upper bound, at least 514 (512 byte symbols and two marks).
        max_length: tokens a prompt, begin and end marks included.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    symbols = [*alphabet, *(symbol + END_OF_WORD for symbol in alphabet)]
    bare = _tokenizer(symbols, [], max_length=2**30)
    words = Counter(word for caption in captions for word in _words(bare.tokenize(caption)))
    merges = _learn_merges(words, vocab_size - len(symbols) - 2)
    return _tokenizer([*symbols, *(left + right for left, right in merges)], merges, max_length)


def _tokenizer(symbols: list[str], merges: list[tuple[str, str]], max_length: int) -> CLIPTokenizer:
    vocab = {token: index for index, token in enumerate([*dict.fromkeys(symbols), BOS, EOS])}
    # transformers says texts, and hands them to the library `tokenizers`, which takes pairs
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=max_length)  # pyright: ignore[reportArgumentType]


def _words(symbols: list[str]) -> list[tuple[str, ...]]:
    """Cut a list of byte symbols after each end-of-word mark."""
    ends = [i + 1 for i, symbol in enumerate(symbols) if symbol.endswith(END_OF_WORD)]
    return [tuple(symbols[start:end]) for start, end in zip([0, *ends], ends)]


def _learn_merges(words: Counter, limit: int) -> list[tuple[str, str]]:
    """The ``limit`` most frequent pairs, each counted after the merges before it; only words with the pair are counted anew."""
    merges: list[tuple[str, str]] = []
    pairs: Counter = Counter()
    places: dict[tuple[str, str], set[int]] = defaultdict(set)
    spelled, counts = list(words), list(words.values())

    def count(place: int, sign: int) -> None:
        for pair in zip(spelled[place], spelled[place][1:]):
            pairs[pair] += sign * counts[place]
            places[pair].add(place)
            if not pairs[pair]:
                del pairs[pair]

    for place in range(len(spelled)):
        count(place, 1)
    while len(merges) < limit and pairs:
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for place in sorted(places.pop(best)):
            count(place, -1)
            spelled[place] = _merge(spelled[place], best)
            count(place, 1)
    return merges


def _merge(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    merged, i = [], 0
    while i < len(word):
        step = 2 if word[i : i + 2] == pair else 1
        merged.append("".join(word[i : i + step]))
        i += step
    return tuple(merged)


def build_text_encoder(
    tokenizer: CLIPTokenizer, hidden_size: int = 128, num_layers: int = 2, num_heads: int = 4
) -> CLIPTextModel:
    """A freshly initialised ``CLIPTextModel`` that fits ``tokenizer``; its states are ``(batch, tokens, hidden_size)``."""
    begin, end, padding = mark_ids(tokenizer)
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden_size,
            intermediate_size=4 * hidden_size,
            num_hidden_layers=num_layers,
            num_attention_heads=num_heads,
            max_position_embeddings=tokenizer.model_max_length,
            projection_dim=hidden_size,
            bos_token_id=begin,
            eos_token_id=end,
            pad_token_id=padding,
        )
    )


def mark_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int, int]:
    """Token ids of the marks of begin and end, and of padding."""
    return cast(tuple[int, int, int], (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id))


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str], length: int | None = None) -> torch.Tensor:
    """Token ids padded to ``length``, by default the tokenizer's own, ``(len(texts), length)``."""
    length = length or tokenizer.model_max_length
    with TOKENIZING:
        batch = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return batch.input_ids


def tokenize_for(encoder: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> torch.Tensor:
    """
    What :func:`tokenize` gives, for a text encoder.

    Raises:
        ValueError: for tokens that the text encoder does not know.
    """
    ids, known = tokenize(tokenizer, texts), cast(torch.nn.Embedding, encoder.get_input_embeddings()).num_embeddings
    if (largest := int(ids.max())) >= known:
        raise ValueError(f"the tokenizer gives token {largest}, but the text encoder knows 0 to {known - 1}")
    return ids


def token_lists(tokenizer: PreTrainedTokenizerBase, texts: list[str], marks: bool = True) -> list[list[int]]:
    """Token ids of each text, neither cut nor padded, with or without the marks of begin and end."""
    with TOKENIZING:
        return tokenizer(texts, add_special_tokens=marks).input_ids
