import numpy as np
import pytest
from PIL import Image, ImageFont

from atlas_diffusers.pictures import labelled_grid, sheets


def test_pictures_stand_enlarged_by_a_whole_factor_in_reading_order():
    colours = ["red", "green", "blue"]
    sheet = labelled_grid([Image.new("RGB", (10, 10), c) for c in colours], ["", "", ""], columns=2, tile=35)
    assert sheet.size == (2 * 43 + 8, 2 * 43 + 8)
    pixels = np.array(sheet)
    for i, colour in enumerate(colours):
        y, x = 8 + i // 2 * 43 + 2, 8 + i % 2 * 43 + 2
        expected = np.array(Image.new("RGB", (30, 30), colour))
        np.testing.assert_array_equal(pixels[y : y + 30, x : x + 30], expected)
        assert (pixels[y - 1, x - 1] == 255).all()


def test_labels_are_written_below_and_cut_to_the_tile():
    image = Image.new("RGB", (160, 160), "red")
    sheets = [np.array(labelled_grid([image] * 2, [text, "b"])) for text in ("a", "a" * 200)]
    below = slice(8 + 160, 8 + 160 + 22)
    assert all((sheet[below] < 255).any() for sheet in sheets)
    margin = sheets[1][below, 8 + 160 : 8 + 160 + 8]
    assert (margin == 255).all()


@pytest.mark.parametrize("length", [23, 3000, 1_000_000])
def test_a_long_label_costs_a_few_measurements(length, monkeypatch):
    """Seven pixels a letter: 21 letters and the ellipsis fit 160."""
    measured, font = [], ImageFont.load_default(13)
    monkeypatch.setattr(type(font), "getlength", lambda font, text: measured.append(text) or 7 * len(text))
    assert sheets._fit("a" * length, 160, font) == "a" * 21 + "…" and len(measured) < 25
    assert sheets._fit("a" * 22, 160, font) == "a" * 22 and sheets._fit("abc", 3, font) == "…"


@pytest.mark.parametrize("count, labels", [(0, []), (1, ["a", "b"])])
def test_numbers_must_agree(count, labels):
    with pytest.raises(ValueError, match=f"got {count} and {len(labels)}"):
        labelled_grid([Image.new("RGB", (4, 4))] * count, labels)
