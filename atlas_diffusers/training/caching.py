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

from ..conditioning import tokenize
from .data import Annotated, PictureDataset, annotations, flipped
from .fingerprints import data_fingerprint, fingerprint, tokenizer_fingerprint

logger = logging.get_logger(__name__)

ROWS_OF_SHARD, ROWS_OF_BATCH = 1024, 16


class TensorCache:
    """
    Rows of a tensor, ``ROWS_OF_SHARD`` in a file; shards that are already there, and can be read, are not computed again.

    Args:
        folder: of the shards; its name must say what they were made from.
        length: rows.
        compute: the rows of a range of places, ``(len(range), ...)``.
    """

    def __init__(self, folder: Path, length: int, compute: Callable[[range], torch.Tensor]):
        self.folder, self.length, self._open = folder, length, {}
        folder.mkdir(parents=True, exist_ok=True)
        for number, first in enumerate(range(0, length, ROWS_OF_SHARD)):
            file, places = self._file(number), range(first, min(first + ROWS_OF_SHARD, length))
            if not self._is_whole(file, len(places)):
                parts = [compute(places[i : i + ROWS_OF_BATCH]).cpu() for i in range(0, len(places), ROWS_OF_BATCH)]
                partial = file.with_suffix(".partial")
                save_file({"rows": torch.cat(parts).contiguous()}, partial)
                os.replace(partial, file)

    def _is_whole(self, file: Path, rows: int) -> bool:
        if not file.exists():
            return False
        try:
            return safe_open(file, framework="pt").get_slice("rows").get_shape()[0] == rows
        except SafetensorError as error:
            logger.warning(f"{file} is damaged ({error}) and is made again")
            return False

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:05d}.safetensors"

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, place: int) -> torch.Tensor:
        number, row = divmod(place, ROWS_OF_SHARD)
        if number not in self._open:
            file = self._file(number)
            try:
                self._open[number] = safe_open(file, framework="pt").get_slice("rows")
            except (SafetensorError, OSError) as error:
                raise OSError(f"cache {file} cannot be read ({error}); the next start makes it again") from error
        return self._open[number][row]

    def __getstate__(self) -> dict:
        """Without open files: a worker opens its own."""
        return self.__dict__ | {"_open": {}}


NO_VARIANCE = -30.0  # the smallest log-variance that Diffusers' Gaussian has


def latent_moments(vae: torch.nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """Mean and log-variance of latents, (batch, 2·channels, height, width); only ``AutoencoderKL`` has a variance."""
    encoded = vae.encode(pixels)
    if hasattr(encoded, "latent_dist"):
        return encoded.latent_dist.parameters
    return torch.cat([encoded.latents, torch.full_like(encoded.latents, NO_VARIANCE)], 1)


class CachedPictures(Annotated):
    """
    Items of ``dataset`` with, instead of pixels, the ``moments`` (2·channels, height, width) of the Gaussian that an
    autoencoder makes of them: its mean and log-variance, from which every step draws anew.

    Args:
        dataset: pictures; with flips both sides are encoded.
        vae: one of ``AUTOENCODERS``.
        folder: where the shards are kept.
    """

    def __init__(self, dataset: PictureDataset, vae: torch.nn.Module, folder: Path):
        super().__init__(dataset)
        self.sides = 2 if self.config.random_flip else 1
        plain = PictureDataset(dataset.data, self.config.model_copy(update={"random_flip": False}))

        @torch.no_grad()
        def compute(places: range) -> torch.Tensor:
            pixels = [plain[place // self.sides, 0]["pixels"] for place in places]
            turned = [p.flip(-1) if place % self.sides else p for p, place in zip(pixels, places)]
            return latent_moments(vae, torch.stack(turned).to(vae.device, vae.dtype))

        name = fingerprint(self.config.model_dump_json(), data_fingerprint(dataset), networks=(vae,))
        self.moments = TensorCache(folder / f"latents-{name}", self.sides * len(dataset), compute)

    def __getitem__(self, item: tuple[int, int]) -> dict:
        index, draw = item
        choice, c = random.Random(draw), self.config
        place = self.sides * index + flipped(choice, c)
        return {"moments": self.moments[place], "draw": draw} | annotations(self.pictures.data[index], choice, c)


class CaptionCache:
    """
    States (batch, tokens, width) of captions by text, for every caption of the data and the empty one.

    Args:
        texts: captions.
        tokenizer, text_encoder: a CLIP text model, frozen.
        folder: where the shards are kept.
    """

    def __init__(self, texts: list[str], tokenizer: Any, text_encoder: torch.nn.Module, folder: Path):
        unique = sorted({"", *texts})

        @torch.no_grad()
        def compute(places: range) -> torch.Tensor:
            ids = tokenize(tokenizer, [unique[place] for place in places]).to(text_encoder.device)
            return text_encoder(ids).last_hidden_state

        name = fingerprint(json.dumps(unique), tokenizer_fingerprint(tokenizer), networks=(text_encoder,))
        self.places = {text: place for place, text in enumerate(unique)}
        self.states = TensorCache(folder / f"captions-{name}", len(unique), compute)

    def __call__(self, texts: list[str]) -> torch.Tensor:
        return torch.stack([self.states[self.places[text]] for text in texts])

