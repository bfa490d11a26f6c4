"""Short names of contents: what a cache was made from, and what a run was trained on."""

import hashlib
import json
import os
from typing import Any

import torch

from .data import BridgePairs, PictureDataset

PICTURES = 2048


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


def data_fingerprint(pictures: PictureDataset | BridgePairs) -> str:
    """
    Of the captions and labels of every row, and of about 2,048 pictures evenly spaced: of their bytes, or, for files, of name
    and size. Of a stream only its name.
    """
    if isinstance(pictures, BridgePairs):
        return fingerprint(data_fingerprint(pictures.pictures), data_fingerprint(pictures.source), str(pictures.partners))
    c, data = pictures.config, pictures.data
    if c.streaming:
        return fingerprint(c.name, str(c.root), c.split)
    texts = [str(len(data))]
    if columns := [name for name in (c.caption_column, c.aliases_column, c.label_column) if name is not None]:
        texts += (json.dumps(batch) for batch in data.select_columns(columns).iter(1000))
    stride = max(1, len(data) // PICTURES)
    texts += (_picture(data[place][c.image_column]) for place in range(0, len(data), stride))
    return fingerprint(*texts)


def _picture(picture: dict | None) -> str:
    if picture is None:
        return "none"
    if picture["bytes"] is not None:
        return hashlib.sha256(picture["bytes"]).hexdigest()
    path = picture["path"]
    return f"{os.path.basename(path)} {os.path.getsize(path) if os.path.exists(path) else 'missing'}"


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Of the vocabulary."""
    return fingerprint(json.dumps(sorted(tokenizer.get_vocab().items())))
