"""Labels show what they say in any script."""

import gzip

import numpy as np
import pytest
from fontTools.ttLib import TTFont
from PIL import Image, ImageDraw, ImageFont

from atlas_diffusers.pictures import labelled_grid
from atlas_diffusers.pictures.lettering import UNIFONT, Lettering, emoji_pictures, unifont


def ink(text):
    """What a label adds to a white sheet, cropped."""
    sheet = Image.new("RGB", (400, 24), "white")
    Lettering().write(sheet, 200, 2, text)
    return cropped(sheet)


def cropped(sheet):
    rows, columns = np.where(np.array(sheet.convert("L")) < 200)
    return np.array(sheet)[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]


def missing(font):
    """The box of a font."""
    sheet = Image.new("RGB", (60, 24), "white")
    ImageDraw.Draw(sheet).text((10, 2), "\uffff", fill="black", font=font)
    return cropped(sheet)


@pytest.mark.parametrize("letter", [*"Ünïcödé", *"сердце", "心", "愛", "ह", "ด", "א", "ع", "가", "Ω", "∞", "→"])
def test_letters_are_drawn_and_are_no_boxes(letter):
    found = ink(letter)
    assert found.size > 0
    for font in (ImageFont.load_default(13), unifont()):
        assert found.shape != missing(font).shape or not np.array_equal(found, missing(font))


def test_different_letters_look_different():
    letters = "Ünïcödéсрц心愛"
    drawn = {ink(letter).tobytes() for letter in letters}
    assert len(drawn) == len(letters)


def test_unifont_is_drawn_pixel_by_pixel():
    """The heart of 16 x 16 dots, as the font has it."""
    expected = Image.new("L", (16, 16), 255)
    ImageDraw.Draw(expected).text((0, 0), "心", fill=0, font=unifont(), anchor="la")
    sheet = Image.new("RGB", (64, 24), "white")
    Lettering().write(sheet, 32, 2, "心")
    found = np.array(sheet.convert("L"))[2:18, 24:40]
    np.testing.assert_array_equal(found, np.array(expected))
    assert 20 < (found < 128).sum() < 120


@pytest.mark.parametrize("text, characters", [("🐼", ["🐼"]), ("a 🐼❤️", ["🐼", "❤"]), ("#️⃣", ["#⃣"]), ("👍🏽", ["👍"])])
def test_emoji_are_the_embedded_pictures(text, characters):
    runs = Lettering()._runs(text)
    assert [run for kind, run in runs if kind == "emoji"] == characters
    sheet = Image.new("RGB", (100, 24), "white")
    Lettering().write(sheet, 50, 2, text)
    picture = np.array(emoji_pictures()[characters[-1]].resize((16, 16), Image.Resampling.LANCZOS))
    left = round(50 + Lettering().getlength(text) / 2 - 16)
    np.testing.assert_array_equal(np.array(sheet)[2:18, left : left + 16], picture)


def test_what_no_font_has_is_spelt_out():
    assert Lettering()._runs("\U00012000") == [("latin", "[cuneiform sign a]")]


def test_latin_labels_are_those_of_pillow():
    expected = Image.new("RGB", (200, 24), "white")
    ImageDraw.Draw(expected).text((100, 2), "a red heart", fill="black", font=ImageFont.load_default(13), anchor="ma")
    sheet = Image.new("RGB", (200, 24), "white")
    Lettering().write(sheet, 100, 2, "a red heart")
    np.testing.assert_array_equal(np.array(sheet), np.array(expected))


def test_labels_of_a_sheet_are_cut_in_any_script():
    sheets = [np.array(labelled_grid([Image.new("RGB", (160, 160), "red")] * 2, [text, "b"])) for text in ("心", "心" * 40)]
    below = slice(168, 190)
    assert (sheets[0][below] < 255).any() and (sheets[1][below, 168:176] == 255).all()


def test_the_font_is_free():
    with gzip.open(UNIFONT) as file:
        font = TTFont(file)
        names = {record.nameID: record.toUnicode() for record in font["name"].names}
        assert "SIL Open Font License version 1.1" in names[13] and len(font.getBestCmap()) > 57_000
