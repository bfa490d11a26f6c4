"""The data set that a recipe names."""

from pathlib import Path

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
    import pyarrow

    if config.captions != "auto" and folder_of(config) is None:
        raise ValueError(f"dataset.captions={config.captions!r} is for a folder of pictures, which name={config.name!r} is not")
    try:
        data = _load(config)
        known = data.column_names or list(next(iter(data), ()))
    except (datasets.exceptions.DatasetGenerationError, pyarrow.ArrowInvalid) as error:
        hint = "; are its metadata UTF-8?" if config.name == "imagefolder" else ""
        raise ValueError(f"dataset {config.root or config.name!r} cannot be read ({error.__cause__ or error}){hint}") from error
    for column in (config.image_column, config.caption_column, config.aliases_column, config.label_column):
        if column is not None and column not in known:
            raise ValueError(f"dataset {config.name!r} has no column {column!r}; its columns are {known}")
    if config.streaming and isinstance(data, datasets.Dataset):
        data = data.to_iterable_dataset(num_shards=min(len(data), STREAM_SHARDS))
    return data.cast_column(config.image_column, datasets.Image(decode=False))


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
        return _load_folder(config.root, options)
    if (folder := folder_of(config)) is not None:
        return read_folder(folder, config.split, config.captions)
    if config.name == "disk":
        data = datasets.load_from_disk(config.root)
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
