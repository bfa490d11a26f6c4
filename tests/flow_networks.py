"""
Tiny networks of Diffusers' flow pipelines, built from configs, which all know the exact answer.

Each returns the velocity of N(1/2, 0.7²) in every coordinate, by the clock and with the sign of its pipeline, so that the end
of the probability-flow ODE is known for the noise that a pipeline drew.
"""

from collections.abc import Callable
from dataclasses import dataclass

import diffusers
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from stock_pipelines import deterministic

MEAN, DEVIATION = 0.5, 0.7
SIZE = 16
WIDTH = 8  # of a text embedding


def exact_velocity(x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """E[ε − x_0 | x_s = x] for x_s = (1 − s) x_0 + s ε and x_0 ~ N(MEAN, DEVIATION²)."""
    variance = (1 - s) ** 2 * DEVIATION**2 + s**2
    return (s - (1 - s) * DEVIATION**2) / variance * (x - (1 - s) * MEAN) - MEAN


def exact_end(x: torch.Tensor, s: float) -> torch.Tensor:
    """Where the ODE that goes through ``x`` at ``s`` ends."""
    variance = (1 - s) ** 2 * DEVIATION**2 + s**2
    return MEAN + DEVIATION * (x - (1 - s) * MEAN) / variance**0.5


@dataclass(frozen=True)
class Network:
    """
    A class of Diffusers with a tiny config, and how its pipeline speaks with it.

    ``clock`` is the noise level s of the time that it is given, ``sign`` that of the velocity that it returns; ``lists`` says
    that samples come and go as a list.
    """

    name: str
    clock: Callable
    config: dict
    sign: float = 1.0
    lists: bool = False

    def answer(self, hidden_states, timestep, *args, **kwargs) -> Transformer2DModelOutput:
        """The network's ``forward``."""
        x = torch.stack(hidden_states) if self.lists else hidden_states
        s = self.clock(timestep.to(x.dtype)).reshape(len(timestep), -1)
        s = s[..., None] if s.shape[1] > 1 else s.reshape(-1, *[1] * (x.ndim - 1))  # one a token, or one a sample
        velocity = self.sign * exact_velocity(x, s)
        return Transformer2DModelOutput(list(velocity) if self.lists else velocity)


@deterministic
def build_plain_network(family: str, copy: int = 0, **changes):
    """The network of a family with random weights, its config changed as told; another ``copy`` is another one."""
    return getattr(diffusers, NETWORKS[family].name)(**{**NETWORKS[family].config, **changes}).eval()


@deterministic
def build_network(family: str, copy: int = 0):
    """The same with the exact answer."""
    network = build_plain_network(family, copy)
    network.forward = NETWORKS[family].answer
    return network


def thousands(t):
    return t / 1000


def unit(t):
    return t


def from_data(t):
    """The time grows from the noise to the data."""
    return 1 - t


def shifted(t):
    """CogView4's network is given the times before the shift, which is μ = 5/8 for 64 tokens."""
    return 0.625 / (0.625 + 1000 / t - 1)


SMALL = {"num_layers": 1, "attention_head_dim": 8, "num_attention_heads": 1}
FOUR_CHANNELS = {"in_channels": 4, "out_channels": 4}

NETWORKS = {
    "SD3": Network(
        "SD3Transformer2DModel",
        thousands,
        {
            "sample_size": SIZE,
            "patch_size": 1,
            "caption_projection_dim": 8,
            "joint_attention_dim": WIDTH,
            "pooled_projection_dim": WIDTH,
            **SMALL,
        },
    ),
    "Flux": Network(
        "FluxTransformer2DModel",
        unit,
        {
            "num_single_layers": 1,
            "joint_attention_dim": WIDTH,
            "pooled_projection_dim": WIDTH,
            "axes_dims_rope": (2, 2, 4),
            **SMALL,
        },
    ),
    "Flux2": Network(
        "Flux2Transformer2DModel",
        unit,
        {
            "in_channels": 16,
            "num_single_layers": 1,
            "joint_attention_dim": WIDTH,
            "timestep_guidance_channels": 8,
            "axes_dims_rope": (2, 2, 2, 2),
            "guidance_embeds": False,
            **SMALL,
        },
    ),
    "Sana": Network(
        "SanaTransformer2DModel",
        thousands,
        {
            "num_cross_attention_heads": 1,
            "cross_attention_head_dim": 8,
            "cross_attention_dim": 8,
            "caption_channels": WIDTH,
            "sample_size": SIZE,
            **FOUR_CHANNELS,
            **SMALL,
        },
    ),
    "AuraFlow": Network(
        "AuraFlowTransformer2DModel",
        unit,
        {
            "sample_size": SIZE,
            "num_mmdit_layers": 1,
            "num_single_dit_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 1,
            "caption_projection_dim": 8,
            "joint_attention_dim": WIDTH,
            "pos_embed_max_size": 64,
        },
    ),
    "Lumina2": Network(
        "Lumina2Transformer2DModel",
        from_data,
        {
            "sample_size": SIZE,
            "in_channels": 4,
            "hidden_size": 8,
            "num_layers": 1,
            "num_refiner_layers": 1,
            "num_attention_heads": 1,
            "num_kv_heads": 1,
            "multiple_of": 8,
            "axes_dim_rope": (4, 2, 2),
            "cap_feat_dim": WIDTH,
        },
        sign=-1.0,
    ),
    "QwenImage": Network(
        "QwenImageTransformer2DModel",
        unit,
        {"in_channels": 16, "out_channels": 4, "joint_attention_dim": WIDTH, "axes_dims_rope": (4, 2, 2), **SMALL},
    ),
    "Z-Image": Network(
        "ZImageTransformer2DModel",
        from_data,
        {
            "in_channels": 4,
            "dim": 16,
            "n_layers": 1,
            "n_refiner_layers": 1,
            "n_heads": 1,
            "n_kv_heads": 1,
            "cap_feat_dim": WIDTH,
            "axes_dims": (8, 4, 4),
            "axes_lens": (32, 32, 32),
        },
        sign=-1.0,
        lists=True,
    ),
    "Chroma": Network(
        "ChromaTransformer2DModel",
        unit,
        {
            "in_channels": 16,
            "num_single_layers": 1,
            "joint_attention_dim": WIDTH,
            "axes_dims_rope": (2, 2, 4),
            "approximator_hidden_dim": 8,
            "approximator_layers": 1,
            "approximator_num_channels": 16,
            **SMALL,
        },
    ),
    "CogView4": Network(
        "CogView4Transformer2DModel",
        shifted,
        {"text_embed_dim": WIDTH, "time_embed_dim": 8, "condition_dim": 4, **FOUR_CHANNELS, **SMALL},
    ),
    "Krea2": Network(
        "Krea2Transformer2DModel",
        unit,
        {
            "in_channels": 16,
            "num_key_value_heads": 1,
            "intermediate_size": 8,
            "timestep_embed_dim": 8,
            "text_hidden_dim": WIDTH,
            "num_text_layers": 1,
            "text_num_attention_heads": 1,
            "text_num_key_value_heads": 1,
            "text_intermediate_size": 8,
            "axes_dims_rope": (4, 2, 2),
            **SMALL,
        },
    ),
    "PRX": Network(
        "PRXTransformer2DModel",
        unit,
        {"in_channels": 4, "context_in_dim": WIDTH, "hidden_size": 8, "num_heads": 1, "depth": 1, "axes_dim": (4, 4)},
    ),
    "Wan": Network(
        "WanTransformer3DModel",
        thousands,
        {"text_dim": WIDTH, "freq_dim": 8, "ffn_dim": 8, "rope_max_seq_len": 16, **FOUR_CHANNELS, **SMALL},
    ),
    "LTX": Network(
        "LTXVideoTransformer3DModel",
        thousands,
        {"cross_attention_dim": 8, "caption_channels": WIDTH, **FOUR_CHANNELS, **SMALL},
    ),
    "HunyuanVideo": Network(
        "HunyuanVideoTransformer3DModel",
        thousands,
        {
            "num_single_layers": 1,
            "num_refiner_layers": 1,
            "text_embed_dim": WIDTH,
            "pooled_projection_dim": WIDTH,
            "rope_axes_dim": (4, 2, 2),
            **FOUR_CHANNELS,
            **SMALL,
        },
    ),
    "Mochi": Network(
        "MochiTransformer3DModel",
        lambda t: 1 - t / 1000,
        {"pooled_projection_dim": 8, "text_embed_dim": WIDTH, "time_embed_dim": 8, "max_sequence_length": 4, **SMALL},
        sign=-1.0,
    ),
    "Kandinsky5": Network(
        "Kandinsky5Transformer3DModel",
        thousands,
        {
            "in_visual_dim": 4,
            "out_visual_dim": 4,
            "in_text_dim": WIDTH,
            "in_text_dim2": WIDTH,
            "time_dim": 8,
            "model_dim": 8,
            "ff_dim": 8,
            "num_text_blocks": 1,
            "num_visual_blocks": 1,
            "axes_dims": (2, 2, 4),
        },
    ),
    "StableAudio3": Network(
        "StableAudio3DiTModel",
        unit,
        {
            "io_channels": 8,
            "embed_dim": 8,
            "depth": 1,
            "num_heads": 1,
            "cond_token_dim": WIDTH,
            "global_cond_dim": WIDTH,
            "timestep_features_dim": 8,
        },
    ),
}
