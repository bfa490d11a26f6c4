"""What prompts and references read of a pipeline."""

from typing import Any, Protocol

import torch
from diffusers.image_processor import VaeImageProcessor


class PipelineParts(Protocol):
    """A pipeline's components, and how it encodes texts and pictures."""

    unet: Any
    vae: Any
    text_encoder: Any
    tokenizer: Any
    image_processor: VaeImageProcessor
    vae_scale_factor: int

    @property
    def has_text(self) -> bool: ...

    @property
    def _execution_device(self) -> torch.device: ...

    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        device: torch.device | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        lora_scale: float | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]: ...
