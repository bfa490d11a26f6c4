"""Tiny pipelines of Diffusers with all their text encoders, one a family that can be trained, as folders."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from flow_networks import WIDTH, build_plain_network
from flow_pipelines import build_vae
from stock_pipelines import (
    build_clip_text_encoder,
    build_clip_tokenizer,
    build_stock_pipeline,
    deterministic,
)
from stock_pipelines import build_vae as build_stock_vae
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer, T5Config, T5EncoderModel, T5Tokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyz"
T5_WIDTH, CLIP_WIDTH = 32, 16


def build_t5_tokenizer() -> T5Tokenizer:
    """One letter a token."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((letter, -3.0) for letter in LETTERS)]
    return T5Tokenizer(vocab=pieces, extra_ids=0)


@deterministic
def build_t5(width: int = T5_WIDTH) -> T5EncoderModel:
    config = T5Config(vocab_size=32, d_model=width, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    return T5EncoderModel(config).eval()


def build_gemma_tokenizer() -> GemmaTokenizer:
    """One letter a token."""
    names = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *LETTERS]
    return GemmaTokenizer(vocab={name: number for number, name in enumerate(names)}, merges=[], add_bos_token=True)


@deterministic
def build_gemma() -> Gemma2Model:
    config = Gemma2Config(
        vocab_size=40, hidden_size=WIDTH, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, head_dim=8, pad_token_id=0, eos_token_id=1, bos_token_id=2,
    )  # fmt: skip
    return Gemma2Model(config).eval()


@deterministic
def build_dc_vae() -> diffusers.AutoencoderDC:
    """Two pixels a latent."""
    options = {"in_channels": 3, "latent_channels": 4, "attention_head_dim": 2, "scaling_factor": 0.4}
    for side in ("encoder", "decoder"):
        options |= {
            f"{side}_block_types": ("ResBlock", "EfficientViTBlock"), f"{side}_block_out_channels": (8, 8),
            f"{side}_qkv_multiscales": ((), (5,)), f"{side}_layers_per_block": (1, 1),
        }  # fmt: skip
    return diffusers.AutoencoderDC(downsample_block_type="conv", upsample_block_type="interpolate", **options).eval()


@deterministic
def build_pixart_transformer() -> diffusers.PixArtTransformer2DModel:
    return diffusers.PixArtTransformer2DModel(
        sample_size=8, num_layers=1, patch_size=2, attention_head_dim=8, num_attention_heads=2, caption_channels=WIDTH,
        in_channels=4, out_channels=8, cross_attention_dim=16, use_additional_conditions=False,
    ).eval()  # fmt: skip


def _towers(projections: dict[str, bool]) -> dict[str, Any]:
    """CLIP towers by the end of their names."""
    parts = {}
    for end, projection in projections.items():
        parts |= {f"text_encoder{end}": build_clip_text_encoder(projection), f"tokenizer{end}": build_clip_tokenizer()}
    return parts


def _t5(end: str = "", width: int = T5_WIDTH) -> dict[str, Any]:
    return {f"text_encoder{end}": build_t5(width), f"tokenizer{end}": build_t5_tokenizer()}


def build_stable_diffusion_3():
    sizes = {"joint_attention_dim": T5_WIDTH, "pooled_projection_dim": 2 * CLIP_WIDTH, "pos_embed_max_size": 16}
    return diffusers.StableDiffusion3Pipeline(
        transformer=build_plain_network("SD3", **sizes),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        **_towers({"": True, "_2": True}), **_t5("_3"), **build_vae(),
    )  # fmt: skip


def build_flux(guidance: bool = True):
    sizes = {"joint_attention_dim": T5_WIDTH, "pooled_projection_dim": CLIP_WIDTH, "guidance_embeds": guidance}
    return diffusers.FluxPipeline(
        transformer=build_plain_network("Flux", **sizes),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        **_towers({"": False}), **_t5("_2"), **build_vae(),
    )  # fmt: skip


def build_pixart():
    scheduler = diffusers.DPMSolverMultistepScheduler()
    parts = {"vae": build_stock_vae(), "transformer": build_pixart_transformer(), "scheduler": scheduler}
    return diffusers.PixArtAlphaPipeline(**parts, **_t5(width=WIDTH))


def build_sana():
    return diffusers.SanaPipeline(
        tokenizer=build_gemma_tokenizer(),
        text_encoder=build_gemma(),
        vae=build_dc_vae(),
        transformer=build_plain_network("Sana"),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


@dataclass(frozen=True)
class Trainable:
    """``build()`` makes the pipeline, which trains on pictures of ``resolution`` pixels; ``call`` are arguments of its call."""

    build: Callable[[], Any]
    resolution: int
    call: dict[str, Any] = field(default_factory=dict)


NO_BINNING = {"use_resolution_binning": False}
TRAINABLE = {
    "SD": Trainable(lambda: build_stock_pipeline("text2img"), 64),
    "SDXL": Trainable(lambda: build_stock_pipeline("xl"), 64),
    "SD3": Trainable(build_stable_diffusion_3, 16),
    "Flux": Trainable(build_flux, 16),
    "PixArt": Trainable(build_pixart, 64, NO_BINNING),
    "Sana": Trainable(build_sana, 32, NO_BINNING),
}


def save_trainable(kind: str, folder: Path) -> Path:
    """The pipeline's folder."""
    with torch.random.fork_rng():
        TRAINABLE[kind].build().save_pretrained(folder / kind)
    return folder / kind
