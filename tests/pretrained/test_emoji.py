"""The embedded emoji and the script that rebuilds them."""

import hashlib
import importlib.util
import io
import json
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from atlas_diffusers.pretrained import FOLDER, is_held_out, load_emoji, pretrained_path

ROOT = Path(__file__).parents[2]
SHA256 = {
    "sheet.webp": "3cc3d38c2104009e356c69e5f18d94dd20937c91efdc61cb28308c658824d5c0",
    "captions.json": "2e5c5155755b96d0c8a396f26d3eaf9e280afa1444b0c016ae07816cbac9abe6",
}
CATEGORIES = {
    "Activities": 85,
    "Animals & Nature": 159,
    "Food & Drink": 131,
    "Objects": 264,
    "People & Body": 386,
    "Smileys & Emotion": 169,
    "Symbols": 224,
    "Travel & Places": 218,
}


def load_script():
    spec = importlib.util.spec_from_file_location("build_emoji", ROOT / "training" / "data" / "build_emoji.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build_emoji = load_script()


@pytest.fixture(scope="module")
def everything():
    data = load_emoji()
    return data, np.stack([np.asarray(image) for image in data["image"]])


def entries():
    return json.loads((FOLDER / "emoji" / "captions.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", SHA256)
def test_shipped_files_are_frozen(name):
    assert hashlib.sha256((FOLDER / "emoji" / name).read_bytes()).hexdigest() == SHA256[name]


def test_the_licence_travels_with_the_pictures():
    assert "Apache" in (FOLDER / "emoji" / "NOTICE").read_text(encoding="utf-8")


def test_numbers(everything):
    data, pictures = everything
    assert data.column_names == ["image", "text", "aliases", "category"]
    assert pictures.shape == (1636, 32, 32, 3) and pictures.dtype == np.uint8
    assert {image.mode for image in data.select(range(20))["image"]} == {"RGB"}
    assert Counter(data["category"]) == CATEGORIES
    assert all(data["text"]) and len(set(data["text"])) >= 1635


def test_pictures_stand_on_white(everything):
    _, pictures = everything
    corners = pictures[:, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert (corners == 255).all((1, 2)).mean() > 0.9
    assert (pictures < 250).any((1, 2, 3)).all()


def test_captions_meet_their_pictures(everything):
    data, pictures = everything
    texts = list(data["text"])
    colours = {"red heart": 0, "green heart": 1, "blue heart": 2}
    for text, channel in colours.items():
        inner = pictures[texts.index(text), 8:20, 8:24].mean((0, 1))
        assert inner.argmax() == channel and inner[channel] > 1.2 * np.median(inner)


def test_splits_part_the_pictures_by_name():
    train, test = load_emoji("train"), load_emoji("test")
    assert (len(train), len(test)) == (1459, 177)
    held_out = [e["text"] for e in entries() if int(hashlib.sha256(e["name"].encode()).hexdigest(), 16) % 10 == 0]
    assert list(test["text"]) == held_out
    assert list(train["text"]) == [e["text"] for e in entries() if not is_held_out(e["name"])]
    assert not set(train["text"]) & set(test["text"])


def test_no_picture_of_the_trained_categories_is_in_both_splits():
    trained_on = ["Smileys & Emotion", "Animals & Nature", "Food & Drink"]
    train, test = ({np.asarray(i).tobytes() for i in load_emoji(split, trained_on)["image"]} for split in ("train", "test"))
    assert (len(train), len(test)) == (418, 41) and not train & test


@pytest.mark.parametrize("categories", [["Activities"], ["Activities", "Food & Drink"], []])
def test_categories_filter(categories):
    data = load_emoji("all", categories)
    assert Counter(data["category"]) == {name: CATEGORIES[name] for name in categories}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("validation",), "split='validation'; allowed are"),
        (("all", ["Plants", "Activities"]), r"\['Plants'\] are unknown; allowed are \['Activities'"),
    ],
)
def test_unknown_names_are_reported(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_emoji(*arguments)


@pytest.mark.parametrize("name", ["emoji", "nothing", "../pretrained/emoji", ""])
def test_folders_without_a_pipeline_are_none(name):
    assert pretrained_path(name) is None


@pytest.mark.parametrize(
    "name, expected",
    [
        ("FAMILY: MAN, GIRL, BOY", "family man girl boy"),
        ("GRINNING FACE", "grinning face"),
        ("HEAVY BLACK HEART", "red heart"),
        ("MAN’S SHOE", "mans shoe"),
        ("T-REX", "t rex"),
        ("  DOUBLE   SPACE ", "double space"),
    ],
)
def test_caption(name, expected):
    assert build_emoji.caption(name) == expected


def test_every_shipped_caption_is_its_names_caption():
    shipped = entries()
    assert [e["text"] for e in shipped] == [build_emoji.caption(e["name"]) for e in shipped]
    assert all(e["text"] not in e["aliases"] and len(set(e["aliases"])) == len(e["aliases"]) for e in shipped)


@pytest.mark.parametrize(
    "short_names, expected",
    [
        (["red_ball", "crimson-ball"], ["crimson ball"]),
        (["x", "ab", "abc"], ["abc"]),
        (["one_two", "one-two"], ["one two"]),
        (["red_ball"], []),
    ],
)
def test_aliases(short_names, expected):
    assert build_emoji.aliases({"name": "RED BALL", "short_names": short_names}) == expected


def rounded_on_white(rgba):
    """``round(a·c + (1 − a)·255)``; a·c·255 is never a half integer, so rounding has no ties."""
    alpha = rgba[..., 3:].astype(np.float64) / 255
    return np.rint(alpha * rgba[..., :3] + (1 - alpha) * 255).astype(np.uint8)


def test_on_white_is_exact_for_every_colour_and_opacity():
    colour, alpha = np.meshgrid(np.arange(256), np.arange(256))
    rgba = np.stack([colour, 255 - colour, colour, alpha], -1).astype(np.uint8)
    for y in range(0, 256, 32):
        for x in range(0, 256, 32):
            sheet = np.zeros((34, 34, 4), np.uint8)
            sheet[1:33, 1:33] = tile = rgba[y : y + 32, x : x + 32]
            np.testing.assert_array_equal(build_emoji.on_white(Image.fromarray(sheet), 0, 0), rounded_on_white(tile))


SOURCES = [
    ("GREEN BALL", "Objects", (0, 1), ["green_ball", "lime_ball"]),
    ("FLAG: NOWHERE", "Flags", (1, 1), ["flag"]),
    ("SKIN TONE", "Component", (0, 0), ["skin"]),
    ("HEAVY BLACK HEART", "Symbols", (1, 0), ["heart", "red_heart"]),
]


@pytest.fixture
def tarball():
    """A package of 2x2 random pictures with 1-pixel borders, and the sheet inside it."""
    sheet = np.random.default_rng(0).integers(0, 256, (68, 68, 4), dtype=np.uint8)
    png = io.BytesIO()
    Image.fromarray(sheet).save(png, "PNG")
    rows = [
        {
            "unified": f"1F{i}",
            "name": name,
            "category": category,
            "subcategory": "none",
            "short_names": short_names,
            "sheet_x": x,
            "sheet_y": y,
        }
        for i, (name, category, (x, y), short_names) in enumerate(SOURCES)
    ]
    files = {"package/emoji.json": json.dumps(rows).encode(), "package/img/google/sheets/32.png": png.getvalue()}
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return archive.getvalue(), sheet


def test_build_lays_out_the_pictures(tarball):
    data, source = tarball
    sheet, captions = build_emoji.build(data)
    assert [(c["name"], c["text"], c["aliases"]) for c in captions] == [
        ("GREEN BALL", "green ball", ["lime ball"]),
        ("HEAVY BLACK HEART", "red heart", ["heart"]),
    ]
    pixels = np.asarray(sheet)
    assert pixels.shape == (32, 41 * 32, 3) and (pixels[:, 64:] == 255).all()
    for place, (column, row) in enumerate([(0, 1), (1, 0)]):
        tile = source[row * 34 + 1 : row * 34 + 33, column * 34 + 1 : column * 34 + 33]
        np.testing.assert_array_equal(pixels[:, place * 32 : place * 32 + 32], rounded_on_white(tile))


def test_encode_is_lossless(tarball):
    sheet, captions = build_emoji.build(tarball[0])
    files = build_emoji.encode(sheet, captions)
    with Image.open(io.BytesIO(files["sheet.webp"])) as decoded:
        np.testing.assert_array_equal(np.asarray(decoded.convert("RGB")), np.asarray(sheet))
    assert json.loads(files["captions.json"]) == captions


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["build_emoji.py", *map(str, arguments)])
    return build_emoji.main()


def test_the_script_writes_and_checks(tarball, tmp_path, monkeypatch, capsys):
    data, _ = tarball
    (tmp_path / "package.tgz").write_bytes(data)
    with pytest.raises(SystemExit):
        run(monkeypatch, tmp_path / "package.tgz", "--output", tmp_path / "out")
    assert "SHA-256 is" in capsys.readouterr().err and not (tmp_path / "out").exists()

    monkeypatch.setattr(build_emoji, "TARBALL_SHA256", hashlib.sha256(data).hexdigest())
    arguments = (tmp_path / "package.tgz", "--output", tmp_path / "out")
    assert run(monkeypatch, *arguments) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["captions.json", "sheet.webp"]
    assert run(monkeypatch, *arguments, "--check") == 0

    sheet, captions = build_emoji.build(data)
    sheet.save(tmp_path / "out" / "sheet.webp", lossless=True, method=0, quality=0)
    capsys.readouterr()
    assert run(monkeypatch, *arguments, "--check") == 1
    assert "pixels equal, only the libwebp encoding differs" in capsys.readouterr().out
    Image.new("RGB", sheet.size).save(tmp_path / "out" / "sheet.webp", lossless=True)
    assert run(monkeypatch, *arguments, "--check") == 1
    assert "pixels differ too" in capsys.readouterr().out
