"""What the networks share: the embedding of timestep, class and text, and the checks of a call's inputs."""

from typing import Any

import torch


def embed_conditions(
    network: Any,
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
    emb = network.time_embedding(network.time_proj(timestep).to(sample.dtype), timestep_cond)
    if network.class_embedding is not None:
        if class_labels is None:
            raise ValueError(f"class_labels are required: num_class_embeds={network.config.num_class_embeds}")
        emb = emb + network.class_embedding(class_labels).to(sample.dtype)
    if network.add_embedding is not None:
        emb = emb + network.add_embedding(encoder_hidden_states)
    return emb


def check_sample(sample: torch.Tensor, channels: int, multiple: int) -> None:
    """Raise ``ValueError`` unless ``sample`` is (batch, channels, height, width) with sides that are multiples."""
    if sample.ndim != 4 or sample.shape[1] != channels:
        raise ValueError(f"sample has shape {tuple(sample.shape)}; expected (batch, {channels}, height, width)")
    if sample.shape[2] % multiple or sample.shape[3] % multiple:
        raise ValueError(f"sample is {sample.shape[2]}x{sample.shape[3]}; both sides must be multiples of {multiple}")


def check_text_states(encoder_hidden_states: torch.Tensor | None, width: int) -> None:
    """Raise ``ValueError`` unless the text states are (batch, tokens, width)."""
    found = None if encoder_hidden_states is None else tuple(encoder_hidden_states.shape)
    if found is None or len(found) != 3 or found[-1] != width:
        raise ValueError(f"encoder_hidden_states: expected (batch, tokens, {width}), got {found}")
