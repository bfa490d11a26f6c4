"""Text conditioning by CLIP towers of transformers or open_clip, with a cache."""

from abc import ABC, abstractmethod
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers.utils import logging
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config import ConditioningConfig
from .clip import mark_ids, token_lists, tokenize

logger = logging.get_logger(__name__)


class TextEncoding(NamedTuple):
    """
    What a tower makes of prompts: ``hidden_states`` (n, tokens, width), ``pooled`` (n, projection), and ``mask`` (n, tokens),
    true up to the end-of-text mark of each chunk.
    """

    hidden_states: torch.Tensor
    pooled: torch.Tensor
    mask: torch.Tensor


class CLIPConditioningInterface:
    """
    Encodes prompts, one by one, so that an encoding never depends on its batch mates, and keeps the last ones.

    Args:
        config: which tower. Folders and ``user/repository`` are transformers' ``CLIPTextModel`` with its tokenizer; other names
            are architectures of open_clip (extra `clip`), whose weights are a tag or a local file.
        text_encoder, tokenizer: a tower and its tokenizer instead, of either library.
        device: where it runs.

    Raises:
        ValueError: for a tower of another width than ``context_dim`` of a given configuration, or a tower without tokenizer;
            ``ImportError`` without open_clip.
    """

    def __init__(
        self,
        config: ConditioningConfig | None = None,
        text_encoder: Any = None,
        tokenizer: Any = None,
        device: str | torch.device = "cpu",
    ):
        if (text_encoder is None) != (tokenizer is None):
            raise ValueError("give a text_encoder and its tokenizer, or neither")
        self.config, self.device = config or ConditioningConfig(), torch.device(device)
        self._tower: _Tower | None = None
        if text_encoder is not None:
            self.config.refuse(["clip_model", "clip_pretrained"], "beside a text_encoder")
        if self.config.use_clip:
            model, tokenizer = _load(self.config) if text_encoder is None else (text_encoder, tokenizer)
            kind = _TransformersTower if hasattr(model, "config") else _OpenClipTower
            self._tower = kind(model.eval().to(self.device), tokenizer, self.config.max_length)
        self._cache: OrderedDict[str, TextEncoding] = OrderedDict()
        if config is not None and self._tower is not None:
            width = self._encode(self._tower, "").hidden_states.shape[-1]
            if width != config.context_dim:
                raise ValueError(f"context_dim={config.context_dim}, but the text encoder has states of width {width}")

    def encode_text(self, prompts: str | list[str]) -> TextEncoding:
        """
        Encode prompts; those longer than ``max_chunks`` chunks are cut, with a warning.

        Raises:
            ValueError: without prompts, for one that is no text, and where ``use_clip`` is false.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError(f"expected a text or a non-empty list of texts, got {prompts!r}")
        if self._tower is None:
            raise ValueError("this interface encodes no text: its configuration has use_clip=False")
        encodings = [self._cached(self._tower, prompt) for prompt in prompts]
        return TextEncoding(*(torch.stack([part.to(self.device) for part in parts]) for parts in zip(*encodings)))

    def build_conditioning_payload(
        self, prompts: str | list[str], negative_prompts: str | list[str] | None = None, guidance_scale: float | None = None
    ) -> dict[str, Any]:
        """
        What ``AdvancedHierarchicalDiffusionSampler.sample`` takes as ``conditioning``.

        Args:
            prompts: one a sample, or one for all.
            negative_prompts: the same of the unconditional half; by default empty.
            guidance_scale: by default the configuration's.

        Returns:
            ``encoder_hidden_states``, ``negative_encoder_hidden_states`` (n, tokens, width) and ``guidance_scale``.

        Raises:
            ValueError: for lists of unequal length.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        negative = [negative_prompts or ""] * len(prompts) if not isinstance(negative_prompts, list) else negative_prompts
        if len(negative) != len(prompts):
            raise ValueError(f"{len(negative)} negative prompts for {len(prompts)} prompts; expected one each")
        return {
            "encoder_hidden_states": self.encode_text(prompts).hidden_states,
            "negative_encoder_hidden_states": self.encode_text(negative).hidden_states,
            "guidance_scale": self.config.guidance_scale if guidance_scale is None else guidance_scale,
        }

    def clear_cache(self) -> None:
        """Forget encoded prompts."""
        self._cache.clear()

    def _cached(self, tower: "_Tower", prompt: str) -> TextEncoding:
        if prompt in self._cache:
            self._cache.move_to_end(prompt)
            return self._cache[prompt]
        encoding = self._encode(tower, prompt)
        if self.config.cache_size:
            self._cache[prompt] = TextEncoding(*(part.cpu() for part in encoding))
            if len(self._cache) > self.config.cache_size:
                self._cache.popitem(last=False)
        return encoding

    @torch.no_grad()
    def _encode(self, tower: "_Tower", prompt: str) -> TextEncoding:
        """Of one prompt, without the batch dimension: all chunks' states, and what the first pools to."""
        ids = tower.chunks(prompt, self.config.max_chunks).to(self.device)
        states, pooled = tower.encode(ids)
        ends = (ids == tower.end).int().argmax(1)
        mask = torch.arange(ids.shape[1], device=self.device) <= ends[:, None]
        return TextEncoding(states.flatten(0, 1).float(), pooled[0].float(), mask.flatten())


def _load(config: ConditioningConfig) -> tuple[Any, Any]:
    """A tower and its tokenizer, of transformers or of open_clip."""
    if "/" in config.clip_model or Path(config.clip_model).is_dir():
        from transformers import CLIPTextModel, CLIPTokenizer

        if config.clip_pretrained is not None:
            config.refuse(["clip_pretrained"], f"for clip_model={config.clip_model!r}, which has weights of its own")

        with torch.random.fork_rng():
            return CLIPTextModel.from_pretrained(config.clip_model), CLIPTokenizer.from_pretrained(config.clip_model)
    try:
        import open_clip
    except ImportError as error:
        raise ImportError(f"clip_model={config.clip_model!r} needs open_clip: pip install atlas-diffusers[clip]") from error
    if config.clip_model not in open_clip.list_models():
        raise ValueError(f"clip_model={config.clip_model!r} is no folder, hub id or one of open_clip.list_models()")
    with torch.random.fork_rng():
        model = open_clip.create_model(config.clip_model, pretrained=config.clip_pretrained)
    return model, open_clip.get_tokenizer(config.clip_model)


class _Tower(ABC):
    """A text encoder with its tokenizer; ``start`` and ``end`` mark a chunk of ``length`` tokens, ``pad`` fills it."""

    start: int
    end: int
    pad: int
    length: int

    @abstractmethod
    def tokens(self, prompt: str) -> list[int]:
        """All tokens of a prompt, without marks."""

    @abstractmethod
    def whole(self, prompt: str) -> torch.Tensor:
        """Token ids of a prompt that is cut to one chunk, (1, length)."""

    @abstractmethod
    def encode(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """States (chunks, length, width) and what they pool to (chunks, projection)."""

    def chunks(self, prompt: str, count: int) -> torch.Tensor:
        """Token ids, (count, length)."""
        tokens, room = self.tokens(prompt), self.length - 2
        if len(tokens) > count * room:
            logger.warning(f"a prompt of {len(tokens)} tokens is cut after {count * room}: {prompt!r}")
        if count == 1:
            return self.whole(prompt)
        parts = [tokens[i * room : (i + 1) * room] for i in range(count)]
        rows = [[self.start, *part, self.end, *[self.pad] * (room - len(part))] for part in parts]
        return torch.tensor(rows)


class _TransformersTower(_Tower):
    def __init__(self, encoder: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, length: int | None):
        self.encoder, self.tokenizer, self.length = encoder, tokenizer, length or tokenizer.model_max_length
        self.start, self.end, self.pad = mark_ids(tokenizer)
        places = encoder.config.max_position_embeddings
        if self.length > places:
            raise ValueError(f"max_length={self.length}, but the text encoder has {places} places")

    def tokens(self, prompt: str) -> list[int]:
        return token_lists(self.tokenizer, [prompt], marks=False)[0]

    def whole(self, prompt: str) -> torch.Tensor:
        return tokenize(self.tokenizer, [prompt], self.length)

    def encode(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        output = self.encoder(ids)
        return output.last_hidden_state, output.pooler_output


class _OpenClipTower(_Tower):
    pad = 0

    def __init__(self, model: Any, tokenizer: Any, length: int | None):
        self.model, self.tokenizer = model, tokenizer
        self.length = length or tokenizer.context_length
        start, end = (getattr(tokenizer, name, None) for name in ("sot_token_id", "eot_token_id"))
        self.text = getattr(model, "text", model)
        if not hasattr(self.text, "ln_final") or start is None or end is None:
            raise ValueError(f"{type(self.text).__name__} is no text tower with end-of-text pooling; use transformers for it")
        self.start, self.end = start, end

    def tokens(self, prompt: str) -> list[int]:
        return self.tokenizer.encode(prompt)

    def whole(self, prompt: str) -> torch.Tensor:
        return self.tokenizer([prompt], self.length)

    def encode(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The states as they leave the last normalisation of the library's own forward pass."""
        seen = []
        handle = self.text.ln_final.register_forward_hook(lambda module, args, output: seen.append(output))
        try:
            pooled = self.model.encode_text(ids)
        finally:
            handle.remove()
        return seen[0], pooled
