"""From prompts to the states that a network attends to."""

from .clip import build_text_encoder, build_tokenizer, tokenize

__all__ = ["build_text_encoder", "build_tokenizer", "tokenize"]
