"""Pictures of every format and depth: tones and transparency are kept, and whatever is damaged is one ``OSError``."""

import io
import random

import numpy as np
import pytest
from PIL import Image

from atlas_diffusers.image_files import decode, reading


def stored(image: Image.Image, file_format: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format)
    return buffer.getvalue()


def read(content: bytes, **options) -> np.ndarray:
    return np.array(decode({"bytes": content, "path": None}, 3, **options))


def colours(mode: str = "RGB") -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, len(mode)), dtype=np.uint8))


@pytest.mark.parametrize("file_format", ["PNG", "BMP", "TIFF", "DDS", "TGA", "PPM", "WEBP"])
def test_lossless_formats_are_read_exactly(file_format):
    options = {"lossless": True} if file_format == "WEBP" else {}
    buffer = io.BytesIO()
    colours().save(buffer, file_format, **options)
    np.testing.assert_array_equal(read(buffer.getvalue()), np.array(colours()))


def test_transparency_is_laid_on_white():
    image = colours("RGBA")
    rgba = np.array(image).astype(float)
    alpha = rgba[..., 3:] / 255
    assert np.abs(read(stored(image, "PNG")) - (alpha * rgba[..., :3] + 255 * (1 - alpha))).max() < 1
    palette = colours().quantize(8)
    palette.info["transparency"] = 0
    found, clear = read(stored(palette, "PNG")), np.array(palette) == 0
    assert (found[clear] == 255).all() and not (found[~clear] == 255).all() and clear.any()


def test_floats_within_zero_and_one_are_tones():
    tones = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
    found = read(stored(Image.fromarray(tones), "TIFF"), channels=1)
    np.testing.assert_array_equal(found, np.arange(256).reshape(16, 16))


@pytest.mark.parametrize("values, message", [
    (np.full((4, 4), 70_000, np.int32), "picture number 3 cannot be read: 32-bit integers, whose white is unknown"),
    (np.full((4, 4), 255, np.float32), r"floats from 255 to 255; expected \[0, 1\]"),
    (np.full((4, 4), np.nan, np.float32), r"floats from nan to nan; expected \[0, 1\]"),
])  # fmt: skip
def test_tones_whose_white_is_unknown_are_refused(values, message):
    with pytest.raises(OSError, match=message):
        read(stored(Image.fromarray(values), "TIFF"))


def test_too_many_pixels_are_refused_before_decoding(monkeypatch):
    content = stored(Image.new("1", (9000, 9000)), "PNG")
    assert len(content) < 20_000
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(OSError, match="picture number 3 cannot be read: 9000x9000 pixels; allowed are 67108864 in all"):
        read(content)


FORMATS = ["PNG", "JPEG", "WEBP", "AVIF", "DDS", "TIFF", "BMP", "GIF", "ICO", "BLP", "ICNS", "QOI"]


@pytest.mark.filterwarnings("ignore")  # Pillow's words about the damage
@pytest.mark.parametrize("file_format", FORMATS)
def test_damage_is_one_kind_of_error(file_format, monkeypatch):
    """Cut and overwritten files of every format are read, or are an ``OSError`` that names the picture."""
    monkeypatch.setattr(reading, "MAX_PIXELS", 2**20)
    image = colours().quantize() if file_format == "BLP" else colours()
    content, choice, refused = stored(image, file_format), random.Random(0), 0
    for _ in range(60):
        damaged = bytearray(content)
        for _ in range(4):
            place = choice.randrange(min(len(damaged), choice.choice([64, 4096])))
            damaged[place] = choice.choice([0, 255, choice.randrange(256)])
        try:
            read(bytes(damaged[: choice.choice([None, choice.randrange(len(damaged))])]))
        except OSError as error:
            refused += 1
            assert str(error).startswith("picture number 3 cannot be read: ")
    assert refused > 5


def test_a_file_and_a_missing_picture_are_named(tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(OSError, match="picture .*text.png cannot be read"):
        decode({"bytes": None, "path": str(tmp_path / "text.png")})
    with pytest.raises(OSError, match="picture of a stream cannot be read"):
        decode(None)


def test_sixteen_bits_are_rounded_to_eight():
    """257 k is the tone k exactly, and what lies between goes to the nearer one; white stays white."""
    tones = np.concatenate([257 * np.arange(256), 257 * np.arange(255) + 128, 257 * np.arange(255) + 129]).astype(np.uint16)
    found = read(stored(Image.fromarray(tones[None]), "PNG"), channels=1)[0]
    np.testing.assert_array_equal(found, np.concatenate([np.arange(256), np.arange(255), np.arange(1, 256)]))
