"""How a section of a recipe becomes an autoencoder, a network or a scheduler."""

import inspect
from pathlib import Path
from typing import Any

import diffusers
import torch

import atlas_diffusers

from ..config import unknown_key

FLOW_SCHEDULERS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
AUTOENCODERS = ("AutoencoderKL", "AutoencoderTiny", "AtlasAutoencoder")


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


def build_section(cls: type, arguments: dict, section: str):
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
    return build_section(cls, {**unless_said, **{k: v for k, v in config.items() if not k.startswith("_")}}, "scheduler")
