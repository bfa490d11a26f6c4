"""What the networks have in common: the embedding of timestep, class and text, the checks of a call, and checkpointing."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.embeddings import TextTimeEmbedding, TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

# what a damaged configuration must not exceed, so that nothing takes all the memory
LARGEST, MOST = 2**20, {"sample_size": 2**13}


class AtlasNetwork(ModelMixin, AttentionMixin, ConfigMixin, PeftAdapterMixin):
    """
    A network that predicts noise, velocity or data from a noisy sample ``x_t`` and its timestep ``t``.

    Args:
        sample_size: height and width of a sample, in pixels (or latent pixels); any multiple of ``size_multiple`` may be passed
            to ``forward``.
        in_channels, out_channels: channels of the sample and of the prediction.
        cross_attention_dim: width of ``encoder_hidden_states``; ``None`` for a network without text.
        addition_embed_type: ``"text"`` adds an attention-pooled summary of ``encoder_hidden_states`` to the timestep
            embedding, as Diffusers' UNet does under this name.
        num_class_embeds: number of class labels; ``None`` for a network without classes. Guidance may use the extra
            label ``num_class_embeds`` as "no class".
        num_resolutions: resolutions that it was trained at, each half the one before.

    Raises:
        ValueError: for counts below 1, and an unknown ``addition_embed_type`` or one without text.
    """

    config: Any  # of the constructor's arguments, by Diffusers
    _supports_gradient_checkpointing = True
    _gradient_checkpointing_func: Callable[..., Any]  # Diffusers sets it together with gradient_checkpointing
    _skip_layerwise_casting_patterns = ["norm", "time_embedding", "class_embedding"]
    gradient_checkpointing = False

    def _check_config(self) -> None:
        c = self.config
        counts = [name for name, parameter in inspect.signature(type(self)).parameters.items()
                  if parameter.annotation in (int, int | None)]  # fmt: skip
        if bad := {name: c[name] for name in counts if c[name] is not None and c[name] < 1}:
            raise ValueError(f"{', '.join(f'{name}={value}' for name, value in bad.items())}; expected at least 1")
        if large := {name: c[name] for name in counts if c[name] is not None and c[name] > MOST.get(name, LARGEST)}:
            told = ", ".join(f"{name}={value}; expected at most {MOST.get(name, LARGEST)}" for name, value in large.items())
            raise ValueError(told)
        if c.addition_embed_type not in (None, "text"):
            raise ValueError(f"addition_embed_type={c.addition_embed_type!r}; allowed are None and 'text'")

    def _build_conditions(self, features: int, width: int, cond_proj_dim: int | None = None) -> None:
        """Embeddings of that width, of the timestep by so many sines."""
        c = self.config
        self.time_proj = Timesteps(features, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(features, width, cond_proj_dim=cond_proj_dim)
        self.class_embedding = nn.Embedding(c.num_class_embeds + 1, width) if c.num_class_embeds is not None else None
        self.add_embedding = TextTimeEmbedding(c.cross_attention_dim, width, c.num_heads) if c.addition_embed_type else None

    def embed(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        encoder_hidden_states: torch.Tensor | None,
        class_labels: torch.Tensor | None,
        timestep_cond: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        The sum of the embeddings that a network has: of the timestep, of the class, of the pooled text; ``(batch, width)``.

        Raises:
            ValueError: for a network with classes and no labels.
        """
        timestep = torch.as_tensor(timestep, device=sample.device).expand(sample.shape[0])
        emb = self.time_embedding(self.time_proj(timestep).to(sample.dtype), timestep_cond)
        if self.class_embedding is not None:
            if class_labels is None:
                raise ValueError(f"class_labels are required: num_class_embeds={self.config.num_class_embeds}")
            emb = emb + self.class_embedding(class_labels).to(sample.dtype)
        if self.add_embedding is not None:
            emb = emb + self.add_embedding(encoder_hidden_states)
        return emb

    @property
    def size_multiple(self) -> int:
        """Height and width of a sample must be multiples of this."""
        raise NotImplementedError

    @property
    def reads_text(self) -> bool:
        """Whether it has a use for ``encoder_hidden_states``."""
        raise NotImplementedError

    def check_inputs(self, sample: torch.Tensor, encoder_hidden_states: torch.Tensor | None) -> None:
        """Raise ``ValueError`` if the sample's shape or the text states do not fit this network."""
        channels, multiple = self.config.in_channels, self.size_multiple
        if sample.ndim != 4 or sample.shape[1] != channels:
            raise ValueError(f"sample has shape {tuple(sample.shape)}; expected (batch, {channels}, height, width)")
        if sample.shape[2] % multiple or sample.shape[3] % multiple:
            raise ValueError(f"sample is {sample.shape[2]}x{sample.shape[3]}; both sides must be multiples of {multiple}")
        if self.reads_text:
            found = None if encoder_hidden_states is None else tuple(encoder_hidden_states.shape)
            if found is None or len(found) != 3 or found[-1] != self.config.cross_attention_dim:
                width = self.config.cross_attention_dim
                raise ValueError(f"encoder_hidden_states: expected (batch, tokens, {width}), got {found}")

    def _run(self, block: nn.Module, *args: Any) -> Any:
        """``block(*args)``, which forgets its activations until the backward pass where memory is to be saved."""
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, *args)
        return block(*args)
