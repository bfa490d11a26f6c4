"""How a picture was made, written into its PNG file."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

KEY = "atlas-diffusers"


def save_picture(image: Image.Image, file: Path, settings: Mapping[str, object]) -> None:
    """Write a picture; a PNG has ``settings`` in it as JSON, under ``atlas-diffusers``."""
    if file.suffix.lower() != ".png":
        image.save(file)
        return
    info = PngInfo()
    info.add_itxt(KEY, json.dumps(settings, ensure_ascii=False))
    image.save(file, pnginfo=info)


def read_settings(file: Path) -> dict[str, Any]:
    """What :func:`save_picture` wrote; ``ValueError`` for a picture without it, ``OSError`` for what is none."""
    with Image.open(file) as image:
        stored = image.info.get(KEY)
    try:
        settings = json.loads(stored) if stored is not None else None
    except json.JSONDecodeError:
        settings = None
    if not isinstance(settings, dict):
        raise ValueError(f"{file} does not say how it was made: only PNG files of `atlas-diffusers generate` do")
    return settings
