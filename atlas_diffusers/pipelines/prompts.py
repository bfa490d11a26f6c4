"""What pictures a call asks for, and what the network is conditioned on for them."""

from dataclasses import dataclass

import torch

from ..denoising.guidance import Conditions
from .interface import PipelineParts


def reads_text(config: dict) -> bool:
    """Whether a network of this configuration attends to text states."""
    has_levels = config.get("cross_attention_levels", True) or config.get("addition_embed_type")
    return config.get("cross_attention_dim") is not None and bool(has_levels)


@dataclass(frozen=True)
class Prompts:
    """
    Prompts and labels of a call, as of ``AtlasPipeline.__call__``.

    Args:
        prompt, negative_prompt: texts.
        class_labels: integer labels, one a prompt.
        prompt_embeds, negative_prompt_embeds: text states instead of texts.
        copies: pictures of each prompt or label, next to each other.
    """

    prompt: str | list[str] | None = None
    negative_prompt: str | list[str] | None = None
    class_labels: int | list[int] | torch.Tensor | None = None
    prompt_embeds: torch.Tensor | None = None
    negative_prompt_embeds: torch.Tensor | None = None
    copies: int = 1

    @property
    def count(self) -> int:
        """Number of prompts or labels, 1 without either."""
        if isinstance(self.prompt, list):
            return len(self.prompt)
        if self.prompt_embeds is not None:
            return len(self.prompt_embeds)
        if self.class_labels is not None and self.prompt is None:
            return torch.as_tensor(self.class_labels).numel()
        return 1

    @property
    def batch(self) -> int:
        """Number of pictures."""
        return self.count * self.copies

    @property
    def are_given(self) -> bool:
        """Whether there is a condition that guidance could strengthen."""
        return any(value is not None for value in (self.prompt, self.class_labels, self.prompt_embeds))

    @property
    def given_negatives(self) -> list[str]:
        """Names of what guidance would lead away from, where there is some."""
        return [name for name in ("negative_prompt", "negative_prompt_embeds") if getattr(self, name) is not None]

    def check(self, pipeline: PipelineParts) -> None:
        """Raise ``ValueError`` for the first of them that the pipeline cannot use."""
        self._check_texts(pipeline)
        self._check_labels(getattr(pipeline.unet.config, "num_class_embeds", None))
        if self.copies < 1:
            raise ValueError(f"num_images_per_prompt={self.copies}; expected at least 1")

    def _check_texts(self, pipeline: PipelineParts) -> None:
        given = {"prompt": self.prompt, "prompt_embeds": self.prompt_embeds, "negative_prompt": self.negative_prompt}
        if not pipeline.has_text and (unused := [name for name, value in given.items() if value is not None]):
            raise ValueError(f"this pipeline's network takes no text, but {unused} were given")
        for name, value in (("prompt", self.prompt), ("negative_prompt", self.negative_prompt)):
            is_list = isinstance(value, list) and value and all(isinstance(text, str) for text in value)
            if not (value is None or isinstance(value, str) or is_list):
                raise ValueError(f"{name} must be a text or a non-empty list of texts, got {value!r}")
        states, negative_states = self.prompt_embeds, self.negative_prompt_embeds
        if self.prompt is not None and states is not None:
            raise ValueError("give prompt or prompt_embeds, not both")
        if self.negative_prompt is not None and negative_states is not None:
            raise ValueError("give negative_prompt or negative_prompt_embeds, not both")
        for part in ("text_encoder", "tokenizer"):
            if pipeline.has_text and states is None and getattr(pipeline, part) is None:
                raise ValueError(f"this pipeline has no {part}; give prompt_embeds")
        count = Prompts(self.prompt, prompt_embeds=states).count
        if isinstance(self.negative_prompt, list) and len(self.negative_prompt) not in (1, count):
            raise ValueError(f"{len(self.negative_prompt)} negative prompts for {count} prompts; expected 1 or {count}")
        if states is not None and negative_states is not None and states.shape != negative_states.shape:
            shapes = tuple(states.shape), tuple(negative_states.shape)
            raise ValueError(f"prompt_embeds and negative_prompt_embeds differ in shape: {shapes[0]} and {shapes[1]}")

    def _check_labels(self, classes: int | None) -> None:
        if self.class_labels is None:
            return
        if classes is None:
            raise ValueError("class_labels were given, but this pipeline's network has no classes")
        labels = torch.as_tensor(self.class_labels)
        if labels.numel() != self.count:
            raise ValueError(f"{labels.numel()} class_labels for {self.count} prompts; expected one each")
        if labels.is_floating_point() or labels.min() < 0 or labels.max() >= classes:
            raise ValueError(f"class_labels must be integers from 0 to {classes - 1}, got {labels.flatten().tolist()}")

    def encode(
        self, pipeline: PipelineParts, guided: bool, lora_scale: float | None = None
    ) -> tuple[Conditions, Conditions | None]:
        """What the network is conditioned on for the whole batch and, where it is guided, what stands for no condition."""
        device = pipeline._execution_device
        conditions: dict[str, torch.Tensor | None] = {"encoder_hidden_states": None}
        unconditional: dict[str, torch.Tensor | None] = {"encoder_hidden_states": None}
        if pipeline.has_text:
            texts = [""] * self.count if self.prompt is None and self.prompt_embeds is None else self.prompt
            conditions["encoder_hidden_states"], unconditional["encoder_hidden_states"] = pipeline.encode_prompt(
                texts, device, self.copies, guided, self.negative_prompt, self.prompt_embeds, self.negative_prompt_embeds,
                lora_scale,
            )  # fmt: skip
        if (classes := getattr(pipeline.unet.config, "num_class_embeds", None)) is not None:
            # the label after the last one stands for "no class"
            given = [classes] * self.count if self.class_labels is None else self.class_labels
            labels = torch.as_tensor(given, device=device).reshape(-1).long().repeat_interleave(self.copies)
            conditions["class_labels"], unconditional["class_labels"] = labels, torch.full_like(labels, classes)
        return conditions, unconditional if guided else None
