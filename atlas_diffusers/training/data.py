"""Pictures and captions for training, in an order that depends only on the seed and the step."""

import random
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset, Sampler

from ..config import DatasetConfig
from ..pretrained import load_emoji


def load_training_data(config: DatasetConfig):
    """The ``datasets.Dataset`` that a recipe names, images not yet decoded."""
    import datasets

    if config.name == "embedded:emoji":
        data = load_emoji(config.split, config.categories)
    elif config.name == "imagefolder":
        if config.root is None:
            raise ValueError("dataset.name='imagefolder' needs dataset.root, the folder of pictures")
        data = datasets.load_dataset("imagefolder", data_dir=config.root, split=config.split)
    elif config.name.endswith(".parquet"):
        data = datasets.load_dataset("parquet", data_files=config.name, split="train")
    else:
        data = datasets.load_dataset(config.name, split=config.split)
    for column in (config.image_column, config.caption_column, config.aliases_column):
        if column is not None and column not in data.column_names:
            raise ValueError(f"dataset {config.name!r} has no column {column!r}; its columns are {data.column_names}")
    return data.cast_column(config.image_column, datasets.Image(decode=False))


def decode(picture: dict, index: int) -> Image.Image:
    """A picture of an undecoded image column as RGB on white; a file that cannot be read is named in the ``OSError``."""
    import io

    try:
        source = picture["path"] if picture["bytes"] is None else io.BytesIO(picture["bytes"])
        with Image.open(source) as image:
            ImageOps.exif_transpose(image, in_place=True)
            if image.mode.startswith("I;16"):
                # convert() would clip everything above 255 to white
                image = Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))
            image = image.convert("RGBA")
    except OSError as error:
        raise OSError(f"picture {picture['path'] or f'number {index}'} cannot be read: {error}") from error
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


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
    Maps ``(index, draw)`` to ``{"pixels": (3, resolution, resolution) in [-1, 1], "text": caption, "draw": draw}``.

    ``draw`` is an integer that decides flip and choice of caption, so that an item is the same in every process and
    after every restart.
    """

    def __init__(self, data, config: DatasetConfig):
        self.data, self.config = data, config

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, item: tuple[int, int]) -> dict:
        index, draw = item
        row, c = self.data[index], self.config
        choice = random.Random(draw)
        image = resize(decode(row[c.image_column], index), c.resolution, c.center_crop)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1
        if c.random_flip and choice.random() < 0.5:
            pixels = pixels.flip(-1)
        text = row[c.caption_column] if c.caption_column else ""
        aliases = row[c.aliases_column] if c.aliases_column else []
        if aliases and choice.random() < c.alias_probability:
            text = choice.choice(aliases)
        return {"pixels": pixels, "text": text, "draw": draw}

    def captions(self) -> list[str]:
        """Every text that an item may carry."""
        c = self.config
        columns = [self.data[c.caption_column]] if c.caption_column else []
        if c.aliases_column:
            columns += self.data[c.aliases_column]
        return [text for column in columns for text in column]


class StepSampler(Sampler):
    """
    Endless shuffled passes over ``length`` items as lists of ``(index, draw)``, starting at batch ``start``.

    Batch k holds positions k·batch_size onwards of the passes laid end to end; each pass has its own permutation.
    """

    def __init__(self, length: int, batch_size: int, seed: int, start: int = 0):
        self.length, self.batch_size, self.seed, self.start = length, batch_size, seed, start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        position, order, current = self.start * self.batch_size, None, -1
        while True:
            batch = []
            for place in range(position, position + self.batch_size):
                epoch, offset = divmod(place, self.length)
                if epoch != current:
                    generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
                    order, current = torch.randperm(self.length, generator=generator).tolist(), epoch
                batch.append((order[offset], self.seed * 1_000_003 + place))
            position += self.batch_size
            yield batch
