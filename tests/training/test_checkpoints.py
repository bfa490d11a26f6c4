"""A checkpoint is there completely or not at all."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from conftest import seeded
from safetensors import SafetensorError
from safetensors.torch import save_file

from atlas_diffusers.training import checkpoints, latest_checkpoint, load_checkpoint, save_checkpoint

SHARD = "shard-00001-model-00001-of-00001.safetensors"
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int64)


def tensors(seed=0):
    values = {str(dtype): torch.randn(3, 4, 3, 3, generator=seeded(seed)).mul(100).to(dtype) for dtype in DTYPES}
    values["channels_last"] = values["torch.float32"].mul(0.1).to(memory_format=torch.channels_last)
    return values | {"scalar": torch.tensor(3.0), "special": torch.tensor([float("inf"), -0.0, 1e-45])}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_roundtrip_is_bit_equal(tmp_path):
    path = save_checkpoint(tmp_path, 7, tensors(), {"rate": 0.1 + 0.2, "names": ["a"]}, keep=2)
    found, state = load_checkpoint(path)
    assert path == latest_checkpoint(tmp_path) == tmp_path / "checkpoint-7"
    assert state == {"rate": 0.1 + 0.2, "names": ["a"], "step": 7}
    assert found.keys() == tensors().keys()
    for name, expected in tensors().items():
        assert found[name].dtype == expected.dtype and torch.equal(found[name], expected)
    assert torch.signbit(found["special"][1])


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_pruning_keeps_the_newest_by_number(tmp_path, keep):
    steps = [8, 9, 10, 100]
    for step in steps:
        save_checkpoint(tmp_path, step, tensors(step), {}, keep)
    assert [path.name for path in checkpoints.checkpoints(tmp_path)] == [f"checkpoint-{s}" for s in steps[-keep:]]
    assert torch.equal(load_checkpoint(latest_checkpoint(tmp_path))[0]["channels_last"], tensors(100)["channels_last"])


def test_no_checkpoint(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "nowhere") is None


def test_saving_the_same_step_again_replaces_it(tmp_path):
    save_checkpoint(tmp_path, 4, tensors(0), {"run": 0}, keep=2)
    save_checkpoint(tmp_path, 4, tensors(1), {"run": 1}, keep=2)
    found, state = load_checkpoint(latest_checkpoint(tmp_path))
    assert state["run"] == 1 and torch.equal(found["channels_last"], tensors(1)["channels_last"])
    assert names(tmp_path) == ["checkpoint-4"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("I/O: No space left on device")])
def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path, monkeypatch, error):
    def fill_the_disk(writer, plan, planner):
        (Path(writer.path) / SHARD).write_bytes(b"half a file")
        raise error

    save_checkpoint(tmp_path, 4, tensors(), {}, keep=1)
    monkeypatch.setattr(checkpoints.dcp.HuggingFaceStorageWriter, "write_data", fill_the_disk)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tmp_path, 8, tensors(1), {}, keep=1)
    monkeypatch.undo()
    assert latest_checkpoint(tmp_path).name == "checkpoint-4"
    assert torch.equal(load_checkpoint(latest_checkpoint(tmp_path))[0]["channels_last"], tensors()["channels_last"])
    save_checkpoint(tmp_path, 8, tensors(1), {}, keep=1)
    assert names(tmp_path) == ["checkpoint-8"]


def test_a_kill_before_the_rename_leaves_the_earlier_checkpoint(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 4, tensors(), {}, keep=1)

    def killed(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints.os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, 8, tensors(1), {}, keep=1)
    assert latest_checkpoint(tmp_path).name == "checkpoint-4"


def test_a_leftover_partial_folder_is_ignored_and_overwritten(tmp_path):
    partial = tmp_path / ".checkpoint-8.partial"
    partial.mkdir()
    (partial / SHARD).write_bytes(b"half")
    (partial / "stray").write_bytes(b"left behind")
    assert latest_checkpoint(tmp_path) is None
    path = save_checkpoint(tmp_path, 8, tensors(), {}, keep=1)
    assert names(tmp_path) == ["checkpoint-8"] and names(path) == ["hashes.json", SHARD, "state.json"]
    assert load_checkpoint(path)[1] == {"step": 8}


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("file", [SHARD, "state.json"])
@pytest.mark.parametrize("damage", [truncate, lambda path: path.unlink(), lambda path: path.write_bytes(b"")])
def test_a_damaged_checkpoint_is_named(tmp_path, file, damage):
    path = save_checkpoint(tmp_path, 4, tensors(), {"rate": 1.0}, keep=1)
    damage(path / file)
    with pytest.raises(OSError, match="checkpoint-4"):
        load_checkpoint(path)


def test_files_are_safetensors_and_json(tmp_path):
    path = save_checkpoint(tmp_path, 4, tensors(), {"rate": 1.0}, keep=1)
    assert json.loads((path / "state.json").read_text()) == {"rate": 1.0, "step": 4}
    header = (path / SHARD).read_bytes()
    assert json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])["scalar"]["dtype"] == "F32"


@pytest.mark.parametrize("file", [SHARD, "state.json", "hashes.json"])
def test_one_flipped_bit_is_noticed_wherever_it_is(tmp_path, file):
    path = save_checkpoint(tmp_path, 4, tensors(), {"rate": 1.0}, keep=1)
    good = (path / file).read_bytes()
    for place in range(0, len(good), max(1, len(good) // 40)):
        (path / file).write_bytes(good[:place] + bytes([good[place] ^ 4]) + good[place + 1 :])
        with pytest.raises(OSError, match=rf"checkpoint-4 is damaged: .*{'.' if file == 'hashes.json' else file}"):
            load_checkpoint(path)
    (path / file).write_bytes(good)
    assert load_checkpoint(path)[1]["rate"] == 1.0


@pytest.mark.parametrize("file", [SHARD, "state.json"])
@pytest.mark.parametrize("damage", [truncate, lambda path: path.unlink(), lambda path: path.write_bytes(b"")])
def test_damage_is_named_without_hashes_too(tmp_path, file, damage):
    path = save_checkpoint(tmp_path, 4, tensors(), {"lr_step": 3, "without_moments": [], "origin": None}, keep=1)
    (path / "hashes.json").unlink()
    assert load_checkpoint(path)[1]["lr_step"] == 3
    damage(path / file)
    with pytest.raises(OSError, match="checkpoint-4 is damaged"):
        load_checkpoint(path)


def test_a_mistake_in_the_tensors_is_no_full_disk(tmp_path):
    with pytest.raises(checkpoints.CheckpointException, match="complex"):
        save_checkpoint(tmp_path, 4, {"complex": torch.ones(3, dtype=torch.complex128)}, {}, keep=1)
    assert latest_checkpoint(tmp_path) is None


def test_a_checkpoint_of_one_file_from_before_still_loads(tmp_path):
    path = tmp_path / "checkpoint-4"
    path.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors().items()}, path / "state.safetensors")
    (path / "state.json").write_text(json.dumps({"rate": 1.0, "step": 4}))
    names = ("state.safetensors", "state.json")
    hashes = {name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in names}
    (path / "hashes.json").write_text(json.dumps(hashes))
    found, state = load_checkpoint(path)
    assert state == {"rate": 1.0, "step": 4}
    assert found.keys() == tensors().keys() and all(torch.equal(found[name], tensors()[name]) for name in found)


@pytest.mark.parametrize("file", [SHARD, "state.json"])
def test_newest_complete_passes_over_what_is_damaged(tmp_path, file, monkeypatch):
    told = []
    monkeypatch.setattr(checkpoints.logger, "warning", told.append)
    for step in (4, 8, 12):
        save_checkpoint(tmp_path, step, tensors(step), {}, keep=3)
    (tmp_path / "checkpoint-12" / file).unlink()
    truncate(tmp_path / "checkpoint-8" / file)
    assert checkpoints.newest_complete(tmp_path) == tmp_path / "checkpoint-4"
    assert len(told) == 2 and "checkpoint-12 is damaged" in told[0] and file in told[0] and "checkpoint-8" in told[1]


def test_a_kill_while_an_old_checkpoint_is_removed_leaves_no_part_of_it(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 4, tensors(), {}, keep=1)
    remove = checkpoints.shutil.rmtree

    def killed(path, *rest, **options):
        if path.name == ".checkpoint-4.removed.partial":
            (path / SHARD).unlink()
            raise KeyboardInterrupt
        remove(path, *rest, **options)

    monkeypatch.setattr(checkpoints.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, 8, tensors(1), {}, keep=1)
    monkeypatch.undo()
    assert [path.name for path in checkpoints.checkpoints(tmp_path)] == ["checkpoint-8"]
    save_checkpoint(tmp_path, 12, tensors(2), {}, keep=1)
    assert names(tmp_path) == ["checkpoint-12"]


def test_folders_of_other_names_are_left_alone(tmp_path):
    for name in ("checkpoint-best", "checkpoint-4-old", "checkpoint-"):
        (tmp_path / name).mkdir()
    for step in (4, 8):
        save_checkpoint(tmp_path, step, tensors(), {}, keep=1)
    assert latest_checkpoint(tmp_path).name == "checkpoint-8"
    assert names(tmp_path) == ["checkpoint-", "checkpoint-4-old", "checkpoint-8", "checkpoint-best"]
