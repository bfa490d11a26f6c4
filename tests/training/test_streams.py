"""Streams: every process sees its part, each pass another order, and a run that resumes sees what it would have seen."""

import io
import itertools
import json

import httpx
import pyarrow
import pytest
from datasets import Dataset, Features, Image, IterableDataset, Value
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PIL
from test_trainer import assert_same_checkpoints, build, interrupt_at

from atlas_diffusers.config import DatasetConfig
from atlas_diffusers.training import (
    PictureDataset,
    StreamSampler,
    load_checkpoint,
    load_training_data,
    save_checkpoint,
    trainer,
)

FEATURES = Features({"image": Image(decode=False), "text": Value("string")})


def png(value):
    buffer = io.BytesIO()
    PIL.new("RGB", (4, 4), (value % 256,) * 3).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def stream(length, shards=3):
    rows = {"image": [png(i) for i in range(length)], "text": [str(i) for i in range(length)]}
    return Dataset.from_dict(rows, features=FEATURES).to_iterable_dataset(num_shards=min(shards, length))


def config(**options):
    return DatasetConfig(streaming=True, resolution=4, **options)


def take(sampler, count):
    return [[(row["text"], draw) for row, draw in batch] for batch in itertools.islice(iter(sampler), count)]


@pytest.mark.parametrize("length, buffer", [(10, 4), (10, 100), (7, 3)])
def test_every_pass_has_every_row_once_in_another_order(length, buffer):
    sampler = StreamSampler(stream(length), config(shuffle_buffer=buffer), batch_size=1, seed=0)
    rows = [int(batch[0][0]) for batch in take(sampler, 4 * length)]
    passes = [tuple(rows[i : i + length]) for i in range(0, len(rows), length)]
    assert all(sorted(one) == list(range(length)) for one in passes)
    assert len(set(passes)) > 1


def test_rows_are_shuffled_within_blocks():
    sampler = StreamSampler(stream(12, shards=1), config(shuffle_buffer=4), batch_size=4, seed=1)
    blocks = [sorted(int(text) for text, _ in batch) for batch in take(sampler, 3)]
    assert blocks == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


@settings(max_examples=40, deadline=None, database=None)
@given(st.integers(1, 17), st.integers(1, 3), st.integers(1, 9), st.integers(0, 1000), st.integers(0, 14), st.integers(0, 3))
def test_a_state_continues_the_sequence(length, batch_size, buffer, seed, start, ahead):
    """Whatever the sampler has read ahead of the batch that was used last."""
    options = config(shuffle_buffer=buffer), batch_size, seed
    first = StreamSampler(stream(length), *options)
    whole = take(first, start + 6)
    again = StreamSampler(stream(length), *options)
    take(again, start + ahead)
    state = json.loads(json.dumps(again.state(start)))
    assert state["place"] <= start * batch_size
    assert take(StreamSampler(stream(length), *options, start=start, state=state), 6) == whole[start:]


def test_processes_share_the_rows_and_no_draw():
    parts = [take(StreamSampler(stream(12), config(), 4, seed=0, rank=rank, world=2), 3) for rank in range(2)]
    rows = [{int(text) for batch in part for text, _ in batch} for part in parts]
    assert rows[0] | rows[1] == set(range(12)) and not rows[0] & rows[1]
    draws = [[draw for batch in part for _, draw in batch] for part in parts]
    assert [a + b for a, b in zip(*(zip(*[iter(d)] * 2) for d in draws))] == [tuple(range(i, i + 4)) for i in (0, 4, 8)]


def files_of(seed, rank=0, world=1, files=4, passes=2):
    """Of the four files of three rows, those that a process reads in each pass, in order."""
    sampler = StreamSampler(stream(12, files), config(shuffle_buffer=3), world, seed=seed, rank=rank, world=world)
    rows = [int(batch[0][0]) for batch in take(sampler, passes * 12 // world)]
    blocks = [{row // 3 for row in rows[i : i + 3]} for i in range(0, len(rows), 3)]
    assert all(len(block) == 1 for block in blocks), "a block is a file"
    numbers = [block.pop() for block in blocks]
    return [tuple(numbers[i : i + 4 // world]) for i in range(0, len(numbers), 4 // world)]


def test_files_come_in_an_order_of_the_seed_and_the_pass():
    orders = {seed: files_of(seed, passes=4) for seed in range(3)}
    assert orders[1] == files_of(1, passes=4)
    every = [order for of_seed in orders.values() for order in of_seed]
    assert all(sorted(order) == [0, 1, 2, 3] for order in every)
    assert all(len(set(of_seed)) > 1 for of_seed in orders.values()) and len({tuple(each) for each in orders.values()}) == 3


def test_files_are_dealt_to_processes_anew_in_each_pass():
    dealt = [files_of(0, rank, world=2, passes=6) for rank in range(2)]
    assert all(sorted(first + second) == [0, 1, 2, 3] for first, second in zip(*dealt))
    assert len({frozenset(files) for files in dealt[0]}) > 1


def with_bad_pictures(length, bad):
    rows = [{"bytes": b"nothing", "path": None} if i in bad else png(i) for i in range(length)]
    texts = [str(i) for i in range(length)]
    return Dataset.from_dict({"image": rows, "text": texts}, features=FEATURES).to_iterable_dataset(num_shards=2)


@pytest.mark.parametrize("start", [1, 4, 7, 11])
def test_bad_pictures_are_counted_once_whatever_a_resumed_run_reads_again(start):
    def sampler(rank=0, world=1, **place):
        options = config(shuffle_buffer=4, skip_bad_images=True), world, 3
        return StreamSampler(with_bad_pictures(12, {2, 5, 9}), *options, rank=rank, world=world, **place)

    whole, first = sampler(), sampler()
    rows = take(whole, 13)
    assert whole.skipped > 3, "nine rows a pass"
    take(first, start + 1)
    again = sampler(start=start, state=json.loads(json.dumps(first.state(start))))
    assert take(again, 13 - start) == rows[start:] and again.skipped == whole.skipped
    shares = [sampler(rank, world=2) for rank in range(2)]
    texts = {text for share in shares for batch in take(share, 4) for text, _ in batch}
    assert len(texts) == 8 and sum(share.skipped for share in shares) in (2, 3)


def test_a_run_counts_bad_pictures_of_its_stream_once(tmp_path, monkeypatch):
    bad = {"max_steps": 5, "checkpoint_interval": 1, "batch_size": 2, "log_interval": 1, "text_encoder": None,
           "dataset": {"streaming": True, "shuffle_buffer": 3, "skip_bad_images": True, "resolution": 4,
                       "aliases_column": None, "categories": None},
           "model": {"cross_attention_levels": [], "addition_embed_type": None, "patch_size": 1}}  # fmt: skip
    monkeypatch.setattr(trainer, "load_pictures", lambda config, dataset: PictureDataset(with_bad_pictures(8, {1, 6}), dataset))
    build(tmp_path / "whole", **bad).train()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, 4)
        build(tmp_path / "parts", **bad).train()
    build(tmp_path / "parts", **bad).train()
    found, expected = (
        [json.loads(line).get("skipped_images", 0) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("parts", "whole")
    )
    assert found == expected and expected[-1] >= 2


def test_an_empty_stream_is_refused():
    with pytest.raises(ValueError, match="finds no pictures in the stream"):
        take(StreamSampler(stream(1), config(), 2, seed=0, rank=1, world=2), 1)


def test_bad_pictures_of_a_stream_are_left_out_and_counted():
    rows = {"image": [png(i) if i != 2 else {"bytes": b"nothing", "path": None} for i in range(5)], "text": list("01234")}
    data = Dataset.from_dict(rows, features=FEATURES).to_iterable_dataset()
    sampler = StreamSampler(data, config(skip_bad_images=True), batch_size=4, seed=0)
    assert sorted(text for text, _ in take(sampler, 1)[0]) == list("0134") and sampler.skipped == 1
    plain = PictureDataset(data, config())
    with pytest.raises(OSError, match="picture of a stream cannot be read"):
        [plain[item] for item in next(iter(StreamSampler(data, config(), batch_size=5, seed=0)))]


def test_embedded_data_can_be_streamed():
    c = config(categories=["Activities"])
    data, whole = load_training_data(c), load_training_data(c.model_copy(update={"streaming": False}))
    assert [row["text"] for row in data] == list(whole["text"])
    items = PictureDataset(data, c)
    assert items.captions() == list(whole["text"])
    item = items[next(iter(data)), 7]
    assert item["text"] == whole[0]["text"] and item["pixels"].shape == (3, 4, 4)


STREAMED = {"max_steps": 6, "checkpoint_interval": 1, "dataset": {"streaming": True, "shuffle_buffer": 20, "random_flip": True}}


@pytest.mark.parametrize("workers, stop", [(0, 4), (2, 3)])
def test_a_streamed_run_resumes_exactly(tmp_path, monkeypatch, workers, stop):
    changes = STREAMED | {"dataset": STREAMED["dataset"] | {"num_workers": workers}}
    build(tmp_path / "whole", **changes).train()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, stop)
        build(tmp_path / "parts", **changes).train()
    resumed = build(tmp_path / "parts", **changes)
    assert resumed.step == stop - 1
    resumed.train()
    assert_same_checkpoints(tmp_path / "parts", tmp_path / "whole")


def test_a_stream_needs_a_number_of_steps(tmp_path):
    with pytest.raises(ValueError, match="with dataset.streaming give max_steps"):
        build(tmp_path, max_steps=None, epochs=1, dataset={"streaming": True})


def test_evaluation_needs_data_of_known_length(tmp_path):
    with pytest.raises(ValueError, match="needs an eval_dataset that is not one"):
        build(tmp_path, **STREAMED, eval_interval=2).train()


@pytest.mark.parametrize(
    "error",
    [OSError("Corrupt snappy compressed data"), pyarrow.ArrowNotImplementedError("no such encoding"), KeyError("image"),
     httpx.ReadTimeout("slow"), UnicodeDecodeError("utf-8", b"a", 0, 1, "invalid start byte")],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_a_stream_that_breaks_off_is_named_with_its_place(error):
    def rows():
        yield from stream(5)
        raise error

    data = IterableDataset.from_generator(rows, features=FEATURES)
    sampler = StreamSampler(data, config(shuffle_buffer=2), 1, seed=0)
    with pytest.raises(ValueError, match="dataset 'embedded:emoji' cannot be read after 5 rows .*"):
        take(sampler, 9)
    broken = PictureDataset(data, config())
    with pytest.raises(ValueError, match="cannot be read after 5 rows"):
        broken.captions()


def test_a_stream_is_not_split_anew(tmp_path):
    build(tmp_path, **STREAMED | {"max_steps": 1}).train()
    tensors, state = load_checkpoint(tmp_path / "checkpoint-1")
    save_checkpoint(tmp_path, 1, tensors, state | {"streams": state["streams"] * 2}, keep=1)
    with pytest.raises(ValueError, match="a stream split over 2 processes, this run 1"):
        build(tmp_path, **STREAMED)
    assert len(load_checkpoint(tmp_path / "checkpoint-1")[1]["streams"]) == 2
