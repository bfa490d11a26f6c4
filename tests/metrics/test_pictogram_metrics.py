"""Recognition of things and styles, on painters whose answers are known."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import build_tiny_pipeline
from safetensors.torch import save_file

from atlas_diffusers.config import TrainingConfig
from atlas_diffusers.metrics.pictogram_card import card
from atlas_diffusers.metrics.pictograms import (
    PictogramBank,
    measure_balance,
    measure_distribution,
    measure_recognition,
    measure_wordings,
    reconstructing_by,
)
from atlas_diffusers.metrics.translation import measure_translation
from atlas_diffusers.pretrained import load_pictograms


def thumbnails(images):
    """Features that tell drawings apart: 8x8 thumbnails."""
    small = [np.asarray(image.convert("RGB").resize((8, 8)), dtype=np.float32).ravel() / 255 for image in images]
    return torch.from_numpy(np.stack(small))


@pytest.fixture(scope="module")
def bank():
    return PictogramBank(features=thumbnails)


@pytest.fixture(scope="module")
def painter():
    """Draws what is asked for, in noto style where no style is; ``wrong`` swaps things or styles."""
    data = load_pictograms()
    pictures = {(name, style): i for i, (name, style) in enumerate(zip(data["name"], data["style"]))}
    spelled = {other: name for name, others in zip(data["name"], data["names"]) for other in others}
    spelled |= {name: name for name in data["name"]}
    names = sorted(set(data["name"]))

    def paint(prompt, shift, style):
        name, _, wanted = prompt.removesuffix(" style").partition(", ")
        for part in ("a picture of a ", "a picture of an ", "an ", "a "):
            name = name.removeprefix(part)
        name = spelled[name.removesuffix(" emoji")]
        if shift:
            name = names[(names.index(name) + shift) % len(names)]
        found = pictures.get((name, style or wanted), pictures[name, "noto"])
        return data[found]["image"]

    def make(every=None, shift=0, style=None):
        def draw(prompts, seed):
            return [paint(p, shift if every and i % every == 0 else 0, style) for i, p in enumerate(prompts)]

        return draw

    return make


@pytest.mark.parametrize("split", ["train", "held_out_pairs", "held_out_things"])
def test_the_right_drawings_are_recognised(bank, painter, split):
    found = measure_recognition(painter(), bank, split, 40)
    assert found.prompts == 40 and found.thing >= 0.97 and found.style >= 0.97
    # a training drawing is at no distance from itself; others are as far as held-out ones usually are
    if split == "train":
        assert found.nearest_training < 1e-3 < found.nearest_held_out
    else:
        assert found.nearest_training == pytest.approx(found.nearest_held_out, rel=0.5)


def test_drawings_through_an_autoencoder_are_recognised_as_far_as_it_keeps_them(bank):
    pipeline = build_tiny_pipeline()
    pipeline.vae = lambda pixels: SimpleNamespace(sample=pixels)
    assert measure_recognition(reconstructing_by(pipeline), bank, "train", 70).thing >= 0.97
    pipeline.vae = lambda pixels: SimpleNamespace(sample=-pixels)
    assert measure_recognition(reconstructing_by(pipeline), bank, "train", 70).thing < 0.3


def test_every_other_thing_wrong(bank, painter):
    found = measure_recognition(painter(every=2, shift=7), bank, "train", 40)
    assert 0.4 <= found.thing <= 0.55


def test_another_style_is_noticed(bank, painter):
    found = measure_recognition(painter(style="noto"), bank, "train", 60)
    asked = sum(bank.styles[i] == "noto" for i in bank.rows("train")) / len(bank.rows("train"))
    assert found.thing > 0.9 and found.style == pytest.approx(asked, abs=0.2)


def test_copies_of_other_things_are_counted(bank, painter):
    """Drawings of the training split that show another thing are copies: their distance to training is nothing."""
    found = measure_recognition(painter(every=1, shift=7), bank, "held_out_pairs", 40)
    assert found.copied > 0.6
    assert measure_recognition(painter(), bank, "train", 40).copied == 0


def test_wordings_agree_or_not(bank, painter):
    right = measure_wordings(painter(), bank, 20)
    assert right["same"] > 0.9 and right["right"] > 0.9
    one_in_five = measure_wordings(painter(every=5, shift=11), bank, 20)
    assert one_in_five["same"] == pytest.approx(0.8, abs=0.06) and one_in_five["right"] == pytest.approx(0.8, abs=0.06)


def test_distribution_of_the_real_drawings(bank, painter):
    found = measure_distribution(painter(), bank, 40)
    other = measure_distribution(painter(style="noto-v1"), bank, 40)
    for style, values in found.items():
        assert values["coverage"] > 0.3
        if style not in ("noto", "noto-v1"):
            assert values["kid"] < other[style]["kid"]


def test_balance_of_categories(bank):
    data = load_pictograms("train")
    rows = np.random.default_rng(0).choice(len(data), 200, replace=False)
    fair = measure_balance(lambda prompts, seed: [data[int(i)]["image"] for i in rows], bank, 200)
    food = load_pictograms("train", categories=["food & drink"])
    unfair = measure_balance(lambda prompts, seed: [food[i]["image"] for i in range(200)], bank, 200)
    assert fair < 0.12 and unfair == pytest.approx(1 - len(food) / len(data), abs=0.03)


def test_a_file_of_other_features_is_refused(tmp_path):
    save_file({"features": torch.zeros(3, 4)}, tmp_path / "features.safetensors")
    with pytest.raises(ValueError, match="features of 3 pictures; the pictograms are 7976"):
        PictogramBank(tmp_path / "features.safetensors")


def test_the_card_says_what_there_is_what_was_measured_and_what_was_missed(tmp_path):
    pipeline = build_tiny_pipeline(default_guidance_scale=2.0)
    pipeline.save_pretrained(tmp_path)
    (tmp_path / "recipe.json").write_text(TrainingConfig(max_steps=70, batch_size=64, optimizer="muon").model_dump_json())
    (tmp_path / "state.json").write_text(json.dumps({"step": 40, "loss": 0.25}))
    splits = ("train", "held_out_pairs", "held_out_things")
    rows = {s: {"prompts": 9, "thing": 0.6, "style": 0.9, "copied": 0.0, "nearest_training": 1.5, "nearest_held_out": 2.5}
            for s in splits}  # fmt: skip
    styles = {"noto": {"kid": 0.01, "kid_training": 0.002, "coverage": 0.75}}
    figures = {**rows, "wordings": {"same": 0.9, "right": 0.3}, "styles": styles, "balance": 0.2}
    assert "autoencoder" not in card(tmp_path, figures, "the command")
    text = card(tmp_path, {**figures, "autoencoder": {"thing": 0.8, "style": 0.7}}, "the command")
    weights = sum(p.numel() for p in pipeline.unet.parameters())
    assert f"| `unet` | `AtlasUNet2DModel` | {weights:,} |" in text and "3 steps at guidance scale 2.0" in text
    assert "40 steps of 64 pictures, loss 0.2500" in text and "| `optimizer` | muon |" in text and "the command" in text
    cells = [[cell.strip() for cell in line.split("|")] for line in text.splitlines() if line.startswith("|")]
    lines = {name: values for _, name, *values in cells}
    assert lines["trained pairs: the thing is right"] == ["0.600", "at least 0.85", "missed", ""]
    assert lines["held-out pairs: the thing is right"] == ["0.600", "at least 0.5", "reached", ""]
    assert lines["held-out pairs: copies of another thing"] == ["0.000", "at most 0", "reached", ""]
    assert lines["trained pairs through the autoencoder alone: the style is right"] == ["0.700", "", "", ""]
    assert lines["five wordings draw the right thing"] == ["0.300", "", "", ""]
    assert lines["held_out_things"] == ["9", "1.500", "2.500", ""] and lines["noto"] == ["0.0100", "0.0020", "0.750", ""]


def test_translations_are_compared_with_the_true_drawings(bank):
    data = load_pictograms()
    key = {np.asarray(data[i]["image"]).tobytes(): i for i in bank.rows("train", "noto") + bank.rows("held_out_pairs", "noto")}
    fluent = {name: i for i, name in enumerate(bank.names) if bank.styles[i] == "fluent"}

    def perfect(pictures):
        return [data[fluent[bank.names[key[np.asarray(picture).tobytes()]]]]["image"] for picture in pictures]

    right = measure_translation(perfect, bank, "noto", "fluent", 20)
    assert right.pictures == 20 and right.rms == 0 and right.style == 1 and right.thing > 0.9
    untouched = measure_translation(lambda pictures: pictures, bank, "noto", "fluent", 20)
    assert untouched.rms == untouched.source_rms == right.source_rms > 0.05 and untouched.style <= 0.1
    assert untouched.thing == untouched.source_thing == right.source_thing
    rows = bank.rows("held_out_pairs", "fluent")
    pairs = [(i, j) for i in rows for j, s in enumerate(bank.styles) if s == "noto" and bank.names[j] == bank.names[i]][:20]
    pixels = [[np.asarray(data[i]["image"], float) for i in pair] for pair in pairs]
    assert right.source_rms == pytest.approx(np.mean([np.sqrt(((a - b) ** 2).mean()) / 255 for a, b in pixels]))


@pytest.mark.parametrize("styles", [("noto", "noto"), ("noto", "manga")])
def test_translation_needs_two_styles(bank, styles):
    with pytest.raises(ValueError, match="expected two of noto, noto-v1, fluent"):
        measure_translation(lambda pictures: pictures, bank, *styles)
