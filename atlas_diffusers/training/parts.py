"""Parts of a run, and how a section of a recipe becomes one."""

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import torch

import atlas_diffusers

from ..config import unknown_key

if TYPE_CHECKING:
    from .families import Family

FLOW_SCHEDULERS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
AUTOENCODERS = ("AutoencoderKL", "AutoencoderTiny", "AtlasAutoencoder")


@dataclass
class Networks:
    """
    Parts of a pipeline; ``text_encoder``, ``tokenizer``, ``vae`` and ``backward_unet`` may be ``None``, and ``unet``, what
    denoises, may be a transformer. ``family`` says how they go together; a pipeline of Diffusers whose parts they are is
    ``pipeline``.
    """

    unet: Any
    text_encoder: Any
    tokenizer: Any
    vae: Any
    scheduler: Any
    family: "type[Family]"
    pipeline: Any = None
    backward_unet: Any = None

    @property
    def modules(self) -> dict[str, torch.nn.Module]:
        """The networks that may train, by their names in the pipeline."""
        return self.family.modules(self)

    @property
    def others(self) -> list[torch.nn.Module]:
        """The networks that never train."""
        every = [self.vae] if self.pipeline is None else self.pipeline.components.values()
        known = list(map(id, self.modules.values()))
        return [module for module in every if isinstance(module, torch.nn.Module) and id(module) not in known]

    def every(self) -> list[torch.nn.Module]:
        """All networks that there are."""
        return [*self.modules.values(), *self.others]


def load_autoencoder(source: str) -> torch.nn.Module:
    """That of a pipeline, by folder or hub id, or one that lies in a folder by itself; ``OSError`` if there is none."""
    where: dict[str, Any] = {} if (Path(source) / "config.json").is_file() else {"subfolder": "vae"}
    config: Any = diffusers.AutoencoderKL.load_config(source, **where)
    name = config["_class_name"]
    if name not in AUTOENCODERS:
        raise ValueError(f"vae={source!r} is of class {name}; allowed are {', '.join(AUTOENCODERS)}")
    return getattr(diffusers, name).from_pretrained(source, torch_dtype=torch.float32, **where)


def pixels_of_latent(vae: Any) -> int:
    """Along a side; 1 without an autoencoder."""
    return 1 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1)


def build_part(cls: type, arguments: dict, section: str):
    """An instance; keys that its constructor does not have, and values of the wrong kind, are a ``ValueError``."""
    known = [name for name in inspect.signature(cls.__init__).parameters if name != "self"]
    if unknown := [unknown_key(f"{section}.{key}", known) for key in arguments if key not in known]:
        raise ValueError("; ".join(unknown))
    try:
        return cls(**arguments)
    except TypeError as error:
        raise ValueError(f"{section}: {error}") from error


def scheduler_from_dict(config: dict, default: str = "AtlasDDIMScheduler", foreign: tuple[str, ...] = ()):
    """A scheduler from its configuration; ``_class_name`` names a class of this package, or of Diffusers' ``foreign`` ones."""
    name = config.get("_class_name", default)
    if name not in (*atlas_diffusers.SCHEDULERS, *foreign):
        raise ValueError(f"scheduler._class_name={name!r} is unknown; allowed are {[*atlas_diffusers.SCHEDULERS, *foreign]}")
    cls = getattr(diffusers if name in foreign else atlas_diffusers, name)
    # latents exceed 1: only a configuration that says so clips
    unless_said = {} if name in foreign else {"clip_sample": False}
    return build_part(cls, {**unless_said, **{k: v for k, v in config.items() if not k.startswith("_")}}, "scheduler")
