"""Aspect-ratio buckets: sizes, batches of one size, every picture equally often, and resuming."""

import itertools
import json
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_trainer import assert_same_checkpoints, build, interrupt_at

from atlas_diffusers.config import DatasetConfig
from atlas_diffusers.training import PictureDataset, StepSampler, load_training_data
from atlas_diffusers.training.buckets import BucketSampler, bucket_sizes, nearest_size

FOLDER = {"name": "folder", "categories": None, "aliases_column": None, "aspect_buckets": True, "random_flip": False}


@settings(max_examples=60, deadline=None, database=None)
@given(st.integers(1, 8), st.integers(1, 40))
def test_sizes_have_about_equal_area(multiple, times):
    resolution = multiple * times
    sizes = bucket_sizes(resolution, multiple)
    assert (resolution, resolution) in sizes and sorted(sizes) == sorted((w, h) for h, w in sizes)
    for height, width in sizes:
        assert height % multiple == width % multiple == 0 and 0.5 <= height / width <= 2
        assert height * width <= resolution**2
        assert (height + multiple) * width > resolution**2 or (width + multiple) * height > resolution**2


@pytest.mark.parametrize(
    "width, height, size", [(100, 100, (64, 64)), (160, 100, (48, 80)), (100, 160, (80, 48)), (900, 100, (40, 80))]
)
def test_a_picture_gets_the_nearest_shape(width, height, size):
    sizes = [(64, 64), (48, 80), (80, 48), (40, 80)]
    assert nearest_size(width, height, sizes) == size
    ratios = [abs(np.log(h / w * width / height)) for h, w in sizes]
    assert ratios[sizes.index(size)] == min(ratios)


BUCKETS = [list(range(0, 5)), list(range(5, 25)), list(range(25, 64))]


@settings(max_examples=30, deadline=None, database=None)
@given(st.integers(0, 2**31), st.integers(0, 200), st.sampled_from([1, 2, 4]))
def test_batches_are_of_one_bucket_and_start_anywhere(seed, start, world):
    whole = list(itertools.islice(BucketSampler(BUCKETS, 4, seed), start + 6))[start:]
    ranks = [list(itertools.islice(BucketSampler(BUCKETS, 4, seed, start, rank, world), 6)) for rank in range(world)]
    assert [sum(parts, []) for parts in zip(*ranks)] == whole
    for batch in whole:
        assert len({next(i for i, bucket in enumerate(BUCKETS) if index in bucket) for index, _ in batch}) == 1
    draws = [draw for batch in whole for _, draw in batch]
    assert draws == list(range(draws[0], draws[0] + 24))


def test_every_picture_is_seen_equally_often():
    batches = list(itertools.islice(BucketSampler(BUCKETS, 4, seed=3), 64 * 50 // 4))
    seen = Counter(index for batch in batches for index, _ in batch)
    assert set(seen) == set(range(64)) and all(abs(number - 50) <= 8 for number in seen.values())
    one = list(itertools.islice(BucketSampler([list(range(10))], 4, seed=0), 5))
    assert sorted(index for index, _ in sum(one, [])) == sorted([*range(10)] * 2), "passes end before others begin"
    assert len(one) == len(list(itertools.islice(StepSampler(10, 4, seed=0), 5)))


@pytest.fixture
def shapes(tmp_path):
    """Wide, tall and square pictures whose left half is black and whose right half is white; one lies on its side by EXIF."""
    folder, rows = tmp_path / "shapes", []
    folder.mkdir()
    for i, (width, height) in enumerate([(80, 48), (96, 56), (40, 40), (48, 48), (30, 60), (48, 80)]):
        image = Image.new("RGB", (width, height), "black")
        image.paste("white", (width // 2, 0, width, height))
        exif = image.getexif()
        if i == 5:
            image = image.transpose(Image.Transpose.ROTATE_90)
            exif[0x0112] = 6
        image.save(folder / f"{i}.png", exif=exif)
        rows.append(json.dumps({"file_name": f"{i}.png", "text": f"shape {i}"}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(rows))
    return folder


def test_pictures_keep_their_shape(shapes):
    config = DatasetConfig(root=str(shapes), resolution=32, aspect_buckets=True)
    pictures = PictureDataset(load_training_data(config), config)
    buckets = pictures.choose_sizes(8)
    assert sorted(sum(buckets, [])) == list(range(6))
    assert pictures.sizes == [(24, 40), (24, 40), (32, 32), (32, 32), (40, 24), (40, 24)]
    for place in range(6):
        pixels = pictures[place, 0]["pixels"]
        assert pixels.shape[1:] == pictures.sizes[place]
        columns = pixels.mean((0, 1))
        third = len(columns) // 3
        assert (columns[:third] < -0.95).all() and (columns[-third:] > 0.95).all(), "the centre is cropped, upright"


def test_buckets_train_and_resume_exactly(shapes, tmp_path, monkeypatch):
    changes = {"dataset": {**FOLDER, "root": str(shapes)}, "max_steps": 4, "checkpoint_interval": 1, "batch_size": 2}
    run = build(tmp_path / "whole", **changes)
    sizes = []
    unet = run.wrapped["unet"]
    monkeypatch.setitem(run.wrapped, "unet", lambda sample, *a, **k: (sizes.append(sample.shape[2:]), unet(sample, *a, **k))[1])
    run.train()
    assert len(set(sizes)) > 1 and "24x40 (2), 32x32 (2), 40x24 (2)" in run.summary()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, 3)
        build(tmp_path / "parts", **changes).train()
    build(tmp_path / "parts", **changes).train()
    assert_same_checkpoints(tmp_path / "parts", tmp_path / "whole")


def test_transparent_pictures_may_lie_on_another_colour(tmp_path):
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "a.png")
    config = DatasetConfig(root=str(tmp_path), resolution=8, background="#0000ff")
    pixels = PictureDataset(load_training_data(config), config)[0, 0]["pixels"]
    assert torch.equal(pixels[:, 0, 0], torch.tensor([-1.0, -1.0, 1.0]))
    with pytest.raises(ValueError, match="unknown color specifier: 'blu'"):
        PictureDataset(load_training_data(config), config.model_copy(update={"background": "blu"}))


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_of_an_animation_the_first_frame_counts(tmp_path, suffix):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:])
    config = DatasetConfig(root=str(tmp_path), resolution=8)
    pixels = PictureDataset(load_training_data(config), config)[0, 0]["pixels"]
    torch.testing.assert_close(pixels[:, 4, 4], torch.tensor([1.0, -1.0, -1.0]), atol=0.05, rtol=0)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"dataset": {**FOLDER, "streaming": True}}, "aspect_buckets needs pictures of known sizes"),
        ({"dataset": {**FOLDER, "center_crop": False}}, "aspect_buckets needs pictures of known sizes"),
        ({"dataset": FOLDER, "cache_latents": True}, "aspect_buckets cannot be used with cache_latents"),
        ({"eval_dataset": {"aspect_buckets": True}}, "an evaluation compares pictures of one size"),
    ],
)
def test_what_buckets_cannot_be_used_with(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        build(tmp_path, **changes)
