"""
Tiny random pipelines of Diffusers' own classes, built from configs without a hub, and how each of them is called.

Pictures are 64x64 pixels, latents 8x8; the autoencoder has the real one's factor of 8.
"""

import functools
import gzip
import logging
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

import diffusers
import numpy as np
import torch
from conftest import seeded
from open_clip.tokenizer import bytes_to_unicode, default_bpe
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

import atlas_diffusers

SIZE = 64
PROMPT, NEGATIVE = "a photo of a red heart", "blurry"
MERGES = 600
WIDTH = 16

# the scheduler_config.json of the published models, without the keys that say nothing
STABLE_DIFFUSION = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.42.1",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "trained_betas": None,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}
STABLE_DIFFUSION_XL = {
    **STABLE_DIFFUSION,
    "_class_name": "EulerDiscreteScheduler",
    "interpolation_type": "linear",
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "timestep_spacing": "leading",
    "use_karras_sigmas": False,
}
ANIMATEDIFF = {
    **STABLE_DIFFUSION,
    "_class_name": "DDIMScheduler",
    "beta_schedule": "linear",
    "timestep_spacing": "linspace",
}


def deterministic(build):
    """The same weights every time, built once, and the global random state left alone."""

    @functools.cache
    def built(*args, **kwargs):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return build(*args, **kwargs)

    return built


@functools.cache
def build_clip_tokenizer() -> CLIPTokenizer:
    """CLIP's own tokenizer with its first merges, from the file that open_clip brings."""
    with gzip.open(default_bpe(), "rt", encoding="utf-8") as file:
        merges = [tuple(line.split()) for line in file.read().splitlines()[1 : MERGES + 1]]
    symbols = list(bytes_to_unicode().values())
    tokens = [*symbols, *(s + "</w>" for s in symbols), *map("".join, merges), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=merges, model_max_length=77)


@deterministic
def build_clip_text_encoder(projection: bool = False):
    end = len(build_clip_tokenizer()) - 1
    config = CLIPTextConfig(
        vocab_size=end + 1,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=end - 1,
        eos_token_id=end,
        pad_token_id=end,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


@deterministic
def build_vae():
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4, 4, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=SIZE,
    )
    # untrained pictures are a flat grey, in which no difference shows
    torch.nn.init.normal_(vae.decoder.conv_out.weight, std=0.1)
    return vae.eval()


UNET = {
    "sample_size": SIZE // 8,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 2,
    "cross_attention_dim": WIDTH,
}
BLOCKS = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
XL = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + WIDTH,
    "transformer_layers_per_block": (1, 1),
    "use_linear_projection": True,
    "cross_attention_dim": 2 * WIDTH,
}


@deterministic
def build_unet(in_channels: int = 4, xl: bool = False):
    options = {**UNET, **(XL if xl else {})}
    return diffusers.UNet2DConditionModel(in_channels=in_channels, out_channels=4, **BLOCKS, **options).eval()


@deterministic
def build_controlnet():
    options = {key: value for key, value in UNET.items() if key != "sample_size"}
    controlnet = diffusers.ControlNetModel(
        in_channels=4, down_block_types=BLOCKS["down_block_types"], conditioning_embedding_out_channels=(4, 4, 8, 8), **options
    )
    # the branches start at zero, where a control picture does nothing
    for block in (*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block):
        torch.nn.init.normal_(block.weight, std=0.1)
    torch.nn.init.normal_(controlnet.controlnet_cond_embedding.conv_out.weight, std=0.1)
    return controlnet.eval()


@deterministic
def build_motion_unet():
    adapter = diffusers.MotionAdapter(
        block_out_channels=(8, 16), motion_layers_per_block=1, motion_norm_num_groups=4, motion_num_attention_heads=2
    )
    return adapter.eval(), diffusers.UNetMotionModel.from_unet2d(build_unet(), adapter).eval()


def build_picture() -> Image.Image:
    """Smooth colours with an edge."""
    y, x = np.mgrid[0:SIZE, 0:SIZE] / SIZE
    picture = np.stack([x, y, np.where(x + y > 1, 0.9, 0.2)], axis=-1)
    return Image.fromarray((255 * picture).astype(np.uint8))


def build_mask() -> Image.Image:
    mask = np.zeros((SIZE, SIZE), dtype=np.uint8)
    mask[16:48, 8:40] = 255
    return Image.fromarray(mask)


def _components() -> dict:
    return {
        "vae": build_vae(),
        "text_encoder": build_clip_text_encoder(),
        "tokenizer": build_clip_tokenizer(),
        "unet": build_unet(),
    }


def _stable_diffusion(cls, **changes):
    safety = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return lambda scheduler: cls(scheduler=scheduler, **safety, **_components() | {k: v() for k, v in changes.items()})


def _stable_diffusion_xl(scheduler):
    second = {"text_encoder_2": build_clip_text_encoder(projection=True), "tokenizer_2": build_clip_tokenizer()}
    components = {**_components(), **second, "unet": build_unet(xl=True)}
    return diffusers.StableDiffusionXLPipeline(scheduler=scheduler, add_watermarker=False, **components)


def _animatediff(scheduler):
    adapter, unet = build_motion_unet()
    components = {**_components(), "unet": unet, "motion_adapter": adapter}
    return diffusers.AnimateDiffPipeline(scheduler=scheduler, **components)


@dataclass(frozen=True)
class Kind:
    """``build(scheduler)`` makes the pipeline, ``config`` is its published scheduler, ``inputs()`` all but the prompt."""

    build: Callable
    config: dict
    inputs: Callable[[], dict]


SIZES = {"height": SIZE, "width": SIZE}
KINDS = {
    "text2img": Kind(_stable_diffusion(diffusers.StableDiffusionPipeline), STABLE_DIFFUSION, lambda: SIZES),
    "xl": Kind(_stable_diffusion_xl, STABLE_DIFFUSION_XL, lambda: SIZES),
    "img2img": Kind(
        _stable_diffusion(diffusers.StableDiffusionImg2ImgPipeline),
        STABLE_DIFFUSION,
        lambda: {"image": build_picture(), "strength": 0.75},
    ),
    "inpaint-9": Kind(
        _stable_diffusion(diffusers.StableDiffusionInpaintPipeline, unet=lambda: build_unet(in_channels=9)),
        STABLE_DIFFUSION,
        lambda: {"image": build_picture(), "mask_image": build_mask(), "strength": 1.0, **SIZES},
    ),
    "inpaint-4": Kind(
        _stable_diffusion(diffusers.StableDiffusionInpaintPipeline),
        STABLE_DIFFUSION,
        lambda: {"image": build_picture(), "mask_image": build_mask(), "strength": 0.75, **SIZES},
    ),
    "controlnet": Kind(
        _stable_diffusion(diffusers.StableDiffusionControlNetPipeline, controlnet=build_controlnet),
        STABLE_DIFFUSION,
        lambda: {"image": build_picture(), **SIZES},
    ),
    "animatediff": Kind(_animatediff, ANIMATEDIFF, lambda: {"num_frames": 2, **SIZES}),
}


def build_stock_pipeline(kind: str, **changes):
    """A pipeline with its published scheduler, whose config is changed as told; the weights are shared."""
    config = {**KINDS[kind].config, **changes}
    scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    return KINDS[kind].build(scheduler)


@dataclass
class Run:
    """``pictures`` in [0, 1], ``(batch, ..., height, width, 3)``; the latents after each network call, stacked."""

    pictures: torch.Tensor
    latents: torch.Tensor


def run(kind: str, pipeline, steps: int, **options) -> Run:
    """The pipeline's pictures and the way there."""
    latents = []

    def keep(pipeline, index, timestep, tensors):
        latents.append(tensors["latents"])
        return {}

    pipeline.set_progress_bar_config(disable=True)
    inputs = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "guidance_scale": 5.0, "generator": seeded(3)}
    arguments = {**inputs, **KINDS[kind].inputs(), **options, "num_inference_steps": steps}
    pictures = pipeline(**arguments, output_type="np", callback_on_step_end=keep)[0]
    return Run(torch.as_tensor(np.asarray(pictures)), torch.stack(latents))


STOCK = {
    "AtlasDDIMScheduler": "DDIMScheduler",
    "AtlasDDPMScheduler": "DDPMScheduler",
    "AtlasPNDMScheduler": "PNDMScheduler",
    "AtlasEulerScheduler": "EulerDiscreteScheduler",
    "AtlasEulerAncestralScheduler": "EulerAncestralDiscreteScheduler",
    "AtlasHeunScheduler": "HeunDiscreteScheduler",
}


def swap(pipeline, name: str, **changes):
    """What a user writes; ``name`` is one of our classes."""
    pipeline.scheduler = getattr(atlas_diffusers, name).from_config(pipeline.scheduler.config, **changes)
    return pipeline


@contextmanager
def silence():
    """
    Nothing inside may warn, by Diffusers' or our logger or by ``warnings``, not even a second time; but Diffusers' sigma
    types always make numpy 2 warn.
    """
    messages = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    loggers = [logging.getLogger(name) for name in ("diffusers", "atlas_diffusers")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            warnings.filterwarnings("ignore", "__array", DeprecationWarning)
            yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
    messages += [f"{w.filename}:{w.lineno}: {w.category.__name__}: {w.message}" for w in caught]
    assert not messages, "\n".join(messages)
