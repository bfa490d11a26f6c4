"""The embedded pictograms: what ships, how they are split, what their captions say, and the script that rebuilds them."""

import hashlib
import importlib.util
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from atlas_diffusers.config import DatasetConfig
from atlas_diffusers.pretrained import load_pictograms
from atlas_diffusers.pretrained.pictogram_data import (
    FOLDER,
    STYLES,
    coloured,
    pictogram_captions,
    pictogram_splits,
    things,
    with_article,
)
from atlas_diffusers.training.sources import load_training_data

SCRIPT = Path(__file__).parents[2] / "training" / "data" / "build_pictograms.py"
SHA256 = {
    "flat.webp": "40ecd28e9853789b51ca3e2776bcdf370f6efb6f0cf8432423edd85f8386ba2e",
    "fluent.webp": "260d7ed73a65869364ad65fdd7de03d2eb8e3c21cf61de077421bef52809a90f",
    "fxemoji.webp": "f93ef1308e031ff7361efc3196185335a3061352a2397a7133bf8a8c9b58ded3",
    "noto-v1.webp": "448fb31aef5c0d50b545710a6a26d797b310ceb2b8856bcd6291c08e8abc26dc",
    "noto.webp": "e984cb0181fa3427be0c42fb96141f7c7cf726b9d2f19dda3ccc782d125a4bcd",
    "things.json": "a144e6cb90729681531a721b45344b0c5833305e1f3a4e470111386aa25df030",
    "twemoji.webp": "4303105f3b35a4f8e14b31a73b0928cdb58b871b2b4ace443e755d4015d218a8",
}


@pytest.fixture(scope="module")
def everything():
    return load_pictograms()


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("build_pictograms", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", SHA256)
def test_shipped_files_are_frozen(name):
    assert hashlib.sha256((FOLDER / name).read_bytes()).hexdigest() == SHA256[name]


def test_licences_travel_with_the_pictures():
    notice = (FOLDER / "NOTICE").read_text(encoding="utf-8")
    assert all(f"{style}.webp" in notice for style in STYLES)
    assert all(licence in notice for licence in ("Apache License 2.0", "MIT License", "CC BY 4.0"))


def test_numbers(everything):
    assert len(everything) == 7976 and len(set(everything["name"])) == 1558
    assert Counter(everything["split"]) == {"train": 6983, "held_out_pairs": 769, "held_out_things": 224}
    styles = {"noto": 1558, "noto-v1": 1168, "fluent": 1556, "flat": 1556, "twemoji": 1558, "fxemoji": 580}
    assert Counter(everything["style"]) == styles


def test_every_picture_is_its_tile(everything):
    for row in everything.select(range(0, len(everything), 997)):
        thing = next(t for t in things() if t["name"] == row["name"])
        y, x = (64 * v for v in divmod(thing["at"][row["style"]], 40))
        with Image.open(FOLDER / f"{row['style']}.webp") as sheet:
            tile = np.asarray(sheet.convert("RGB"))[y : y + 64, x : x + 64]
        np.testing.assert_array_equal(np.asarray(row["image"]), tile)
        assert (tile < 250).any()


def test_splits_hold_out_drawings_and_things(everything):
    styles_of = defaultdict(lambda: defaultdict(set))
    for name, style, split in zip(everything["name"], everything["style"], everything["split"]):
        styles_of[name][split].add(style)
    for name, splits in styles_of.items():
        if splits["held_out_things"]:
            assert int(hashlib.sha256(name.encode()).hexdigest(), 16) % 100 < 3
            assert not splits["train"] and not splits["held_out_pairs"]
        elif splits["held_out_pairs"]:
            assert len(splits["train"]) >= 2
    parts = [len(load_pictograms(split, styles=["fxemoji"])) for split in ("train", "held_out_pairs", "held_out_things")]
    assert sum(parts) == 580 and min(parts) > 0


def test_a_thing_keeps_two_styles_in_training():
    for name in (f"thing {i}" for i in range(2000)):
        splits = list(pictogram_splits(name, ["a", "b", "c"]).values())
        assert splits.count("train") >= 2 or splits == ["held_out_things"] * 3


def test_captions_name_the_thing_and_its_own_style_only(everything):
    wordings = [f" {wording} " for words in STYLES.values() for wording in words if wording != "flat"]
    named, written = 0, 0
    for row in everything.select(range(0, len(everything), 61)):
        own = [f" {wording} " for wording in STYLES[row["style"]]]
        for caption in row["captions"]:
            padded = f" {caption.replace(',', ' ')} "
            others = [w for w in wordings if w in padded and not any(w.strip() in mine for mine in own)]
            assert not [w for w in others if w.strip() not in f"{row['name']} {row['names']} {row['keywords']}"], caption
            spelled = (row["name"], *row["names"], row["name"].split()[-1])
            named, written = named + any(n in caption for n in spelled), written + 1
    assert named >= 0.85 * written


def test_captions_belong_to_name_and_style():
    thing = next(t for t in things() if t["name"] == "automobile")
    captions = pictogram_captions(thing, "flat")
    assert captions == pictogram_captions(thing, "flat") != pictogram_captions(thing, "noto")
    assert any("car" in caption.split() for caption in captions)
    assert all(caption == caption.lower() for caption in captions)


@pytest.mark.parametrize(
    "given, expected",
    [
        ("red heart", ["heart in red", "heart, red"]),
        ("light blue heart", ["heart in light blue", "heart, light blue"]),
        ("blueberries", []),
        ("orange", []),
    ],
)
def test_a_colour_may_stand_behind(given, expected):
    assert coloured(given) == expected


def test_captions_have_colours_behind(everything):
    captions = [caption for row in everything if row["name"] == "red heart" for caption in row["captions"]]
    assert any("heart in red" in caption or "heart, red" in caption for caption in captions)


@pytest.mark.parametrize(
    "given, expected",
    [("a owl in flat style", "an owl in flat style"), ("a unicorn", "a unicorn"), ("a red apple", "a red apple")],
)
def test_articles(given, expected):
    assert with_article(given) == expected


@pytest.mark.parametrize(
    "options, named",
    [({"split": "test"}, "held_out_pairs"), ({"styles": ["manga"]}, "twemoji"), ({"categories": ["flags"]}, "smileys")],
)
def test_unknown_names_list_what_there_is(options, named):
    with pytest.raises(ValueError, match=named):
        load_pictograms(**options)


def test_a_recipe_reads_them_and_says_where_styles_belong():
    config = DatasetConfig(name="embedded:pictograms", split="train", styles=["fxemoji"], categories=["food & drink"])
    data = load_training_data(config)
    assert set(data["style"]) == {"fxemoji"} and set(data["category"]) == {"food & drink"} and set(data["split"]) == {"train"}
    with pytest.raises(ValueError, match="styles choose among the pictures of embedded:pictograms"):
        DatasetConfig(name="embedded:emoji", styles=["noto"])
    with pytest.raises(ValueError, match="categories choose among"):
        DatasetConfig(root="my-pictures", categories=["noto"])


def test_script_draws_on_white(script):
    icons = {"icons": {"dot": {"body": '<rect x="8" y="0" width="8" height="16" fill="#ff0000" fill-opacity="0.5"/>'}},
             "aliases": {"spot": {"parent": "dot"}}, "width": 16, "height": 16}  # fmt: skip
    assert script.drawing(icons, "square") is None
    assert script.drawing(icons, "spot") == script.drawing(icons, "dot")
    pytest.importorskip("resvg_py")
    pixels = script.render(script.drawing(icons, "dot"))
    assert pixels.shape == (64, 64, 3)
    assert (pixels[:, :32] == 255).all()
    np.testing.assert_allclose(pixels[:, 33:].reshape(-1, 3).mean(0), [255, 127.5, 127.5], atol=1)


def test_script_spells_names_as_words(script):
    assert script.words("Jack-O-Lantern: lit") == "jack o lantern lit"
    assert script.plain("2764-FE0F") == "2764"


def test_script_refuses_another_tarball(script, tmp_path):
    (tmp_path / "set.tgz").write_bytes(b"something else")
    with pytest.raises(SystemExit, match="SHA-256"):
        script.members(tmp_path, "set.tgz", "0" * 64, "icons.json")


def test_sheets_are_lossless(script):
    pictures = [np.random.default_rng(i).integers(0, 256, (64, 64, 3), dtype=np.uint8) for i in range(3)]
    sheets = {"noto": script.sheet(pictures)}
    assert script.loss(sheets, script.encode(sheets, [])) == {"noto": 0.0}
