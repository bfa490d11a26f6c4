"""SIGKILL at any moment, then the same command again: the run ends as if nothing had happened."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import yaml
from test_trainer import ROOT, assert_same_checkpoints, build, final_state, recipe

from atlas_diffusers.training import latest_checkpoint
from atlas_diffusers.training.checkpoints import checkpoints

CHANGES = {"max_steps": 10, "checkpoint_interval": 2, "batch_size": 4}

# train.py, but at step STEP the process kills itself at MOMENT
SCRIPT = """
import os, runpy, shutil, signal, sys
from pathlib import Path
from atlas_diffusers.training import checkpoints, trainer

moment, step = sys.argv.pop(1), int(sys.argv.pop(1))
die = lambda: os.kill(os.getpid(), signal.SIGKILL)
save_file, rename, log = checkpoints.save_file, Path.rename, trainer.Trainer._log
now = {"step": 0}

def logging(self, *rest):
    now["step"] = self.step
    log(self, *rest)
    if moment == "between steps" and self.step == step:
        die()
trainer.Trainer._log = logging

def half_written(tensors, file):
    save_file(tensors, file)
    if moment == "inside the write" and now["step"] == step:
        data = Path(file).read_bytes()
        Path(file).write_bytes(data[: len(data) // 2])
        die()
checkpoints.save_file = half_written

def renaming(self, target):
    if ".partial" in self.name and moment == "before the rename" and now["step"] == step:
        die()
    rename(self, target)
    if moment == "before pruning" and now["step"] == step:
        die()
Path.rename = renaming

rmtree = shutil.rmtree
def removing(path, *rest, **options):
    if moment == "while pruning" and now["step"] == step and not Path(path).name.startswith("."):
        (Path(path) / "state.safetensors").unlink(missing_ok=True)
        if Path(path).is_dir():
            die()
    rmtree(path, *rest, **options)
checkpoints.shutil.rmtree = removing

sys.argv[0] = "train.py"
runpy.run_path(os.path.join(os.environ["PYTHONPATH"], "training", "train.py"), run_name="__main__")
"""


def command(folder, name, **changes):
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe(folder / name, **changes)))
    return ["--config", str(folder / f"{name}.yaml")]


def environment(**more):
    return {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **more}


def run_and_die(arguments, moment, step):
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, moment, str(step), *arguments], env=environment(), capture_output=True, text=True
    )
    assert result.returncode == -signal.SIGKILL, result.stderr[-2000:]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    build(folder, **CHANGES).train()
    return folder


@pytest.mark.parametrize(
    "moment, step, kept",
    [
        ("between steps", 5, 4),
        ("inside the write", 4, 2),
        ("before the rename", 6, 4),
        ("before pruning", 6, 6),
        ("while pruning", 6, 6),
    ],
)
def test_a_run_that_kills_itself_ends_bit_equal(tmp_path, whole, moment, step, kept):
    run_and_die(command(tmp_path, "killed", **CHANGES), moment, step)
    assert latest_checkpoint(tmp_path / "killed").name == f"checkpoint-{kept}"
    assert final_state(tmp_path / "killed")[1]["step"] == kept
    resumed = build(tmp_path / "killed", **CHANGES)
    assert resumed.step == kept
    resumed.train()
    assert_same_checkpoints(tmp_path / "killed", whole)
    assert len(checkpoints(tmp_path / "killed")) == 2
    assert not list((tmp_path / "killed").glob(".checkpoint*"))


def test_a_killed_stream_with_workers_ends_bit_equal(tmp_path):
    changes = CHANGES | {"max_steps": 6, "dataset": {"streaming": True, "shuffle_buffer": 12, "num_workers": 2}}
    run_and_die(command(tmp_path, "killed", **changes), "between steps", 3)
    build(tmp_path / "killed", **changes).train()
    build(tmp_path / "whole", **changes).train()
    assert_same_checkpoints(tmp_path / "killed", tmp_path / "whole")


def launch(arguments, processes=2):
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return subprocess.Popen(
        [*start, str(ROOT / "training" / "train.py"), *arguments], env=environment(ACCELERATE_USE_CPU="true"),
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.parametrize("changes", [{}, {"dataset": {"streaming": True, "shuffle_buffer": 12}}], ids=["shuffled", "streamed"])
def test_two_killed_processes_end_bit_equal(tmp_path, changes):
    changes = CHANGES | {"max_steps": 12} | changes
    killed, whole = (command(tmp_path, name, **changes) for name in ("killed", "whole"))
    process = launch(killed)
    while latest_checkpoint(tmp_path / "killed") is None and process.poll() is None:
        time.sleep(0.01)
    for each in [*psutil.Process(process.pid).children(recursive=True), process]:
        each.kill()
    process.communicate()
    assert 2 <= final_state(tmp_path / "killed")[1]["step"] < 12
    for arguments in (killed, whole):
        process = launch(arguments)
        _, errors = process.communicate(timeout=150)
        assert process.returncode == 0, errors[-2000:]
    assert_same_checkpoints(tmp_path / "killed", tmp_path / "whole")
    rows = [json.loads(line) for line in (tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 13)), "only one process writes, and no row is there twice"


FULL = """
import resource, runpy, sys
from pathlib import Path
sys.argv = ["train.py", *sys.argv[1:]]
from atlas_diffusers.training import trainer
step = trainer.Trainer._optimizer_step

def limited(self, batches):
    if self.step == 3:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    return step(self, batches)
trainer.Trainer._optimizer_step = limited
runpy.run_path(str(Path(sys.path[0]) / "train.py"), run_name="__main__")
"""


def test_a_disk_that_takes_no_more_ends_the_run_with_the_last_checkpoint(tmp_path):
    """The limit on the size of a file stands for a full disk: writing fails in the operating system, not in a stub."""
    (tmp_path / "full.py").write_text(FULL.replace("sys.path[0]", repr(str(ROOT / "training"))))
    arguments = command(tmp_path, "run", **CHANGES)
    result = subprocess.run(
        [sys.executable, str(tmp_path / "full.py"), *arguments], env=environment(), capture_output=True, text=True
    )
    assert result.returncode == 2
    message = result.stderr.strip().splitlines()[-1]
    assert message.startswith("train.py: checkpoint ") and "checkpoint-4 could not be written" in message
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-2"]
    build(tmp_path / "run", **CHANGES).train()
    build(tmp_path / "whole", **CHANGES).train()
    assert_same_checkpoints(tmp_path / "run", tmp_path / "whole")
