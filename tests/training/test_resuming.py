"""Going on from a checkpoint: what changed takes effect and is said, or is refused; one run a folder; calm ends."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys

import psutil
import pytest
import torch
import yaml
from PIL import Image
from test_trainer import RECIPE, ROOT, build, final_state, recipe

from atlas_diffusers.config import DatasetConfig, TrainingConfig
from atlas_diffusers.training import (
    PictureDataset,
    Trainer,
    TrainingStopped,
    fingerprints,
    latest_checkpoint,
    load_training_data,
    resuming,
    trainer,
)
from atlas_diffusers.training.checkpoints import checkpoints
from atlas_diffusers.training.fingerprints import data_fingerprint
from atlas_diffusers.training.locking import RunLock
from atlas_diffusers.training.stopping import StopRequest


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A run of two steps, with a checkpoint after each."""
    run = build(tmp_path_factory.mktemp("begun"), max_steps=2, checkpoint_interval=1)
    run.train()
    return run.folder


def resume(begun, folder, **changes):
    shutil.copytree(begun, folder, dirs_exist_ok=True)
    return build(folder, **{"max_steps": 2, "checkpoint_interval": 1, **changes})


@pytest.fixture
def said(monkeypatch):
    texts = []
    monkeypatch.setattr(trainer.logger, "warning", texts.append)
    return texts


def test_a_changed_learning_rate_holds_from_the_checkpoint_on(begun, tmp_path, said):
    changes = {"lr_scheduler": "constant_with_warmup", "warmup_steps": 0, "max_steps": 3}
    run = resume(begun, tmp_path, learning_rate=1e-5, **changes)
    assert [group["lr"] for group in run.optimizer.param_groups] == [1e-5] and run.lr_scheduler.get_last_lr() == [1e-5]
    before = [p.detach().clone() for p in run.parameters]
    run.train()
    moved = max((p - q).abs().max().item() for p, q in zip(run.parameters, before))
    assert 0 < moved <= 1.01e-4, "AdamW moves no weight by more than its rate allows, a tenth of what 3e-3 would"
    assert "learning_rate 0.003 -> 1e-05" in said[0] and "lr_scheduler 'cosine' -> 'constant_with_warmup'" in said[0]
    row = json.loads((tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    assert (row["step"], row["lr"]) == (3, 1e-5)


def test_nothing_is_said_of_what_decides_nothing(begun, tmp_path, said):
    assert (
        resume(begun, tmp_path, log_interval=2, sample_interval=9, sample_prompts=["ball"], dataset={"num_workers": 1}).step
        == 2
    )
    assert said == []


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"seed": 1}, "seed 0 -> 1"),
        ({"scheduler": {**RECIPE["scheduler"], "prediction_type": "epsilon"}},
         "scheduler.prediction_type 'v_prediction' -> 'epsilon'"),
        ({"batch_size": 4}, "batch_size 8 -> 4"),
        ({"min_snr_gamma": None}, "loss_weighting.gamma 5.0 -> None"),
        ({"dataset": {"random_flip": False}}, "dataset.random_flip True -> False"),
        ({"dataset": {"categories": ["Symbols"]}}, "other pictures, captions or labels"),
        ({"model": {"dropout": 0.1}}, "model.dropout None -> 0.1"),
    ],
    ids=lambda value: None if isinstance(value, str) else next(iter(value)),
)  # fmt: skip
def test_what_would_make_another_run_is_refused_with_both_values(begun, tmp_path, changes, message):
    with pytest.raises(ValueError) as error:
        resume(begun, tmp_path, **changes)
    text = str(error.value)
    assert "checkpoint-2 does not fit this recipe: it was trained otherwise: " in text and message in text
    assert "another output_dir" in text


def test_a_run_does_not_end_before_its_checkpoint(begun, tmp_path):
    with pytest.raises(ValueError, match="max_steps=1, but .*checkpoint-2 is of a later step"):
        resume(begun, tmp_path, max_steps=1)


def test_changed_captions_are_refused_before_another_vocabulary_meets_the_old_weights(begun, tmp_path, monkeypatch):
    plain = trainer.load_pictures

    def renamed(*arguments):
        pictures = plain(*arguments)
        pictures.data = pictures.data.map(lambda row: {"text": "a jolly " + row["text"]})
        return pictures

    monkeypatch.setattr(trainer, "load_pictures", renamed)
    with pytest.raises(ValueError, match=r"other pictures.*fingerprint \w{16} -> \w{16}.*another vocabulary \(fingerprint"):
        resume(begun, tmp_path)


def test_two_small_batches_of_two_processes_are_one_large_one():
    recipes = [{"batch_size": size, "seed": 0} for size in (8, 4)]
    sides = [resuming.origin(each, processes, {}) for each, processes in zip(recipes, (1, 2))]
    assert resuming.compare_origins(*sides) == ["batch_size 8 -> 4"]
    with pytest.raises(ValueError, match="1 processes -> 2, 8 pictures a step -> 16"):
        resuming.compare_origins(sides[0], resuming.origin(recipes[0], 2, {}))


def test_contents_that_a_checkpoint_does_not_know_are_not_compared():
    sides = [resuming.origin({"batch_size": 8}, 1, contents) for contents in ({}, {"pictures": "a"}, {"pictures": "b"})]
    assert resuming.compare_origins(*sides[:2]) == ["pictures of an earlier kind of checkpoint, which cannot be compared"]
    with pytest.raises(ValueError, match=r"other pictures, captions or labels \(fingerprint a -> b\)"):
        resuming.compare_origins(*sides[1:])


def test_every_field_that_may_change_exists():
    for key in resuming.FREE | resuming.EFFECTIVE:
        model = TrainingConfig
        for part in key.split("."):
            assert part in model.model_fields, key
            model = {"dataset": type(TrainingConfig(output_dir="x").dataset)}.get(part.removeprefix("source_"))


def test_the_fingerprint_is_of_contents(begun, tmp_path):
    first, second = (build(tmp_path / name).pictures for name in "ab")
    assert data_fingerprint(first) == data_fingerprint(second)
    swapped = [1, 0, *range(2, len(first))]
    for changed in (first.data.select(range(5)), first.data.select(swapped)):
        second.data = changed
        assert data_fingerprint(first) != data_fingerprint(second)


def pictures_in(folder, **options):
    config = DatasetConfig(root=str(folder), **options)
    return PictureDataset(load_training_data(config), config)


def test_the_fingerprint_of_a_folder_is_of_what_copying_keeps(tmp_path):
    for place in range(6):
        Image.new("RGB", (4, 4), (place, 0, 0)).save(tmp_path / f"{place}.bmp")
    before = data_fingerprint(pictures_in(tmp_path))
    copy = shutil.copytree(tmp_path, tmp_path.parent / "copy", copy_function=shutil.copyfile)
    assert data_fingerprint(pictures_in(copy)) == before, "another folder, other times, the same pictures"
    Image.new("RGB", (4, 4), (9, 0, 0)).save(copy / "3.bmp")
    assert data_fingerprint(pictures_in(copy)) != before, "another picture of the same name and size"
    (copy / "3.bmp").unlink()
    (tmp_path / "3.bmp").rename(copy / "33.bmp")
    assert data_fingerprint(pictures_in(copy)) != before, "another name"


@pytest.mark.parametrize("limit", [{"MOST_PICTURES": 3}, {"MOST_BYTES": 3 * 102}])
def test_of_many_pictures_names_and_sizes_are_read_and_contents_of_some(tmp_path, monkeypatch, limit):
    for place in range(6):
        Image.new("RGB", (4, 4), (place, 0, 0)).save(tmp_path / f"{place}.bmp")
        assert (tmp_path / f"{place}.bmp").stat().st_size == 102
    for name, value in limit.items():
        monkeypatch.setattr(fingerprints, name, value)
    found = {"as it was": data_fingerprint(pictures_in(tmp_path))}
    Image.new("RGB", (4, 4), (99, 0, 0)).save(tmp_path / "1.bmp")
    found["unseen"] = data_fingerprint(pictures_in(tmp_path))
    Image.new("RGB", (4, 4), (99, 0, 0)).save(tmp_path / "2.bmp")
    found["seen"] = data_fingerprint(pictures_in(tmp_path))
    Image.new("RGB", (9, 9)).save(tmp_path / "1.bmp")
    found["resized"] = data_fingerprint(pictures_in(tmp_path))
    assert found["unseen"] == found["as it was"] and len(set(found.values())) == 3


def early(path):
    """Make a checkpoint what it was before there were hashes."""
    file = path / "state.json"
    state = json.loads(file.read_text())
    del state["origin"], state["without_moments"]
    state["lr_scheduler"] = {"last_epoch": state.pop("lr_step"), "_last_lr": [0.1]}
    file.write_text(json.dumps(state))
    (path / "hashes.json").unlink()


def test_a_checkpoint_from_before_there_were_hashes_goes_on_with_one_warning(begun, tmp_path, said):
    shutil.copytree(begun, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "checkpoint-2")
    early(tmp_path / "checkpoint-1")
    run = build(tmp_path, max_steps=2, checkpoint_interval=1)
    assert run.step == 1 and len(said) == 1
    assert "checkpoint-1 has no hashes: whether its files are intact cannot be checked, nor whether recipe and data" in said[0]
    run.train()
    found, expected = final_state(tmp_path)[0], final_state(begun)[0]
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_missing_moments_are_named(begun, tmp_path):
    run = resume(begun, tmp_path)
    tensors, state = final_state(tmp_path)
    name = next(iter(run.snapshot.parameters))
    del tensors[f"moment.{name}.exp_avg"]
    with pytest.raises(ValueError, match=f"it lacks moment.{name}.exp_avg"):
        run.snapshot.blank(tensors, state)


# ---------------------------------------------------------------------- one run a folder


def test_a_folder_in_use_is_refused_and_left_free(begun, tmp_path):
    run = resume(begun, tmp_path, max_steps=3)
    with RunLock(tmp_path):
        with pytest.raises(ValueError, match=f"is in use by process {os.getpid()}"):
            build(tmp_path, max_steps=3)
        with pytest.raises(ValueError, match="in use by process"):
            run.train()
    run.train()
    assert not locks(tmp_path) and latest_checkpoint(tmp_path).name == "checkpoint-3"


def locks(folder):
    return [path.name for path in folder.glob(".lock*")]


def lock_of(folder, pid, started, host=None):
    (folder / f".lock-{pid}-{started:.2f}-{host or socket.gethostname()}").touch()


@pytest.mark.parametrize("holder", ["ended", "number used again"])
def test_a_stale_lock_is_taken_over(tmp_path, holder):
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    lock_of(tmp_path, child.pid if holder == "ended" else os.getpid(), 1.0)
    with RunLock(tmp_path):
        own = f".lock-{os.getpid()}-{psutil.Process().create_time():.2f}-{socket.gethostname()}"
        assert locks(tmp_path) == [own]
    assert locks(tmp_path) == []


def test_a_lock_of_another_machine_says_what_to_do(tmp_path):
    lock_of(tmp_path, 1, 1.0, "elsewhere")
    with pytest.raises(ValueError, match=r"process 1 on elsewhere.*delete .*\.lock-1-1.00-elsewhere"):
        RunLock(tmp_path).check()


def test_whoever_looks_first_and_writes_last_does_not_get_the_folder(tmp_path, monkeypatch):
    """Another process takes the folder, over a stale lock, after this one found that free and before it wrote its own."""
    other = psutil.Process().parent()
    lock_of(tmp_path, os.getpid(), 1.0)
    look = RunLock.check

    def overtaken(self):
        look(self)
        lock_of(tmp_path, other.pid, other.create_time())

    monkeypatch.setattr(RunLock, "check", overtaken)
    with pytest.raises(ValueError, match=f"in use by process {other.pid}"):
        with RunLock(tmp_path):
            pass
    assert locks(tmp_path) == [f".lock-{other.pid}-{other.create_time():.2f}-{socket.gethostname()}"], "the other's stays"


ENTER = """
import sys, time
from pathlib import Path
from atlas_diffusers.training.locking import RunLock
lock = RunLock(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
try:
    with lock:
        print("in", flush=True)
        sys.stdin.readline()
except ValueError:
    print("out", flush=True)
"""


def test_of_processes_that_start_together_at_most_one_gets_the_folder(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", ENTER, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    children = [subprocess.Popen(command, env=environment, **pipes) for _ in range(3)]
    assert [child.stdout.readline() for child in children] == ["ready\n"] * 3
    for child in children:
        child.stdin.write("\n"), child.stdin.flush()
    told = [child.stdout.readline().strip() for child in children]
    assert told.count("in") <= 1 and set(told) <= {"in", "out"}
    assert len(locks(tmp_path)) == told.count("in")
    for child in children:
        child.communicate("\n")
    assert locks(tmp_path) == []


def test_caches_are_written_under_the_lock(tmp_path, monkeypatch):
    held = []
    monkeypatch.setattr(trainer, "CaptionCache", lambda *arguments: held.append(locks(tmp_path)))
    config = TrainingConfig(
        output_dir=str(tmp_path), dataset=RECIPE["dataset"], init_from="atlas-emoji", text_encoder=None,
        train_text_encoder=False, cache_text_embeddings=True,
    )  # fmt: skip
    Trainer(config)
    assert len(held) == len(held[0]) == 1 and locks(tmp_path) == []
    with RunLock(tmp_path), pytest.raises(ValueError, match="in use"):
        Trainer(config)
    assert len(held) == 1


def test_processes_that_do_not_know_of_each_other_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    with pytest.raises(ValueError, match="2 processes were started that do not know of each other"):
        build(tmp_path)


# ---------------------------------------------------------------------- calm ends


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_its_step_and_it_goes_on_as_if_nothing_was(tmp_path, begun, monkeypatch, number):
    step = Trainer._optimizer_step

    def signalled(self, batches):
        if self.step == 0:
            os.kill(os.getpid(), number)
        return step(self, batches)

    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_optimizer_step", signalled)
        with pytest.raises(TrainingStopped, match=f"stopped by {number.name} after step 1 of 2; .*checkpoint-1") as stop:
            build(tmp_path, max_steps=2, checkpoint_interval=2).train()
    assert stop.value.number == number and signal.getsignal(number) == before
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-1"] and not locks(tmp_path)
    build(tmp_path, max_steps=2, checkpoint_interval=2).train()
    found, expected = final_state(tmp_path)[0], final_state(begun)[0]
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def wait_for(file, process):
    while not file.exists() and process.poll() is None:
        try:
            process.wait(0.02)
        except subprocess.TimeoutExpired:
            pass


TWO = ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / "training/accelerate/cpu-2.yaml")]
COMMANDS = {
    1: ["-m", "atlas_diffusers", "train"],
    2: [*TWO, "--main_process_port", "0", str(ROOT / "training/train.py"), "--config"],
}


@pytest.mark.parametrize("processes", COMMANDS)
def test_sigterm_to_the_command_reaches_the_script(tmp_path, processes):
    out, file = tmp_path / "run", tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe(out, max_steps=2000, checkpoint_interval=1, batch_size=4)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, *COMMANDS[processes], str(file)], env=environment, stderr=subprocess.PIPE, text=True
    )
    wait_for(out / "checkpoint-2", process)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=100)
    assert not psutil.wait_procs(children, timeout=20)[1], "no process trains on"
    last = [line for line in errors.splitlines() if line.startswith("train.py: ")]
    assert len(last) == 1 and "stopped by SIGTERM" in last[0] and "goes on from" in last[0], errors[-2000:]
    assert not locks(out) and f"of {4 * processes} pictures" in errors
    if processes == 1:
        assert process.returncode == 128 + signal.SIGTERM and "Traceback" not in errors


def test_the_second_signal_acts_as_it_did_before():
    before, calls = signal.getsignal(signal.SIGTERM), []
    signal.signal(signal.SIGTERM, lambda *arguments: calls.append(arguments[0]))
    try:
        with StopRequest() as request:
            os.kill(os.getpid(), signal.SIGTERM)
            assert request.number == signal.SIGTERM and calls == []
            os.kill(os.getpid(), signal.SIGTERM)
            assert calls == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)
