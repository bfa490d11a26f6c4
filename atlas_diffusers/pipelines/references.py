"""Reference data of the bridge: read, encoded, and stored with a pipeline."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from ..bridges import ReferenceShards
from ..bridges.references import ReferenceSet
from ..image_files import decode, on_white, read_folder
from .interface import PipelineParts
from .latents import encode_latents
from .loading import named_damage

FILE = "references.safetensors"


@dataclass
class References:
    """
    Clean data that samples are coupled with.

    Args:
        values: pictures in [-1, 1] or latents, ``(m, channels, height, width)``; or those in files, see
            :class:`~atlas_diffusers.bridges.ReferenceShards`.
        weights: ``(m,)``, non-negative; ``None`` is uniform.
        captions: m texts, which prompts are compared with; ``None`` weights all prompts alike.
    """

    values: torch.Tensor | ReferenceSet
    weights: torch.Tensor | None = None
    captions: list[str] | None = None

    def as_tensor(self) -> torch.Tensor:
        """The values in memory; ``ValueError`` for those in files."""
        if isinstance(self.values, ReferenceSet):
            raise ValueError(f"{type(self.values).__name__} lie in files of their own: they are not saved with a pipeline")
        return self.values

    def save(self, file: Path) -> None:
        """Write one safetensors file; ``ValueError`` for references that are in files already."""
        tensors = {"references": self.as_tensor().contiguous()}
        if self.weights is not None:
            tensors["weights"] = self.weights.contiguous()
        save_file(tensors, file, metadata={"captions": json.dumps(self.captions)})

    @classmethod
    def load(cls, file: str | Path) -> "References":
        """Read a file written by :meth:`save`, or any safetensors file with a tensor ``references``."""
        with named_damage(f"{file} is damaged"), safe_open(file, framework="pt") as stored:
            names = list(stored.keys())
            if "references" not in names:
                raise ValueError(f"{file} has tensors {names}; expected `references` and optionally `weights`")
            weights = stored.get_tensor("weights") if "weights" in names else None
            captions = json.loads((stored.metadata() or {}).get("captions", "null"))
            values = stored.get_tensor("references")
        is_text = isinstance(captions, list) and all(isinstance(caption, str) for caption in captions)
        if captions is not None and not (is_text and len(captions) == len(values)):
            raise ValueError(f"{file} has captions {captions!r:.100}; expected {len(values)} texts")
        return cls(values, weights, captions)


def read_references(pipeline: PipelineParts, given: object, weights: object, height: int, width: int) -> References:
    """
    References in the space that is sampled.

    Args:
        given: a tensor, a safetensors file, a folder of pictures, a list of PIL pictures, a data set with ``image`` and, if it
            has captions, ``text``, or :class:`~atlas_diffusers.bridges.ReferenceShards`, or the list of their files.

    Raises:
        ValueError: for anything else, and shapes that do not fit; ``OSError`` for what cannot be read.
    """
    if isinstance(given, str | Path):
        given = read_folder(str(given), "train", "auto") if Path(given).is_dir() else References.load(given)
    elif isinstance(given, list | tuple) and given and all(isinstance(file, str | Path) for file in given):
        given = ReferenceShards(given)
    if isinstance(given, torch.Tensor | ReferenceSet):
        given = References(given)
    elif not isinstance(given, References):
        given = _of_pictures(pipeline, given, height, width)
    weights = given.weights if weights is None else torch.as_tensor(weights)
    return References(_to_sampled_space(pipeline, given.values, height, width), weights, given.captions)


def _of_pictures(pipeline: PipelineParts, given: Any, height: int, width: int) -> References:
    """A list of PIL pictures, or a data set, decoded or not."""
    columns = getattr(given, "column_names", None)
    listed = isinstance(given, list | tuple) and given and all(isinstance(image, Image.Image) for image in given)
    if not listed and (columns is None or "image" not in columns):
        found = f"a data set with columns {columns}" if columns else f"{type(given).__name__} {given!r:.60}"
        raise ValueError(
            "references must be a tensor, ReferenceShards or their files, a safetensors file, a folder, a list of PIL pictures "
            f"or a data set with a column image; got {found}"
        )
    grey = pipeline.vae is None and pipeline.unet.config.in_channels == 1
    pictures, data_set = [], cast(Any, given)
    for index, image in enumerate(given if listed else data_set["image"]):
        image = on_white(image) if isinstance(image, Image.Image) else decode(image, index)
        pictures.append(image.convert("L" if grey else "RGB"))
    captions = list(data_set["text"]) if columns and "text" in columns and any(data_set["text"]) else None
    return References(pipeline.image_processor.preprocess(pictures, height, width), captions=captions)


@torch.no_grad()
def _to_sampled_space(pipeline: PipelineParts, values: Any, height: int, width: int) -> Any:
    factor, vae = pipeline.vae_scale_factor, pipeline.vae
    latent = (pipeline.unet.config.in_channels, height // factor, width // factor)
    if tuple(values.shape[1:]) == latent:
        return values
    if vae is None or isinstance(values, ReferenceSet) or tuple(values.shape[1:]) != (3, height, width):
        pictures = "" if vae is None or isinstance(values, ReferenceSet) else f" or pictures {(3, height, width)}"
        raise ValueError(f"references have shape {tuple(values.shape[1:])}; expected {latent}{pictures}")
    device, dtype = pipeline._execution_device, vae.dtype
    return torch.cat([encode_latents(vae, part.to(device, dtype), sample_mode="argmax") for part in values.split(8)])
