"""What a pipeline call is given besides prompts, checked; every mistake is a ``ValueError`` that names both sides."""

from dataclasses import dataclass

import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import retrieve_timesteps

from ..denoising import Tiles
from ..denoising.sampling import step_arguments
from ..schedulers import BaseScheduler
from .base import AtlasPipelineBase

DEFAULT_STRENGTH, DEFAULT_SNR = 0.8, 0.16
OUTPUT_TYPES = ("pil", "np", "pt", "latent")


@dataclass(frozen=True)
class Steps:
    """
    How many steps a call takes, or which; one of the three is given, or the number by default.

    Args:
        default: the pipeline's number of steps.
        number, timesteps, sigmas: as ``num_inference_steps``, ``timesteps`` and ``sigmas`` of a call; how large the number may
            be is for the scheduler to say.
    """

    default: int
    number: int | None = None
    timesteps: list[int] | None = None
    sigmas: list[float] | None = None

    def __post_init__(self):
        given = [name for name in ("timesteps", "sigmas") if getattr(self, name) is not None]
        if self.number is not None and given:
            raise ValueError(f"give num_inference_steps={self.number} or {' or '.join(given)}, not both")
        if self.number is not None and self.number < 1:
            raise ValueError(f"num_inference_steps={self.number}; expected at least 1")

    @property
    def are_explicit(self) -> bool:
        """Whether it is said which they are."""
        return self.timesteps is not None or self.sigmas is not None

    @property
    def count(self) -> int:
        """Their number, where it is not said which they are."""
        return self.default if self.number is None else self.number

    def set(self, scheduler: object, device: torch.device) -> None:
        """Of a scheduler; ``ValueError`` for explicit ones that it does not take."""
        retrieve_timesteps(scheduler, None if self.are_explicit else self.count, device, self.timesteps, self.sigmas)


def checked_strength(strength: float | None, image: object) -> float:
    """Image-to-image keeps some of the picture, a fifth by default, and takes at least one step."""
    if strength is not None and image is None:
        raise ValueError(f"strength={strength} needs an image to start from")
    if strength is not None and not 0 < strength <= 1:
        raise ValueError(f"strength={strength}; expected a number in (0, 1]")
    return DEFAULT_STRENGTH if strength is None else strength


def check_noise(scheduler: object, eta: float) -> None:
    """Fresh noise is for schedulers whose steps take it."""
    if eta and not step_arguments(scheduler, eta=eta):
        raise ValueError(f"eta={eta}: {type(scheduler).__name__} takes no eta")


def checked_snr(snr: float | None, steps: int) -> float:
    """Corrector steps have a signal-to-noise ratio, 0.16 by default."""
    if snr is not None and not steps:
        raise ValueError(f"corrector_snr={snr} needs corrector_steps")
    return DEFAULT_SNR if snr is None else snr


def check_generators(generator: object, batch: int) -> None:
    """A list of generators has one a picture."""
    if isinstance(generator, list) and len(generator) != batch:
        raise ValueError(f"{len(generator)} generators for {batch} pictures; expected one each")


def check_network_batch_size(size: int | None) -> None:
    """A network call has at least one picture."""
    if size is not None and size < 1:
        raise ValueError(f"network_batch_size={size}; expected at least 1")


def check_output_type(output_type: str) -> None:
    """One of the four that Diffusers' pipelines have."""
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type={output_type!r} is unknown; allowed are {OUTPUT_TYPES}")


def check_tensor_inputs(names: list[str], allowed: list[str], callback: object) -> None:
    """A callback gets tensors that there are."""
    if unknown := [name for name in names if name not in allowed]:
        raise ValueError(f"callback_on_step_end_tensor_inputs has {unknown}; allowed are {allowed}")
    if callback is None:
        raise ValueError(f"callback_on_step_end_tensor_inputs={names} needs callback_on_step_end")


def checked_tiles(pipeline: AtlasPipelineBase, size: int | None, overlap: int | None) -> Tiles | None:
    """Tiles in the unit of the latents from sides in pixels; a quarter overlaps by default."""
    if size is None:
        if overlap is not None:
            raise ValueError(f"tile_overlap={overlap} needs tile_size")
        return None
    factor, multiple = pipeline.vae_scale_factor, pipeline.size_multiple
    if size < 1 or size % multiple:
        raise ValueError(f"tile_size={size} must be a positive multiple of {multiple}")
    return Tiles(size // factor, (size // 4 if overlap is None else overlap) // factor)


def checked_resolutions(pipeline: AtlasPipelineBase, scheduler: object, height: int, width: int, fixed: dict) -> int:
    """
    How many resolutions the network has, or ``ValueError`` with the reason why ``hierarchical=True`` cannot be; ``fixed`` has
    inputs that cannot be combined with it, by name.
    """
    levels = pipeline.unet.config.get("num_resolutions", 1)
    if levels < 2:
        raise ValueError(
            "hierarchical=True needs a network trained at several resolutions (num_resolutions of a recipe); this one has "
            f"num_resolutions={levels}"
        )
    if not isinstance(scheduler, BaseScheduler):
        raise ValueError(f"hierarchical=True needs a scheduler of this package, got {type(scheduler).__name__}")
    if given := [name for name, value in fixed.items() if value is not None]:
        raise ValueError(f"hierarchical=True cannot be combined with {', '.join(given)}")
    multiple = pipeline.size_multiple * 2 ** (levels - 1)
    if height % multiple or width % multiple:
        raise ValueError(f"hierarchical=True: height={height} and width={width} must be multiples of {multiple}")
    return levels
