"""
Tiny pipelines of Diffusers that sample a flow, built without a hub, and how each of them is called.

Prompts are embeddings (test_drop_in_flow_text.py has texts); samples have 16x16 latents or fewer, and ten network calls.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field

import diffusers
import numpy as np
import torch
from conftest import seeded
from diffusers.modular_pipelines.flux.modular_blocks_flux import FluxCoreDenoiseStep
from diffusers.modular_pipelines.stable_diffusion_3.modular_blocks_stable_diffusion_3 import StableDiffusion3AutoCoreDenoiseStep
from diffusers.pipelines.stable_audio_3.modeling_stable_audio_3 import StableAudio3DurationEmbedder
from flow_networks import SIZE, WIDTH, build_network, exact_end
from PIL import Image
from stock_pipelines import deterministic

# ------------------------------------------------------------------ inputs


def embeddings(*shape: int) -> torch.Tensor:
    return torch.randn(1, *shape, generator=seeded(1))


def build_picture(size: int = SIZE) -> Image.Image:
    """Smooth colours."""
    y, x = np.mgrid[0:size, 0:size] / size
    return Image.fromarray((255 * np.stack([x, y, 1 - x], axis=-1)).astype(np.uint8))


def build_mask() -> Image.Image:
    """The lower half is painted anew."""
    mask = np.zeros((SIZE, SIZE), dtype=np.uint8)
    mask[SIZE // 2 :] = 255
    return Image.fromarray(mask)


def _text(pixels: int = 8 * SIZE, **more) -> Callable[[], dict]:
    """Inputs of a pipeline whose pixels are eight times its latents, unless told otherwise."""
    return lambda: {"prompt_embeds": embeddings(4, WIDTH), "height": pixels, "width": pixels, **more}


def _masked(**more) -> Callable[[], dict]:
    return _text(prompt_attention_mask=torch.ones(1, 4), guidance_scale=1.0, **more)


def _pooled(**more) -> Callable[[], dict]:
    return _text(**{"pixels": SIZE, "pooled_prompt_embeds": embeddings(WIDTH), "guidance_scale": 1.0, **more})


def _video(pixels: int = 64, **more) -> Callable[[], dict]:
    return _masked(pixels=pixels, num_frames=9, **more)


PICTURE = {"image": build_picture(), "strength": 0.75}
PICTURE_AND_MASK = {"mask_image": build_mask(), **PICTURE}
NO_BINNING = {"use_resolution_binning": False}
KANDINSKY5 = {
    "prompt_embeds_qwen": embeddings(4, WIDTH),
    "prompt_embeds_clip": embeddings(WIDTH),
    "prompt_cu_seqlens": torch.tensor([0, 4]),
    "guidance_scale": 1.0,
    "height": 1024,
    "width": 1024,
}

# ------------------------------------------------------------------ components

ONE_BLOCK = {"block_out_channels": (4,), "norm_num_groups": 1, "sample_size": SIZE}


@deterministic
def build_vae() -> dict:
    vae = diffusers.AutoencoderKL(latent_channels=16, shift_factor=0.1, scaling_factor=1.5, **ONE_BLOCK)
    return {"vae": vae.eval()}


@deterministic
def build_flux2_vae() -> dict:
    blocks = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    return {"vae": diffusers.AutoencoderKLFlux2(latent_channels=4, **blocks, **ONE_BLOCK).eval()}


@deterministic
def build_ltx_vae() -> dict:
    """Of no use but for its encoder, four pixels a latent."""
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=4,
        block_out_channels=(4, 4, 4, 4),
        decoder_block_out_channels=(4, 4, 4, 4),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        patch_size=1,
    )
    return {"vae": vae.eval()}


@deterministic
def build_audio() -> dict:
    vae = diffusers.AutoencoderSAME(
        patch_size=2,
        encoder_channels=8,
        encoder_c_mults=(2,),
        encoder_strides=(2,),
        encoder_transformer_depths=(1,),
        latent_dim=8,
        dim_heads=4,
        sampling_rate=512,
    )
    return {"vae": vae, "duration_embedder": StableAudio3DurationEmbedder(output_dim=WIDTH, fourier_dim=8)}


def _two_experts() -> dict:
    return {"transformer_2": build_network("Wan", copy=1), "boundary_ratio": 0.875}


# ------------------------------------------------------------------ pipelines


def _pipeline(name: str, family: str, others: Callable[[], dict] = dict) -> Callable:
    """``build(scheduler)`` of a pipeline with its network and ``others()``; what else its constructor asks for is none."""

    def build(scheduler):
        cls = getattr(diffusers, name)
        asked = [p.name for p in inspect.signature(cls).parameters.values() if p.default is p.empty]
        return cls(**dict.fromkeys(asked) | {"transformer": build_network(family), "scheduler": scheduler, **others()})

    return build


def _modular(blocks, family: str) -> Callable:
    """``build(scheduler)`` of a modular pipeline from embeddings to latents."""

    def build(scheduler):
        pipeline = blocks().init_pipeline()
        pipeline.update_components(transformer=build_network(family), scheduler=scheduler)
        return pipeline

    return build


@dataclass(frozen=True)
class Kind:
    """
    ``build(scheduler)`` makes the pipeline, ``inputs()`` is what it is called with, ``config`` what its published scheduler
    sets; ``steps`` make ten calls, and ``part`` selects the coordinates that are denoised from beginning to end.
    """

    build: Callable
    inputs: Callable[[], dict]
    config: dict = field(default_factory=dict)
    steps: int = 10
    part: tuple = (...,)


SHIFT = {"shift": 3.0}
DYNAMIC = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "shift": 3.0}
COGVIEW4 = {"use_dynamic_shifting": True, "base_shift": 0.25, "max_shift": 0.75, "time_shift_type": "linear"}
QWEN = {**DYNAMIC, "max_shift": 0.9, "max_image_seq_len": 8192, "shift": 1.0, "shift_terminal": 0.02}
LOWER_ROWS = (..., slice(SIZE // 2, None), slice(None))
LOWER_TOKENS = (slice(None), slice(SIZE**2 // 8, None))
MASK = {"prompt_embeds_mask": torch.ones(1, 4)}

KINDS = {
    "SD3": Kind(_pipeline("StableDiffusion3Pipeline", "SD3", build_vae), _pooled(), SHIFT),
    "SD3 img2img": Kind(_pipeline("StableDiffusion3Img2ImgPipeline", "SD3", build_vae), _pooled(**PICTURE), SHIFT, 13),
    "SD3 inpaint": Kind(
        _pipeline("StableDiffusion3InpaintPipeline", "SD3", build_vae), _pooled(**PICTURE_AND_MASK), SHIFT, 13, LOWER_ROWS
    ),
    "SD3 modular": Kind(
        _modular(StableDiffusion3AutoCoreDenoiseStep, "SD3"), _text(pooled_prompt_embeds=embeddings(WIDTH)), SHIFT
    ),
    "Flux": Kind(_pipeline("FluxPipeline", "Flux", build_vae), _pooled(), DYNAMIC),
    "Flux schnell": Kind(_pipeline("FluxPipeline", "Flux", build_vae), _pooled()),
    "Flux img2img": Kind(_pipeline("FluxImg2ImgPipeline", "Flux", build_vae), _pooled(**PICTURE), DYNAMIC, 13),
    "Flux inpaint": Kind(
        _pipeline("FluxInpaintPipeline", "Flux", build_vae), _pooled(**PICTURE_AND_MASK), DYNAMIC, 13, LOWER_TOKENS
    ),
    "Flux Kontext": Kind(
        _pipeline("FluxKontextPipeline", "Flux", build_vae),
        _pooled(image=build_picture(), max_area=SIZE**2, _auto_resize=False),
        DYNAMIC,
    ),
    "Flux modular": Kind(_modular(FluxCoreDenoiseStep, "Flux"), _pooled(pixels=8 * SIZE), DYNAMIC),
    "Flux2 Klein": Kind(_pipeline("Flux2KleinPipeline", "Flux2", build_flux2_vae), _text(SIZE, guidance_scale=1.0), DYNAMIC),
    "Sana": Kind(_pipeline("SanaPipeline", "Sana"), _masked(pixels=32 * SIZE, **NO_BINNING), SHIFT),
    "AuraFlow": Kind(_pipeline("AuraFlowPipeline", "AuraFlow"), _masked(), {"shift": 1.73}),
    "Lumina2": Kind(_pipeline("Lumina2Pipeline", "Lumina2"), _masked(), {"shift": 6.0}),
    "QwenImage": Kind(_pipeline("QwenImagePipeline", "QwenImage"), _text(true_cfg_scale=1.0, **MASK), QWEN),
    "Z-Image": Kind(
        _pipeline("ZImagePipeline", "Z-Image"), _text(guidance_scale=0.0, prompt_embeds=[embeddings(4, WIDTH)[0]]), SHIFT
    ),
    "Chroma": Kind(_pipeline("ChromaPipeline", "Chroma"), _masked()),
    "CogView4": Kind(_pipeline("CogView4Pipeline", "CogView4"), _text(guidance_scale=1.0), COGVIEW4),
    "Krea2": Kind(
        _pipeline("Krea2Pipeline", "Krea2"), _text(guidance_scale=0.0, prompt_embeds=embeddings(4, 1, WIDTH), **MASK), DYNAMIC
    ),
    "PRX": Kind(_pipeline("PRXPipeline", "PRX"), _masked(**NO_BINNING), SHIFT),
    "Wan 2.1": Kind(_pipeline("WanPipeline", "Wan"), _text(64, num_frames=9, guidance_scale=1.0), SHIFT),
    "Wan 2.2": Kind(
        _pipeline("WanPipeline", "Wan", _two_experts), _text(64, num_frames=9, guidance_scale=1.0), {"shift": 5.0}
    ),
    "LTX": Kind(_pipeline("LTXPipeline", "LTX"), _video(128), {**DYNAMIC, "shift_terminal": 0.1}),
    "LTX-Condition": Kind(_pipeline("LTXConditionPipeline", "LTX", build_ltx_vae), _video(32)),
    "LTX-Condition, a frame given": Kind(
        _pipeline("LTXConditionPipeline", "LTX", build_ltx_vae),
        _video(32, image=build_picture(32)),
        part=(slice(None), slice(64, None)),
    ),
    "HunyuanVideo": Kind(
        _pipeline("HunyuanVideoPipeline", "HunyuanVideo"), _video(pooled_prompt_embeds=embeddings(WIDTH)), {"shift": 7.0}
    ),
    "Mochi": Kind(_pipeline("MochiPipeline", "Mochi"), _video(), {"invert_sigmas": True}),
    "Kandinsky5": Kind(_pipeline("Kandinsky5T2IPipeline", "Kandinsky5"), lambda: KANDINSKY5, SHIFT),
    "StableAudio3": Kind(
        _pipeline("StableAudio3Pipeline", "StableAudio3", build_audio),
        lambda: {"prompt_embeds": embeddings(4, WIDTH), "duration": 2.0},
        {"num_train_timesteps": 1},
    ),
}


# ------------------------------------------------------------------ runs


@dataclass
class Run:
    """``start`` and ``end`` of a run, the noise level ``s`` of the start, and the network calls on the way."""

    start: torch.Tensor
    end: torch.Tensor
    s: float
    calls: int

    @property
    def error(self) -> float:
        """Relative root mean square distance to the end of the probability-flow ODE."""
        exact = exact_end(self.start, self.s)
        return float((self.end - exact).square().mean().sqrt() / exact.square().mean().sqrt())


def build_flow_pipeline(kind: str, **changes):
    """A pipeline with its published scheduler, whose config is changed as told."""
    pipeline = KINDS[kind].build(diffusers.FlowMatchEulerDiscreteScheduler(**{**KINDS[kind].config, **changes}))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def run_flow(kind: str, pipeline, times: int = 1) -> Run:
    """What the pipeline makes of its noise, with ten calls or ``times`` as many."""
    scheduler, part, steps = pipeline.scheduler, KINDS[kind].part, []
    step = scheduler.step

    @functools.wraps(step)
    def watched(output, t, x, *args, **kwargs):
        result = step(output, t, x, *args, **kwargs)
        steps.append((float(t), x[part], result[0][part]))
        return result

    scheduler.step = watched
    latents = {"output": "latents"} if isinstance(pipeline, diffusers.ModularPipeline) else {"output_type": "latent"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)  # few pipelines hand their generator on to the scheduler
        pipeline(**KINDS[kind].inputs(), num_inference_steps=times * KINDS[kind].steps, generator=seeded(3), **latents)
    del scheduler.step
    s = steps[0][0] / scheduler.config.num_train_timesteps
    return Run(steps[0][1], steps[-1][2], 1 - s if scheduler.config.get("invert_sigmas") else s, len(steps))
