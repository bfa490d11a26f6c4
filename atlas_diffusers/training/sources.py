"""The data set that a recipe names."""

import json
import lzma
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..config import DatasetConfig
from ..image_files import read_folder
from ..pretrained import load_digits, load_emoji, load_pictograms

STREAM_SHARDS = 64


def load_training_data(config: DatasetConfig):
    """
    The ``datasets.Dataset``, or ``IterableDataset`` with ``streaming``, that a recipe names; images not yet decoded.

    Raises:
        ValueError: for a column that is not there, or a folder without pictures; ``OSError`` for a source that is not.
    """
    import datasets

    if config.captions != "auto" and folder_of(config) is None:
        raise ValueError(f"dataset.captions={config.captions!r} is for a folder of pictures, which name={config.name!r} is not")
    with named_source(config):
        data = _load(config)
        known = data.column_names or list(next(rows_of(data, config), ()))
    for column in (config.image_column, config.caption_column, config.aliases_column, config.label_column):
        if column is not None and column not in known:
            raise ValueError(f"dataset {config.name!r} has no column {column!r}; its columns are {known}")
    if config.streaming and isinstance(data, datasets.Dataset):
        data = data.to_iterable_dataset(num_shards=min(len(data), STREAM_SHARDS))
    return data.cast_column(config.image_column, datasets.Image(decode=False))


def rows_of(stream: Any, config: DatasetConfig) -> Iterator[dict]:
    """The rows of a stream; ``ValueError`` names the source and the row where it breaks off."""
    rows, number = iter(stream), 0
    while True:
        with named_source(config, f" after {number} rows"):
            if (row := next(rows, None)) is None:
                return
        yield row
        number += 1


@contextmanager
def named_source(config: DatasetConfig, where: str = "") -> Iterator[None]:
    """
    Turns what `datasets` and its readers stumble over into a ``ValueError`` that names the source, and ``where`` in it; before
    the first row an ``OSError`` stays, which has a name of its own.
    """
    import httpx
    import pyarrow
    from datasets.exceptions import DatasetsError

    broken = (
        DatasetsError, pyarrow.ArrowException, httpx.HTTPError, tarfile.TarError,
        lzma.LZMAError, zlib.error, zipfile.BadZipFile, struct.error, EOFError, LookupError, TypeError, AttributeError,
        RuntimeError, UnicodeDecodeError, json.JSONDecodeError, OSError,
    )  # fmt: skip
    try:
        yield
    except broken as error:
        if isinstance(error, OSError) and not where:
            raise
        hint = "; are its metadata UTF-8?" if config.name == "imagefolder" else ""
        cause = error.__cause__ or error
        told = str(cause) or type(cause).__name__
        raise ValueError(f"dataset {config.root or config.name!r} cannot be read{where} ({told}){hint}") from error


def _load(config: DatasetConfig):
    import datasets

    options = {"split": config.split, "streaming": config.streaming}
    if config.name == "embedded:emoji":
        return load_emoji(config.split, config.categories)
    if config.name == "embedded:pictograms":
        return load_pictograms(config.split, config.styles, config.categories)
    if config.name == "embedded:digits":
        return load_digits(config.split, config.categories)
    if config.name == "imagefolder":
        return _load_folder(str(config.root), options)
    if (folder := folder_of(config)) is not None:
        return read_folder(folder, config.split, config.captions)
    if config.name == "disk":
        data = datasets.load_from_disk(str(config.root))
        splits = data if isinstance(data, datasets.DatasetDict) else {"train": data}
        if config.split not in splits:
            raise ValueError(f"dataset.root={config.root!r} has no split {config.split!r}; allowed are {sorted(splits)}")
        return splits[config.split]
    if config.name.endswith(".parquet"):
        return datasets.load_dataset("parquet", data_files=config.name, **options)
    local = None if config.download else datasets.DownloadConfig(local_files_only=True)
    return datasets.load_dataset(config.name, download_config=local, **options)


def folder_of(config: DatasetConfig) -> str | None:
    """The folder that a data set is, by its root or its name; ``None`` for other sources."""
    if config.name in ("imagefolder", "disk"):
        return None
    return config.root or (config.name if Path(config.name).is_dir() else None)


def _load_folder(root: str, options: dict):
    import datasets

    try:
        return datasets.load_dataset("imagefolder", data_dir=root, **options)
    except ValueError as error:
        # a folder with other files only
        raise ValueError(f"dataset.root={root!r} has no pictures in split {options['split']!r}: {error}") from error
