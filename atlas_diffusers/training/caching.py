"""What frozen networks make of the data, computed once and kept in safetensors shards."""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..image_files import size_of
from .data import Annotated, PictureDataset, annotations, flipped, time_ids
from .fingerprints import data_fingerprint, fingerprint
from .processes import place, together

logger = logging.get_logger(__name__)

ROWS_OF_SHARD, ROWS_OF_BATCH = 1024, 16


class TensorCache:
    """
    Rows of tensors, ``ROWS_OF_SHARD`` in a file; shards that are already there, and can be read, are not computed again, and
    of several processes each computes its share of the others.

    Args:
        folder: of the shards; its name must say what they were made from.
        length: rows.
        compute: by name, the rows of a range of places, ``(len(range), ...)``.
    """

    def __init__(self, folder: Path, length: int, compute: Callable[[range], dict[str, torch.Tensor]]):
        self.folder, self.length, self._open = folder, length, {}
        folder.mkdir(parents=True, exist_ok=True)
        rank, world = place()
        shards = [range(first, min(first + ROWS_OF_SHARD, length)) for first in range(0, length, ROWS_OF_SHARD)]
        own = range(rank, len(shards), world)
        together(lambda: [self._fill(number, shards[number], compute) for number in own])

    def _fill(self, number: int, places: range, compute: Callable[[range], dict[str, torch.Tensor]]) -> None:
        if not self._is_whole(file := self._file(number), len(places)):
            parts = [compute(places[i : i + ROWS_OF_BATCH]) for i in range(0, len(places), ROWS_OF_BATCH)]
            partial = file.with_suffix(".partial")
            rows = {name: torch.cat([part[name].cpu() for part in parts]).contiguous() for name in parts[0]}
            save_file(rows, partial)
            os.replace(partial, file)

    def _is_whole(self, file: Path, rows: int) -> bool:
        if not file.exists():
            return False
        try:
            stored = safe_open(file, framework="pt")
            return {stored.get_slice(name).get_shape()[0] for name in stored.keys()} == {rows}
        except SafetensorError as error:
            logger.warning(f"{file} is damaged ({error}) and is made again")
            return False

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:05d}.safetensors"

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, place: int) -> dict[str, torch.Tensor]:
        number, row = divmod(place, ROWS_OF_SHARD)
        if number not in self._open:
            file = self._file(number)
            try:
                stored = safe_open(file, framework="pt")
                self._open[number] = {name: stored.get_slice(name) for name in stored.keys()}
            except (SafetensorError, OSError) as error:
                raise OSError(f"cache {file} cannot be read ({error}); the next start makes it again") from error
        return {name: rows[row] for name, rows in self._open[number].items()}

    def __getstate__(self) -> dict:
        """Without open files: a worker opens its own."""
        return self.__dict__ | {"_open": {}}


def encodings(vae: Any, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """``moments``, mean and log-variance (batch, 2·channels, height, width), or ``latents`` where there is no variance."""
    encoded = vae.encode(pixels)
    if hasattr(encoded, "latent_dist"):
        return {"moments": encoded.latent_dist.parameters}
    return {"latents": encoded.latent if hasattr(encoded, "latent") else encoded.latents}


class CachedPictures(Annotated):
    """
    Items of ``dataset`` with, instead of pixels, the ``moments`` (2·channels, height, width) of the Gaussian that an
    autoencoder makes of them, its mean and log-variance, from which every step draws anew; or ``latents`` of one without.

    Args:
        dataset: pictures; with flips both sides are encoded.
        vae: an autoencoder of Diffusers or ``AtlasAutoencoder``.
        folder: where the shards are kept.
    """

    def __init__(self, dataset: PictureDataset, vae: Any, folder: Path):
        super().__init__(dataset)
        self.sides = 2 if self.config.random_flip else 1
        plain = PictureDataset(dataset.data, self.config.model_copy(update={"random_flip": False}))

        @torch.no_grad()
        def compute(places: range) -> dict[str, torch.Tensor]:
            pixels = [plain[place // self.sides, 0]["pixels"] for place in places]
            turned = [p.flip(-1) if place % self.sides else p for p, place in zip(pixels, places)]
            return encodings(vae, torch.stack(turned).to(vae.device, vae.dtype))

        name = fingerprint(self.config.model_dump_json(), data_fingerprint(dataset), networks=(vae,))
        self.moments = TensorCache(folder / f"latents-{name}", self.sides * len(dataset), compute)

    def __getitem__(self, item: tuple[int, int]) -> dict:
        index, draw = item
        choice, c = random.Random(draw), self.config
        place = self.sides * index + flipped(choice, c)
        row, found = self.pictures.data[index], {**self.moments[place], "draw": draw}
        if self.pictures.tells_sizes:
            found["time_ids"] = time_ids(size_of(row[c.image_column], index), self.pictures.size_at(index), c.center_crop)
        return found | annotations(row, choice, c)


class WithClassPictures(Annotated):
    """
    Items of ``dataset``, each with one of ``others`` beside it as ``class_picture``: pictures of the class to which the subject
    of the data belongs, that keep a network from forgetting it (Ruiz et al. 2022, arXiv 2208.12242).
    """

    def __init__(self, dataset: Any, others: Any):
        super().__init__(getattr(dataset, "pictures", dataset))
        self.dataset, self.others = dataset, others

    def __getitem__(self, item: tuple[Any, int]) -> dict:
        choice = random.Random(f"class {item[1]}")
        other = self.others[choice.randrange(len(self.others)), choice.getrandbits(62)]
        return {**self.dataset[item], "class_picture": other}


class CaptionCache:
    """
    What a network is told of captions, by text, for every caption of the data and the empty one.

    Args:
        texts: captions.
        encode: makes tensors by name, each (batch, ...), of captions, with frozen networks.
        folder: where the shards are kept.
        made_by: names those networks.
    """

    def __init__(self, texts: list[str], encode: Callable[[list[str]], dict[str, torch.Tensor]], folder: Path, made_by: str):
        unique = sorted({"", *texts})

        @torch.no_grad()
        def compute(places: range) -> dict[str, torch.Tensor]:
            return encode([unique[place] for place in places])

        name = fingerprint(json.dumps(unique), made_by)
        self.places = {text: place for place, text in enumerate(unique)}
        self.states = TensorCache(folder / f"captions-{name}", len(unique), compute)

    def __call__(self, texts: list[str]) -> dict[str, torch.Tensor]:
        rows = [self.states[self.places[text]] for text in texts]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
