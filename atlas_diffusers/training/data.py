"""Pictures, captions and labels for training; an item depends on the seed and its place in the run, and on nothing else."""

import random
from itertools import islice
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageColor, ImageOps
from torch.utils.data import Dataset

from ..config import DatasetConfig
from ..image_files import decode, size_of
from .buckets import bucket_sizes, nearest_size
from .sources import rows_of

CAPTIONS_OF_STREAM, SHOWN = 10_000, 5


def resize(image: Image.Image, resolution: int, center_crop: bool) -> Image.Image:
    """Scale the short side to ``resolution`` and crop the centre, or squeeze both sides."""
    if image.size == (resolution, resolution):
        return image
    if center_crop:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    return image.resize((resolution, resolution), Image.Resampling.LANCZOS)


class PictureDataset(Dataset):
    """
    Maps ``(index, draw)``, or ``(row, draw)`` of a stream, to an item:

    ``pixels`` (channels, resolution, resolution) in [-1, 1], ``text``, ``draw``, with a label column ``label``, with
    ``tells_sizes`` what :func:`time_ids` says, and with ``skip_bad_images`` the number ``skipped`` on the way. ``draw`` is an
    integer that decides flip and choice of caption, so that an item is the same in every process and after every restart.
    """

    def __init__(self, data: Any, config: DatasetConfig):
        self.data, self.config, self.sizes, self.tells_sizes = data, config, None, False
        ImageColor.getrgb(config.background)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, item: tuple[int | dict, int]) -> dict:
        place, draw = item
        row, image, skipped = self._readable(place)
        pixels, c = self._pixels(image, place), self.config
        choice = random.Random(draw)
        if flipped(choice, c):
            pixels = pixels.flip(-1)
        found = {"pixels": pixels, "draw": draw} | annotations(row, choice, c)
        if self.tells_sizes:
            found["time_ids"] = time_ids(image.size, self.size_at(place), c.center_crop)
        return found | {"skipped": skipped} if c.skip_bad_images else found

    def _readable(self, place: int | dict) -> tuple[dict, Image.Image, int]:
        """The row at ``place``, its picture, and how many rows before it were skipped because theirs cannot be read."""
        c = self.config
        if isinstance(place, dict):
            return place, decode(place[c.image_column], channels=c.channels, background=c.background), 0
        for skipped in range(len(self.data)):
            index = (place + skipped) % len(self.data)
            row = self.data[index]
            try:
                return row, decode(row[c.image_column], index, c.channels, c.background), skipped
            except OSError:
                if not c.skip_bad_images:
                    raise
        raise OSError(f"dataset {c.name!r}: none of its {len(self.data)} pictures can be read")

    def _pixels(self, image: Image.Image, place: int | dict) -> torch.Tensor:
        c, (height, width) = self.config, self.size_at(place)
        if self.sizes is None:
            image = resize(image, c.resolution, c.center_crop)
        else:
            image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
        array = np.array(image).reshape(height, width, c.channels)
        return torch.from_numpy(array).permute(2, 0, 1).float() / 127.5 - 1

    def size_at(self, place: Any) -> tuple[int, int]:
        """Height and width of an item."""
        return (self.config.resolution, self.config.resolution) if self.sizes is None else self.sizes[place]

    def choose_sizes(self, multiple: int) -> list[list[int]]:
        """
        Give each picture the size of :func:`~.buckets.bucket_sizes` that is nearest in shape; where pictures that cannot be
        read are skipped, they get a square.

        Returns:
            The pictures of each size.
        """
        c, sizes = self.config, bucket_sizes(self.config.resolution, multiple)
        pictures = self.data.select_columns([c.image_column])
        self.sizes = [nearest_size(*self._size(row[c.image_column], i), sizes) for i, row in enumerate(pictures)]
        buckets = {size: [] for size in sorted(set(self.sizes))}
        for place, size in enumerate(self.sizes):
            buckets[size].append(place)
        return list(buckets.values())

    def _size(self, picture: dict | None, index: int) -> tuple[int, int]:
        try:
            return size_of(picture, index)
        except OSError:
            if not self.config.skip_bad_images:
                raise
            return 1, 1

    def captions(self) -> list[str]:
        """
        Every text that an item may carry; of a stream, those of the first 10,000 rows.

        Raises:
            ValueError: for a row without a caption.
        """
        c = self.config
        if c.caption is not None:
            return [c.caption]
        columns = [column for column in (c.caption_column, c.aliases_column) if column is not None]
        if not columns:
            return []
        rows = islice(rows_of(self.data, c), CAPTIONS_OF_STREAM) if c.streaming else self.data.select_columns(columns)
        texts = []
        for number, row in enumerate(rows):
            found = [] if c.caption_column is None else [row[c.caption_column]]
            found += [] if c.aliases_column is None else row[c.aliases_column] or []
            if wrong := [text for text in found if not isinstance(text, str)]:
                raise ValueError(f"dataset {c.name!r}: row {number} has no caption in {columns}, but {wrong[0]!r}")
            texts += found
        return texts

    def classes(self) -> int:
        """One more than the largest label; rows without one do not count."""
        return 1 + max((value for value in self.data[self.config.label_column] if isinstance(value, int)), default=0)

    def check_labels(self, classes: int) -> None:
        """Raise ``ValueError``, with the first rows, for labels missing or not below ``classes``; a stream is not read."""
        c = self.config
        if c.streaming:
            return
        labels = self.data[c.label_column]
        wrong = [i for i, value in enumerate(labels) if not isinstance(value, int) or not 0 <= value < classes]
        if wrong:
            shown = ", ".join(f"row {i} has {self.data[i][c.label_column]!r}" for i in wrong[:SHOWN])
            raise ValueError(
                f"dataset.label_column={c.label_column!r}: {len(wrong)} labels are not among 0 to {classes - 1}, which "
                f"num_class_embeds={classes} has: {shown}"
            )


def flipped(choice: random.Random, config: DatasetConfig) -> bool:
    """Whether an item is mirrored; the first thing that its draw decides."""
    return config.random_flip and choice.random() < 0.5


def annotations(row: dict, choice: random.Random, config: DatasetConfig) -> dict:
    """``text`` and, with a label column, ``label`` of an item."""
    found = {"text": caption(row, choice, config)}
    return found | {"label": label(row, config)} if config.label_column else found


def time_ids(size: tuple[int, int], target: tuple[int, int], cropped: bool) -> torch.Tensor:
    """
    What Stable Diffusion XL is told of a picture (Podell et al. 2023, 2.2, arXiv 2307.01952): height and width of the original,
    how many pixels were cropped at the top and on the left after resizing, height and width of the result: ``(6,)``.

    Args:
        size: width and height of the original.
        target: height and width of the result.
        cropped: at the centre; otherwise both sides were squeezed.
    """
    (width, height), scale = size, max(target[0] / size[1], target[1] / size[0])
    corner = [round((side * scale - kept) / 2) if cropped else 0 for side, kept in zip((height, width), target)]
    return torch.tensor([height, width, *corner, *target], dtype=torch.float32)


def label(row: dict, config: DatasetConfig) -> int:
    """The integer label of an item."""
    value = row[config.label_column]
    if not isinstance(value, int) or value < 0:
        name = (row[config.image_column] or {}).get("path") or "a picture"
        raise ValueError(f"{name} has no label in column {config.label_column!r} (found {value!r}; expected 0, 1, ...)")
    return value


def caption(row: dict, choice: random.Random, config: DatasetConfig) -> str:
    """The text of an item, which is the second thing that its draw decides."""
    if config.caption is not None:
        return config.caption
    if config.caption_column is None:
        return ""
    text = row[config.caption_column]
    aliases = row[config.aliases_column] if config.aliases_column else []
    if aliases and choice.random() < config.alias_probability:
        text = choice.choice(aliases)
    if not isinstance(text, str):
        name = (row[config.image_column] or {}).get("path") or "a picture"
        raise ValueError(f"{name} has no caption in column {config.caption_column!r} (found {text!r})")
    return text


class Annotated(Dataset):
    """Pictures of another data set in another form, with its captions and labels."""

    def __init__(self, pictures: PictureDataset):
        self.pictures, self.config = pictures, pictures.config

    def __len__(self) -> int:
        return len(self.pictures)

    def captions(self) -> list[str]:
        """See :meth:`PictureDataset.captions`."""
        return self.pictures.captions()

    def classes(self) -> int:
        """See :meth:`PictureDataset.classes`."""
        return self.pictures.classes()

    def check_labels(self, classes: int) -> None:
        """See :meth:`PictureDataset.check_labels`."""
        self.pictures.check_labels(classes)


class BridgePairs(Annotated):
    """
    Items of ``target`` with, under ``source``, the pixels of a picture of ``source``: of the same caption where ``paired``,
    otherwise any, by ``draw``.

    Raises:
        ValueError: if pairs are asked for and a target has no source of its caption.
    """

    def __init__(self, target: PictureDataset, source: PictureDataset, paired: bool):
        super().__init__(target)
        self.source, self.partners = source, None
        if paired:
            columns = target.config.caption_column, source.config.caption_column
            if None in columns:
                raise ValueError("coupling='paired' pairs pictures by caption: both data sets need a caption_column")
            places = {text: index for index, text in reversed(list(enumerate(source.data[columns[1]])))}
            texts = target.data[columns[0]]
            if missing := sorted({text for text in texts if text not in places}):
                raise ValueError(f"coupling='paired': {len(missing)} captions have no source picture: {missing[:5]}")
            self.partners = [places[text] for text in texts]

    def __getitem__(self, item: tuple[int, int]) -> dict:
        index, draw = item
        if self.partners is None:
            partner = random.Random(f"source {index} {draw}").randrange(len(self.source))
        else:
            partner = self.partners[index]
        # the same draw: a pair is mirrored together
        return self.pictures[index, draw] | {"source": self.source[partner, draw]["pixels"]}
