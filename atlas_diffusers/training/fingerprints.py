"""Short names of contents: what a cache was made from, and what a run was trained on."""

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

import torch

from .data import Annotated, BridgePairs, PictureDataset

# contents that are read at most, of pictures evenly spaced over the data
MOST_PICTURES, MOST_BYTES = 16_384, 2**30
ROWS = 1000


def fingerprint(*texts: str, networks: tuple[torch.nn.Module, ...] = (), frozen_only: bool = False) -> str:
    """16 hexadecimal digits of texts and of the weights, or of the weights that do not train, of networks."""
    digest = hashlib.sha256("\n".join(texts).encode())
    for network in networks:
        trained = {name for name, p in network.named_parameters() if p.requires_grad} if frozen_only else ()
        for name, tensor in network.state_dict().items():
            if name not in trained:
                digest.update(name.encode())
                digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def data_fingerprint(pictures: PictureDataset | Annotated) -> str:
    """
    Of captions, labels and names and sizes of every picture, and of the bytes of all pictures, or, where they are more than
    16,384 or than 1 GiB, of as many evenly spaced ones. Of a stream only its name.

    Not seen are: another picture of the same name and size between those that are read, what a stream holds, and when a file
    was written, which copying changes.
    """
    if isinstance(pictures, BridgePairs):
        return fingerprint(data_fingerprint(pictures.pictures), data_fingerprint(pictures.source), str(pictures.partners))
    if isinstance(pictures, Annotated):
        return data_fingerprint(pictures.pictures)
    c, data = pictures.config, pictures.data
    if c.streaming:
        return fingerprint(c.name, str(c.root), c.split)
    texts = [str(len(data))]
    if columns := [name for name in (c.caption_column, c.aliases_column, c.label_column) if name is not None]:
        texts += (json.dumps(batch) for batch in data.select_columns(columns).iter(ROWS))
    images = data.select_columns([c.image_column])
    named = [pair for table in images.with_format("arrow").iter(ROWS) for pair in _named(table[c.image_column])]
    size = sum(size for _, size in named)
    stride = max(1, math.ceil(len(named) / MOST_PICTURES), math.ceil(size / MOST_BYTES))
    contents = (_contents(images[place][c.image_column]) for place in range(0, len(named), stride))
    return fingerprint(*texts, json.dumps(named), *contents)


def _named(column: Any) -> list[tuple[str, int]]:
    """Name and size of each picture of an Arrow column, without reading it; 0 for one that is not there."""
    import pyarrow.compute

    pc: Any = pyarrow.compute  # makes its functions when it is imported
    paths = (path or "" for path in pc.struct_field(column, "path").to_pylist())
    sizes = pc.binary_length(pc.struct_field(column, "bytes")).to_pylist()
    return [
        (os.path.basename(path), size if size is not None else os.path.getsize(path) if os.path.isfile(path) else 0)
        for path, size in zip(paths, sizes)
    ]


def _contents(picture: dict | None) -> str:
    found = picture or {"bytes": b"", "path": None}
    if found["bytes"] is not None:
        return hashlib.sha256(found["bytes"]).hexdigest()
    return hashlib.sha256(Path(found["path"]).read_bytes() if os.path.isfile(found["path"]) else b"").hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Of the vocabulary."""
    return fingerprint(json.dumps(sorted(tokenizer.get_vocab().items())))
