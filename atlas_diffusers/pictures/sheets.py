"""Many pictures on one sheet."""

import bisect
import math
from typing import Any, cast

import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from .lettering import Lettering

MARGIN, LABEL_HEIGHT = 8, 22


def to_pictures(pixels: torch.Tensor) -> list[Image.Image]:
    """PIL pictures, RGB or grey, of (n, 3 or 1, height, width) in [-1, 1]."""
    return cast(list[Image.Image], VaeImageProcessor().postprocess(pixels, output_type="pil"))


def labelled_grid(
    images: list[Image.Image], labels: list[str], columns: int | None = None, tile: int = 160
) -> Image.Image:
    """
    Lay pictures out in rows on white, each with its label underneath.

    Args:
        images: RGB pictures; small ones are enlarged without smoothing by a whole factor that fits ``tile``.
        labels: one a picture, in any script; too long ones are cut with an ellipsis. All empty: no label lines.
        columns: pictures a row; by default as square as possible.
        tile: side of a cell in pixels; larger pictures enlarge the cell.

    Raises:
        ValueError: without pictures, or if the numbers differ.
    """
    if not images or len(images) != len(labels):
        raise ValueError(f"expected one label a picture and at least one picture, got {len(images)} and {len(labels)}")
    tile = max(tile, *(max(image.size) for image in images))
    columns = columns or math.ceil(math.sqrt(len(images)))
    line = LABEL_HEIGHT if any(labels) else 0
    cell_width, cell_height = tile + MARGIN, tile + MARGIN + line
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (columns * cell_width + MARGIN, rows * cell_height + MARGIN), "white")
    lettering = Lettering()
    for index, (image, label) in enumerate(zip(images, labels)):
        row, column = divmod(index, columns)
        x, y = MARGIN + column * cell_width, MARGIN + row * cell_height
        factor = max(1, tile // max(image.size))
        shown = image.convert("RGB").resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
        sheet.paste(shown, (x + (tile - shown.width) // 2, y + (tile - shown.height) // 2))
        lettering.write(sheet, x + tile / 2, y + tile + 3, _fit(label, tile, lettering))
    return sheet


def _fit(text: str, width: int, font: Any) -> str:
    if font.getlength(text) <= width:
        return text
    fitting = bisect.bisect(range(1, len(text)), width, key=lambda length: font.getlength(text[:length] + "…"))
    return text[:fitting] + "…"
