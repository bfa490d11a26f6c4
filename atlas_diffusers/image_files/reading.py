"""Pictures of an undecoded image column."""

import io
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, ImageOps

MAX_PIXELS = 2**26  # 8192x8192, 200 MB decoded
ORIENTATION = 0x0112  # of EXIF; from 5 on the sides change places
# Pillow's decoders name damage by whatever they stumble over
UNREADABLE = (
    OSError, EOFError, SyntaxError, ValueError, TypeError, AttributeError, AssertionError, RuntimeError, LookupError,
    ArithmeticError, struct.error, Image.DecompressionBombError,
)  # fmt: skip


def decode(
    picture: dict | None, index: int | None = None, channels: int = 3, background: str = "white"
) -> Image.Image:
    """
    A picture ``{"bytes": ..., "path": ...}``, upright, as RGB (or grey) on ``background``; of an animation the first frame.

    16-bit greys are rounded to 8 bits; floats must be within [0, 1].

    Raises:
        OSError: for what cannot be read, has more than ``MAX_PIXELS`` pixels, or tones whose white is unknown; it names the
            file, or the picture's number.
    """
    with _opened(picture, index) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width}x{image.height} pixels; allowed are {MAX_PIXELS} in all")
        ImageOps.exif_transpose(image, in_place=True)
        return on_white(_eight_bits(image), background).convert("RGB" if channels == 3 else "L")


def size_of(picture: dict | None, index: int | None = None) -> tuple[int, int]:
    """Width and height of a picture set upright, from its header; ``OSError`` as of :func:`decode`."""
    with _opened(picture, index) as image:
        turned = image.getexif().get(ORIENTATION, 1) >= 5
        return (image.height, image.width) if turned else image.size


@contextmanager
def _opened(picture: dict | None, index: int | None) -> Iterator[Image.Image]:
    try:
        stored = picture or {"path": None, "bytes": None}
        source = stored["path"] if stored["bytes"] is None else io.BytesIO(stored["bytes"])
        with Image.open(source) as image:
            yield image
    except UNREADABLE as error:
        path = None if picture is None else picture["path"]
        name = path or ("of a stream" if index is None else f"number {index}")
        raise OSError(f"picture {name} cannot be read: {error}") from error


def on_white(image: Image.Image, background: str = "white") -> Image.Image:
    """The picture without transparency, on white or another colour."""
    if not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, background), image)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Greys of other depths, which ``convert`` would clip to 255, on [0, 255]."""
    if image.mode == "I":
        raise ValueError("32-bit integers, whose white is unknown; expected 8 or 16 bits")
    if image.mode == "F":
        tones = np.asarray(image)
        if not (0 <= tones.min() and tones.max() <= 1):
            raise ValueError(f"floats from {tones.min():g} to {tones.max():g}; expected [0, 1]")
        return Image.fromarray((255 * tones).round().astype(np.uint8))
    if image.mode.startswith("I;16"):
        return Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))
    return image
