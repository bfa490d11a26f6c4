"""From prompts to the states that a network attends to."""

from .clip import build_text_encoder, build_tokenizer, token_lists, tokenize, tokenize_for
from .interface import CLIPConditioningInterface, TextEncoding

__all__ = [
    "CLIPConditioningInterface",
    "TextEncoding",
    "build_text_encoder",
    "build_tokenizer",
    "token_lists",
    "tokenize",
    "tokenize_for",
]
