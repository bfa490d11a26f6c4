"""From prompts and labels to what the network is conditioned on."""

import torch
from diffusers.utils import logging
from diffusers.utils.peft_utils import scale_lora_layers, unscale_lora_layers

from ..conditioning import tokenize
from .inputs import batch_size_of

logger = logging.get_logger(__name__)


def reads_text(config: dict) -> bool:
    """Whether a network of this configuration attends to text states."""
    has_levels = config.get("cross_attention_levels", True) or config.get("addition_embed_type")
    return config.get("cross_attention_dim") is not None and bool(has_levels)


class ConditioningMixin:
    """Prompts and class labels of a pipeline with ``unet``, ``text_encoder`` and ``tokenizer``."""

    @property
    def has_text(self) -> bool:
        """Whether the network attends to a prompt."""
        return reads_text(self.unet.config)

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
    ):
        """
        Text states of prompts and negative prompts, ``(batch * num_images_per_prompt, tokens, width)`` each.

        Args:
            prompt, negative_prompt: texts; one negative prompt serves all prompts, ``None`` is the empty text.
            device: where the states are wanted.
            num_images_per_prompt: copies of each prompt, next to each other.
            do_classifier_free_guidance: without it the negative states are ``None``.
            prompt_embeds, negative_prompt_embeds: states made before; take the place of the texts.
            lora_scale: scale of the text encoder's LoRA layers.
        """
        device = device or self._execution_device
        if lora_scale is not None and self.text_encoder is not None:
            self._lora_scale = lora_scale
            scale_lora_layers(self.text_encoder, lora_scale)
        if prompt_embeds is None:
            prompt_embeds = self._encode([prompt] if isinstance(prompt, str) else prompt, device)
        count = len(prompt_embeds)
        if do_classifier_free_guidance and negative_prompt_embeds is None:
            negative = [negative_prompt or ""] * count if not isinstance(negative_prompt, list) else negative_prompt
            negative_prompt_embeds = self._encode(negative, device)
        prompt_embeds = prompt_embeds.to(device).repeat_interleave(num_images_per_prompt, dim=0)
        if do_classifier_free_guidance:
            negative_prompt_embeds = negative_prompt_embeds.to(device).expand(count, -1, -1)
            negative_prompt_embeds = negative_prompt_embeds.repeat_interleave(num_images_per_prompt, dim=0)
        if lora_scale is not None and self.text_encoder is not None:
            unscale_lora_layers(self.text_encoder, lora_scale)
        return prompt_embeds, negative_prompt_embeds

    def _encode(self, texts: list[str], device: torch.device) -> torch.Tensor:
        limit = self.tokenizer.model_max_length
        cut = [text for text in texts if len(self.tokenizer(text).input_ids) > limit]
        if cut:
            logger.warning(f"prompts longer than {limit} tokens are cut at the end: {cut}")
        ids = tokenize(self.tokenizer, texts).to(device)
        return self.text_encoder(ids).last_hidden_state.to(self.unet.dtype)

    def _conditions(
        self, prompt, negative_prompt, class_labels, prompt_embeds, negative_prompt_embeds, repeats, lora_scale, device
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Text states and labels of the whole batch; with guidance the unconditional half comes first."""
        groups = batch_size_of(prompt, class_labels, prompt_embeds)
        guided = self.do_classifier_free_guidance
        labels = self._class_labels(class_labels, groups, repeats, device)
        if guided and labels is not None:
            labels = torch.cat([torch.full_like(labels, self.unet.config.num_class_embeds), labels])
        if not self.has_text:
            return None, labels
        if prompt is None and prompt_embeds is None:
            prompt = [""] * groups
        states, negative = self.encode_prompt(
            prompt, device, repeats, guided, negative_prompt, prompt_embeds, negative_prompt_embeds, lora_scale
        )
        return (torch.cat([negative, states]) if guided else states), labels

    def _class_labels(self, class_labels, batch: int, repeats: int, device: torch.device) -> torch.Tensor | None:
        """Labels of the whole batch; without any, the label that stands for "no class"."""
        count = getattr(self.unet.config, "num_class_embeds", None)
        if count is None:
            return None
        labels = torch.as_tensor([count] * batch if class_labels is None else class_labels, device=device)
        return labels.reshape(-1).long().repeat_interleave(repeats)
