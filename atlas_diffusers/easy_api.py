"""Pictures with one call: ``create_sampler("atlas-emoji").generate("red heart")``."""

from typing import Any

import torch
from diffusers.utils import logging

from .config import InferenceConfig
from .hardware import GIB, find_profile, memory_warnings_wanted, profile_names
from .pipelines import AtlasPipeline
from .pipelines.foreign import load_any

logger = logging.get_logger(__name__)


class EasySampler:
    """
    A pipeline with the settings of a GPU profile; made by :func:`create_sampler`.

    Args:
        pipeline: on its device.
        profile: batch size and largest resolution.
        resolution: sides of the pictures; by default those that the network was trained for, if the profile allows them.
    """

    def __init__(self, pipeline: AtlasPipeline, profile: InferenceConfig, resolution: int | None = None):
        self.pipeline, self.profile = pipeline, profile
        own = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
        self.side = resolution or min(own, profile.resolution)
        pipeline.set_progress_bar_config(disable=True)

    def generate(
        self,
        prompts: str | list[str] | None = None,
        negative_prompts: str | list[str] | None = None,
        num_samples: int = 1,
        timesteps: int | None = None,
        guidance_scale: float | None = None,
        seed: int | None = None,
        output_type: str = "pt",
        **options: object,
    ) -> torch.Tensor | list:
        """
        Pictures, ``num_samples`` of each prompt next to each other, in the order of the prompts whatever the batch size.

        Args:
            prompts, negative_prompts: texts; one negative prompt serves all.
            num_samples: pictures a prompt, or in all without prompts.
            timesteps, guidance_scale: by default the pipeline's.
            seed: picture i starts from noise of ``seed + i``; drawn anew by default. The global random state is not touched.
            output_type: `pt` (n, channels, height, width) in [0, 1], `np`, `pil` or `latent`.
            options: further arguments of ``AtlasPipeline.__call__``, such as ``height`` or ``hierarchical``.

        On CUDA out of memory the batch is halved, for good, and the same pictures are tried again.

        Raises:
            ValueError: for inputs that do not fit; ``torch.OutOfMemoryError`` if one picture is too large.
        """
        prompts = [prompts] if isinstance(prompts, str) else prompts
        self._check(prompts, negative_prompts, num_samples)
        rows = [index for index in range(len(prompts or [None])) for _ in range(num_samples)]
        first = _fresh_seed() if seed is None else seed
        call = {"num_inference_steps": timesteps, "guidance_scale": guidance_scale, "output_type": output_type}
        call |= {"height": self.side, "width": self.side, **options}
        if options.get("references") is not None and "bridge" not in options:
            call["bridge"] = {"solver_type": self.profile.kernel_solver}
        is_coupled = call.get("references") is not None or call.get("bridge") is not None
        parts, done = [], 0
        while done < len(rows):
            # what is coupled with references depends on its batch mates: one batch, which the network sees in parts
            part = rows[done:] if is_coupled else rows[done : done + self.profile.batch_size]
            inputs = _inputs(prompts, negative_prompts, part)
            generators = [torch.Generator().manual_seed(first + done + i) for i in range(len(part))]
            try:
                call_part = {"network_batch_size": self._size(part), **call}
                parts.append(self.pipeline(**inputs, **call_part, generator=generators, return_dict=False)[0])
            except torch.OutOfMemoryError:
                if self._size(part) == 1:
                    raise
                self._halve(self._size(part))
                continue
            done += len(part)
        return _joined(parts)

    def _check(self, prompts: list[str] | None, negative: str | list[str] | None, num_samples: int) -> None:
        """What the pipeline cannot see, which gets the prompts in parts."""
        if prompts is not None and not prompts:
            raise ValueError("prompts is an empty list; give at least one, or None for pictures without prompts")
        if num_samples < 1:
            raise ValueError(f"num_samples={num_samples}; expected at least 1")
        if negative is not None and prompts is None:
            raise ValueError("negative_prompts need prompts")
        if prompts is not None and not self.profile.enable_clip:
            raise ValueError("prompts need the text encoder, but enable_clip is False")
        if isinstance(negative, list) and prompts is not None and len(negative) not in (1, len(prompts)):
            counts = len(negative), len(prompts)
            raise ValueError(f"{counts[0]} negative prompts for {counts[1]} prompts; expected 1 or {counts[1]}")

    def _size(self, part: list[int]) -> int:
        """Pictures in one network call."""
        return min(self.profile.batch_size, len(part))

    def _halve(self, size: int) -> None:
        self.profile = self.profile.model_copy(update={"batch_size": size // 2})
        self.clear_cache()
        logger.warning(f"out of memory with {size} pictures at a time; going on with {size // 2}")

    def clear_cache(self) -> None:
        """Give memory that is not in use back to the GPU."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _fresh_seed() -> int:
    return torch.Generator().seed() % 2**31


def _inputs(prompts: list[str] | None, negative: object, part: list[int]) -> dict[str, Any]:
    if prompts is None:
        return {"num_images_per_prompt": len(part)}
    inputs: dict[str, Any] = {"prompt": [prompts[index] for index in part]}
    if isinstance(negative, list):
        inputs["negative_prompt"] = [negative[index if len(negative) > 1 else 0] for index in part]
    elif negative is not None:
        inputs["negative_prompt"] = negative
    return inputs


def _joined(parts: list) -> Any:
    if torch.is_tensor(parts[0]):
        return torch.cat(parts)
    if isinstance(parts[0], list):
        return [image for part in parts for image in part]
    import numpy as np

    return np.concatenate(parts)


def create_sampler(
    checkpoint: str = "atlas-emoji",
    gpu_memory: str | None = "auto",
    device: str | torch.device | None = None,
    resolution: int | None = None,
    batch_size: int | None = None,
    enable_clip: bool | None = None,
) -> EasySampler:
    """
    A sampler for a checkpoint with the settings that fit a GPU.

    Args:
        checkpoint: a pipeline folder, a hub id, an embedded name, or a file of weights, see
            :func:`~atlas_diffusers.pipelines.foreign.load_any`.
        gpu_memory: `6GB`, `8GB`, `12GB`, `16GB`, `24GB`, `32GB`, `cpu`, or `auto` for this machine's.
        device: by default CUDA where the profile is of a GPU and there is one, else the CPU.
        resolution: sides of the pictures, in pixels.
        batch_size, enable_clip: instead of the profile's.

    Raises:
        ValueError: for an unknown profile; ``OSError`` for a checkpoint that cannot be read.
    """
    changes = {"batch_size": batch_size, "enable_clip": enable_clip}
    profile = find_profile(gpu_memory, **{name: value for name, value in changes.items() if value is not None})
    on_gpu = profile.memory_gb and torch.cuda.is_available()
    device = torch.device(device or ("cuda" if on_gpu else "cpu"))
    # half precision is slow, or missing, on CPUs
    dtype = getattr(torch, profile.dtype) if device.type != "cpu" else torch.float32
    pipeline = load_any(checkpoint, dtype=dtype)
    if profile.memory_gb and memory_warnings_wanted():
        _warn_of_size(pipeline, profile)
    if profile.cpu_offload and device.type == "cuda":
        pipeline.enable_model_cpu_offload(device=device)
    else:
        pipeline.to(device)
    if profile.attention_slicing:
        pipeline.enable_attention_slicing()
    if profile.vae_tiling and pipeline.vae is not None:
        pipeline.vae.enable_tiling()
    return EasySampler(pipeline, profile, resolution)


def _warn_of_size(pipeline: AtlasPipeline, profile: InferenceConfig) -> None:
    parts = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    size = sum(p.numel() * p.element_size() for part in parts for p in part.parameters()) / GIB
    if size > 0.8 * profile.memory_gb:
        logger.warning(
            f"the weights take {size:.1f} of {profile.memory_gb} GB; set ATLAS_DISABLE_MEMORY_WARNINGS=1 to hide this message"
        )


def list_profiles() -> dict[str, InferenceConfig]:
    """The GPU profiles by name."""
    return {name: find_profile(name) for name in profile_names()}
