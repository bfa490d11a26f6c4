"""SIGKILL at any moment, then the same command again: the run ends as if nothing had happened."""

import json
import os
import signal
import subprocess
import sys

import pytest
import yaml
from test_trainer import ROOT, assert_same_checkpoints, build, final_state, recipe

from atlas_diffusers.training import latest_checkpoint
from atlas_diffusers.training.checkpoints import checkpoints

CHANGES = {"max_steps": 10, "checkpoint_interval": 2, "batch_size": 4}

# runs train.py once for each job, in a child that imports nothing anew, and kills it, or fills its disk, at step STEP
DRIVER = """
import json, os, resource, shutil, signal, sys
from pathlib import Path
from atlas_diffusers.training import checkpoints, trainer
from atlas_diffusers.training.script import main

writer = checkpoints.dcp.HuggingFaceStorageWriter
write_data, rename, rmtree, log = writer.write_data, Path.rename, shutil.rmtree, trainer.Trainer._log
step_of, now = trainer.Trainer._optimizer_step, {"step": 0}

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def prepare(moment, step):
    def optimizer_step(self, batches):
        if moment == "full disk" and self.step == step - 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        return step_of(self, batches)

    def logging(self, *rest):
        now["step"] = self.step
        log(self, *rest)
        if moment == "between steps" and self.step == step:
            die()

    def half_written(self, plan, planner):
        result = write_data(self, plan, planner)
        if moment == "inside the write" and now["step"] == step:
            file = next(Path(self.path).glob("*.safetensors"))
            data = file.read_bytes()
            file.write_bytes(data[: len(data) // 2])
            die()
        return result

    def renaming(self, target):
        if ".partial" in self.name and moment == "before the rename" and now["step"] == step:
            die()
        rename(self, target)
        if moment == "before pruning" and now["step"] == step:
            die()

    def removing(path, *rest, **options):
        if moment == "while pruning" and now["step"] == step and list(Path(path).glob("*.safetensors")):
            next(Path(path).glob("*.safetensors")).unlink()
            die()
        rmtree(path, *rest, **options)

    trainer.Trainer._optimizer_step, trainer.Trainer._log = optimizer_step, logging
    writer.write_data, Path.rename, checkpoints.shutil.rmtree = half_written, renaming, removing

statuses = []
for moment, step, arguments, errors in json.loads(sys.argv[1]):
    child = os.fork()
    if child == 0:
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
        prepare(moment, step)
        sys.argv = ["train.py", *arguments]
        status = main()
        sys.stderr.flush()
        os._exit(status)
    statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(statuses))
"""

MOMENTS = {
    "between steps": (5, 4),
    "inside the write": (4, 2),
    "before the rename": (6, 4),
    "before pruning": (6, 6),
    "while pruning": (6, 6),
}
STREAMED = CHANGES | {"max_steps": 6, "dataset": {"streaming": True, "shuffle_buffer": 12, "num_workers": 2}}


def command(folder, name, **changes):
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe(folder / name, **changes)))
    return ["--config", str(folder / f"{name}.yaml")]


def environment(**more):
    return {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **more}


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """Folders of runs that were killed, or whose disk was full, by moment."""
    folder, jobs = tmp_path_factory.mktemp("broken"), []
    killed = [(moment, step, CHANGES) for moment, (step, _) in MOMENTS.items()]
    for moment, step, changes in [*killed, ("between steps", 3, STREAMED), ("full disk", 4, CHANGES)]:
        name = "streamed" if changes is STREAMED else moment.replace(" ", "-")
        jobs.append((moment, step, command(folder, name, **changes), str(folder / f"{name}.txt")))
    result = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(jobs)], env=environment(), capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert json.loads(result.stdout.splitlines()[-1]) == [-signal.SIGKILL] * 6 + [2]
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    build(folder, **CHANGES).train()
    return folder


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_that_kills_itself_ends_bit_equal(broken, whole, moment):
    folder, kept = broken / moment.replace(" ", "-"), MOMENTS[moment][1]
    assert latest_checkpoint(folder).name == f"checkpoint-{kept}"
    assert final_state(folder)[1]["step"] == kept
    resumed = build(folder, **CHANGES)
    assert resumed.step == kept
    resumed.train()
    assert_same_checkpoints(folder, whole)
    assert len(checkpoints(folder)) == 2 and not list(folder.glob(".checkpoint*"))


def test_a_killed_stream_with_workers_ends_bit_equal(broken, tmp_path):
    build(broken / "streamed", **STREAMED).train()
    build(tmp_path, **STREAMED).train()
    assert_same_checkpoints(broken / "streamed", tmp_path)


def test_a_disk_that_takes_no_more_ends_the_run_with_the_last_checkpoint(broken, whole):
    """The limit on the size of a file stands for a full disk: writing fails in the operating system, not in a stub."""
    message = (broken / "full-disk.txt").read_text().strip().splitlines()[-1]
    assert message.startswith("train.py: checkpoint ") and "checkpoint-4 could not be written" in message
    folder = broken / "full-disk"
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-2"]
    build(folder, **CHANGES).train()
    assert_same_checkpoints(folder, whole)
