"""Pictures, captions and the order in which training sees them."""

import io
import itertools
import json
import random

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PIL

from atlas_diffusers.config import DatasetConfig
from atlas_diffusers.training import PictureDataset, StepSampler, load_training_data


def noise_picture(width, height, mode="RGB", seed=0):
    shape = (height, width, len(mode))
    return PIL.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def dataset_of(images, texts=None, aliases=None, **options):
    rows = {"image": [png(image) for image in images], "text": texts or [f"picture {i}" for i in range(len(images))]}
    features = {"image": Image(decode=False), "text": Value("string")}
    if aliases is not None:
        rows["aliases"], features["aliases"] = aliases, List(Value("string"))
        options["aliases_column"] = "aliases"
    data = Dataset.from_dict(rows, features=Features(features))
    return PictureDataset(data, DatasetConfig(**{"resolution": 8, **options}))


def to_pixels(image):
    return torch.from_numpy(np.asarray(image.convert("RGB")).astype(np.float32) / 127.5 - 1).permute(2, 0, 1)


def take(sampler, count):
    return list(itertools.islice(iter(sampler), count))


@pytest.mark.parametrize("length, batch_size", [(10, 5), (10, 4), (3, 8), (1, 3)])
def test_every_pass_is_its_own_permutation(length, batch_size):
    batches = take(StepSampler(length, batch_size, seed=0), 6 * length)
    assert {len(batch) for batch in batches} == {batch_size}
    indices = [index for batch in batches for index, _ in batch]
    passes = [tuple(indices[i : i + length]) for i in range(0, len(indices) - length + 1, length)]
    assert all(sorted(one) == list(range(length)) for one in passes)
    assert length == 1 or len(set(passes)) > 1


def test_every_place_has_its_own_draw():
    draws = [draw for batch in take(StepSampler(7, 4, seed=3), 50) for _, draw in batch]
    assert len(set(draws)) == 200
    other = {draw for batch in take(StepSampler(7, 4, seed=4), 50) for _, draw in batch}
    assert not other & set(draws)


@settings(max_examples=60, deadline=None, database=None)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 2**31), st.integers(0, 30))
def test_start_continues_the_sequence(length, batch_size, seed, start):
    whole = take(StepSampler(length, batch_size, seed), start + 5)
    assert take(StepSampler(length, batch_size, seed, start=start), 5) == whole[start:]


@settings(max_examples=30, deadline=None, database=None)
@given(st.integers(1, 20), st.integers(1, 4), st.integers(1, 4), st.integers(0, 1000))
def test_micro_batches_laid_end_to_end_are_the_large_batches(length, micro, accumulation, seed):
    large = take(StepSampler(length, micro * accumulation, seed), 4)
    small = take(StepSampler(length, micro, seed), 4 * accumulation)
    assert sum(large, []) == sum(small, [])


def test_seeds_give_different_orders():
    assert take(StepSampler(50, 10, seed=0), 5) != take(StepSampler(50, 10, seed=1), 5)


def test_an_item_depends_only_on_index_and_draw():
    def build():
        images = [noise_picture(8, 8, seed=i) for i in range(4)]
        return dataset_of(images, aliases=[[f"a{i}", f"b{i}"] for i in range(4)], random_flip=True, alias_probability=0.5)

    first, second = build(), build()
    items = [(i, draw) for i in range(4) for draw in range(8)]
    expected = [first[item] for item in items]
    random.Random(0).shuffle(order := list(range(len(items))))
    for k in order:
        found = second[items[k]]
        assert torch.equal(found["pixels"], expected[k]["pixels"]) and found["text"] == expected[k]["text"]


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_an_alias_replaces_the_caption_as_often_as_asked(probability):
    data = dataset_of([noise_picture(8, 8)], ["caption"], [["a", "b"]], alias_probability=probability)
    counts = {text: 0 for text in ("caption", "a", "b")}
    for draw in range(1500):
        counts[data[0, draw]["text"]] += 1
    for text, p in (("caption", 1 - probability), ("a", probability / 2), ("b", probability / 2)):
        assert abs(counts[text] / 1500 - p) <= 5 * (p * (1 - p) / 1500) ** 0.5


def test_a_picture_without_aliases_keeps_its_caption():
    data = dataset_of([noise_picture(8, 8)], ["caption"], [[]], alias_probability=1.0)
    assert data[0, 0]["text"] == "caption"


def test_captions_are_texts_and_aliases():
    data = dataset_of([noise_picture(8, 8)] * 2, ["one", "two"], [["uno", "eins"], []])
    assert sorted(data.captions()) == ["eins", "one", "two", "uno"]
    assert dataset_of([noise_picture(8, 8)], caption_column=None).captions() == []


def test_flip_mirrors_half_of_the_draws():
    image = noise_picture(8, 8)
    data = dataset_of([image], random_flip=True)
    straight, mirrored = to_pixels(image), to_pixels(image.transpose(PIL.Transpose.FLIP_LEFT_RIGHT))
    flips = 0
    for draw in range(600):
        pixels = data[0, draw]["pixels"]
        assert torch.equal(pixels, straight) or torch.equal(pixels, mirrored)
        flips += torch.equal(pixels, mirrored)
    assert abs(flips - 300) < 5 * 150**0.5
    unflipped = dataset_of([image])
    assert all(torch.equal(unflipped[0, draw]["pixels"], straight) for draw in range(20))


def test_pixel_values_run_from_minus_one_to_one():
    ramp = PIL.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))
    pixels = dataset_of([ramp])[0, 0]["pixels"]
    expected = np.arange(192).reshape(8, 8, 3).transpose(2, 0, 1) / 127.5 - 1
    np.testing.assert_allclose(pixels.numpy(), expected, atol=1e-6)
    for value, expected in ((0, -1.0), (255, 1.0)):
        assert dataset_of([PIL.new("RGB", (8, 8), (value,) * 3)])[0, 0]["pixels"].unique().tolist() == [expected]


def test_transparent_pictures_are_laid_on_white():
    image = noise_picture(8, 8, "RGBA")
    rgba = np.asarray(image).astype(float)
    alpha = rgba[..., 3:] / 255
    expected = (rgba[..., :3] * alpha + 255 * (1 - alpha)).transpose(2, 0, 1)
    found = (dataset_of([image])[0, 0]["pixels"] + 1) * 127.5
    assert np.abs(found.numpy() - expected).max() < 1.0
    assert dataset_of([PIL.new("RGBA", (8, 8), (255, 0, 0, 0))])[0, 0]["pixels"].unique().tolist() == [1.0]


@pytest.mark.parametrize("mode", ["L", "P", "1", "LA", "CMYK"])
def test_every_mode_becomes_rgb(mode):
    image = noise_picture(8, 8).convert(mode)
    source = io.BytesIO()
    image.save(source, "TIFF" if mode == "CMYK" else "PNG")
    data = Dataset.from_dict(
        {"image": [{"bytes": source.getvalue(), "path": None}], "text": [""]},
        features=Features({"image": Image(decode=False), "text": Value("string")}),
    )
    pixels = PictureDataset(data, DatasetConfig(resolution=8))[0, 0]["pixels"]
    torch.testing.assert_close(pixels, to_pixels(image), rtol=0, atol=1e-6)


def test_a_turned_photograph_is_set_upright():
    image = noise_picture(8, 8)
    exif = image.getexif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    image.save(buffer, "PNG", exif=exif)
    data = dataset_of([image])
    rows = {**data.data.to_dict(), "image": [{"bytes": buffer.getvalue(), "path": None}]}
    data.data = Dataset.from_dict(rows, features=data.data.features)
    assert torch.equal(data[0, 0]["pixels"], to_pixels(image.transpose(PIL.Transpose.ROTATE_270)))


def test_sixteen_bit_greys_keep_their_tones():
    grey = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1040
    pixels = dataset_of([PIL.fromarray(grey)])[0, 0]["pixels"]
    expected = np.broadcast_to(grey / 32767.5 - 1, (3, 8, 8))
    np.testing.assert_allclose(pixels.numpy(), expected, atol=0.51 / 127.5)


@pytest.mark.parametrize("width, height", [(31, 20), (20, 31), (16, 16), (5, 9), (9, 5)])
@pytest.mark.parametrize("center_crop", [True, False])
def test_resize_crops_the_centre_or_squeezes(width, height, center_crop):
    image = noise_picture(width, height)
    pixels = dataset_of([image], center_crop=center_crop)[0, 0]["pixels"]
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    square = np.asarray(image)[top : top + side, left : left + side] if center_crop else np.asarray(image)
    assert torch.equal(pixels, to_pixels(PIL.fromarray(square).resize((8, 8), PIL.Resampling.LANCZOS)))


def write_imagefolder(folder, captions):
    folder.mkdir(parents=True)
    with open(folder / "metadata.jsonl", "w") as file:
        for i, text in enumerate(captions):
            noise_picture(8, 8, seed=i).save(folder / f"{i}.png")
            file.write(json.dumps({"file_name": f"{i}.png", "text": text}) + "\n")


@pytest.fixture
def offline_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def test_imagefolder_with_captions(tmp_path, offline_cache):
    write_imagefolder(tmp_path / "pictures", ["zero", "one", "two"])
    config = DatasetConfig(name="imagefolder", root=str(tmp_path / "pictures"), resolution=8)
    data = PictureDataset(load_training_data(config), config)
    assert len(data) == 3
    for i in range(3):
        item = data[i, 0]
        number = ["zero", "one", "two"].index(item["text"])
        assert torch.equal(item["pixels"], to_pixels(noise_picture(8, 8, seed=number)))


def test_a_file_that_is_no_picture_is_named(tmp_path, offline_cache):
    write_imagefolder(tmp_path / "pictures", ["zero", "one"])
    (tmp_path / "pictures" / "1.png").write_bytes(b"not a picture")
    config = DatasetConfig(name="imagefolder", root=str(tmp_path / "pictures"), resolution=8)
    data = PictureDataset(load_training_data(config), config)
    broken = list(data.data["text"]).index("one")
    with pytest.raises(OSError, match=r"1\.png.*cannot be read"):
        data[broken, 0]
    assert data[1 - broken, 0]["text"] == "zero"


def test_a_truncated_embedded_picture_is_numbered():
    data = dataset_of([noise_picture(8, 8)] * 2)
    table = data.data.to_dict()
    table["image"][1]["bytes"] = table["image"][1]["bytes"][:60]
    data.data = Dataset.from_dict(table, features=data.data.features)
    with pytest.raises(OSError, match="number 1 cannot be read"):
        data[1, 0]


def test_a_parquet_file(tmp_path, offline_cache):
    source = dataset_of([noise_picture(8, 8, seed=i) for i in range(2)], ["zero", "one"])
    source.data.to_parquet(tmp_path / "pictures.parquet")
    config = DatasetConfig(name=str(tmp_path / "pictures.parquet"), resolution=8)
    data = PictureDataset(load_training_data(config), config)
    for i, text in enumerate(["zero", "one"]):
        assert data[i, 0]["text"] == text and torch.equal(data[i, 0]["pixels"], source[i, 0]["pixels"])


@pytest.mark.parametrize("column", ["image_column", "caption_column", "aliases_column"])
def test_an_unknown_column_is_reported_with_the_known_ones(column):
    config = DatasetConfig(categories=["Activities"], **{column: "nowhere"})
    with pytest.raises(ValueError, match=r"no column 'nowhere'.*'image', 'text', 'aliases', 'category'"):
        load_training_data(config)


@pytest.mark.parametrize("options", [{"name": "imagefolder"}, {"name": "disk"}, {"root": "pictures", "name": "embedded:emoji"}])
def test_a_root_belongs_to_a_folder(options):
    with pytest.raises(ValueError, match="imagefolder and disk need a root, embedded data take none"):
        DatasetConfig(**options)


def load(tmp_path, **options):
    config = DatasetConfig(**{"name": "imagefolder", "root": str(tmp_path / "pictures"), "resolution": 8, **options})
    return PictureDataset(load_training_data(config), config)


def test_bad_pictures_are_skipped_where_asked(tmp_path, offline_cache):
    write_imagefolder(tmp_path / "pictures", ["zero", "one", "two"])
    plain = load(tmp_path)
    names = list(plain.data["text"])
    (tmp_path / "pictures" / f"{['zero', 'one', 'two'].index(names[1])}.png").write_bytes(b"not a picture")
    data = load(tmp_path, skip_bad_images=True)
    assert [(data[i, 0]["text"], data[i, 0]["skipped"]) for i in range(3)] == [(names[0], 0), (names[2], 1), (names[2], 0)]
    assert torch.equal(data[1, 0]["pixels"], data[2, 0]["pixels"])
    for file in (tmp_path / "pictures").glob("*.png"):
        file.write_bytes(b"not a picture")
    with pytest.raises(OSError, match="none of its 3 pictures can be read"):
        data[0, 0]


@pytest.mark.parametrize("damage", ["chunk", "missing"])
def test_every_kind_of_damage_is_named(damage):
    data = dataset_of([noise_picture(8, 8)] * 2, skip_bad_images=True)
    table = data.data.to_dict()
    content = bytearray(table["image"][1]["bytes"])
    content[41:45] = b"\x00\x01\x02\x03"
    table["image"][1] = {"bytes": bytes(content), "path": None} if damage == "chunk" else None
    data.data = Dataset.from_dict(table, features=data.data.features)
    assert data[1, 0]["skipped"] == 1
    plain = PictureDataset(data.data, DatasetConfig(resolution=8))
    with pytest.raises(OSError, match="picture number 1 cannot be read"):
        plain[1, 0]


def test_splits_that_are_not_there(tmp_path):
    source = dataset_of([noise_picture(8, 8, seed=i) for i in range(4)])
    source.data.save_to_disk(tmp_path / "pictures")
    with pytest.raises(ValueError, match=r"has no split 'test'; allowed are \['train'\]"):
        load(tmp_path, name="disk", split="test")
    source.data.to_parquet(tmp_path / "pictures.parquet")
    part = load_training_data(DatasetConfig(name=str(tmp_path / "pictures.parquet"), split="train[50%:]"))
    assert len(part) == 2


def test_a_picture_without_a_caption_is_named(tmp_path, offline_cache):
    write_imagefolder(tmp_path / "pictures", ["zero", None])
    data = load(tmp_path)
    missing = list(data.data["text"]).index(None)
    with pytest.raises(ValueError, match=r"1\.png has no caption in column 'text' \(found None\)"):
        data[missing, 0]
    with pytest.raises(ValueError, match=rf"row {missing} has no caption in \['text'\], but None"):
        data.captions()


def test_an_empty_folder_is_named(tmp_path, offline_cache):
    (tmp_path / "pictures").mkdir()
    with pytest.raises(OSError, match="pictures doesn't contain any data files"):
        load(tmp_path)
    (tmp_path / "pictures" / "readme.txt").write_text("no picture")
    with pytest.raises(ValueError, match="dataset.root=.*pictures' has no pictures in split 'train'"):
        load(tmp_path)
    with pytest.raises(OSError, match="nowhere"):
        load(tmp_path, root=str(tmp_path / "nowhere"))


@pytest.mark.parametrize("split", [False, True])
def test_a_dataset_saved_to_disk(tmp_path, split):
    from datasets import DatasetDict

    source = dataset_of([noise_picture(8, 8, seed=i) for i in range(3)], ["zero", "one", "two"])
    (DatasetDict({"train": source.data}) if split else source.data).save_to_disk(tmp_path / "pictures")
    for streaming in (False, True):
        data = load(tmp_path, name="disk", streaming=streaming)
        rows = list(data.data) if streaming else range(3)
        for i, place in enumerate(rows):
            found, expected = data[place, 5], source[i, 5]
            assert torch.equal(found["pixels"], expected["pixels"]) and found["text"] == expected["text"]


def test_a_folder_can_be_streamed(tmp_path, offline_cache):
    write_imagefolder(tmp_path / "pictures", ["zero", "one", "two"])
    whole, stream = load(tmp_path), load(tmp_path, streaming=True)
    expected = {whole[i, 0]["text"]: whole[i, 0]["pixels"] for i in range(3)}
    rows = list(stream.data)
    assert len(rows) == 3
    for row in rows:
        assert torch.equal(stream[row, 0]["pixels"], expected[stream[row, 0]["text"]])


def test_the_digits_are_those_of_scikit_learn():
    from sklearn.datasets import load_digits

    expected = load_digits()
    config = DatasetConfig(name="embedded:digits", split="all", channels=1, resolution=8, label_column="label")
    data = PictureDataset(load_training_data(config), config)
    assert len(data) == len(expected.target) == 1797
    for i in range(0, 1797, 7):
        item = data[i, 0]
        assert item["label"] == expected.target[i] and item["text"] == WORDS[expected.target[i]]
        assert (item["pixels"][0] - torch.from_numpy(expected.images[i]) / 8 + 1).abs().max() <= 1.01 / 255
    sizes = {split: len(load_training_data(config.model_copy(update={"split": split}))) for split in ("train", "test")}
    assert sizes == {"train": 1617, "test": 180}
    with pytest.raises(ValueError, match="split='dev'"):
        load_training_data(config.model_copy(update={"split": "dev"}))


WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def test_grey_pictures_have_one_channel():
    image = noise_picture(8, 8)
    pixels = dataset_of([image], channels=1)[0, 0]["pixels"]
    expected = torch.from_numpy(np.asarray(image.convert("L")).astype(np.float32) / 127.5 - 1)[None]
    assert torch.equal(pixels, expected)


def test_a_hub_id_that_may_not_be_fetched(offline_cache):
    with pytest.raises(OSError, match="nobody/nothing"):
        load_training_data(DatasetConfig(name="nobody/nothing", download=False))
