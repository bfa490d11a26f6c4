"""
Runs jobs of a JSON file on forked gloo processes, which import nothing anew: python several.py JOBS.json

A job is ``{"name", "world"}``, which computes what processes share, or one of train.py with ``{"recipe", "strategy": "ddp" or
"fsdp", "settings": {variable: value}, "double": whether in float64}`` and, if it is to fail, ``"break": [moment, step, rank]``
or, for the last one of its processes, ``"killed": True``: all of them, once there is a checkpoint. Jobs of as many processes
and the same ``"session"`` that follow each other share these. What process R says goes to NAME-R.txt beside the jobs, what it
saw to NAME-R.json, and its exit status, if it has one, to NAME-R.status.
"""

import itertools
import json
import os
import resource
import shutil
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import datasets  # noqa: F401  (what jobs would import each by itself)
import matplotlib.figure  # noqa: F401
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from safetensors.torch import save_file
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from atlas_diffusers.bridges import ReferenceShards, SchrodingerBridgeSolver
from atlas_diffusers.training import caching, checkpoints, objectives, script, sinkhorn_pairs, trainer
from atlas_diffusers.training.caching import TensorCache
from atlas_diffusers.training.processes import in_shares
from atlas_diffusers.training.semidiscrete import SemidiscreteCoupling
from atlas_diffusers.transport.column_shares import transport_column_share

LIMIT = 180  # seconds, after which a process that hangs is ended
# what `accelerate launch --use_fsdp --fsdp_version 2` sets
FSDP = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true", "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT", "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true", "FSDP_ACTIVATION_CHECKPOINTING": "false",
}  # fmt: skip


def use(job):
    """Accelerate leaves FSDP aside on a CPU: here it takes the processes for those of another device."""
    split = job.get("strategy") == "fsdp"
    for name in [name for name in os.environ if name.startswith(("FSDP_", "ACCELERATE_USE_FSDP", "ACCELERATE_MIXED"))]:
        del os.environ[name]
    os.environ.update((FSDP if split else {}) | job.get("settings", {}))
    AcceleratorState._reset_state(reset_partial_state=True)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if job["world"] > 1:
        PartialState(cpu=True)
        kind = DistributedType.MULTI_XPU if split else DistributedType.MULTI_CPU
        PartialState._shared_state["distributed_type"] = kind


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def couplings():
    """Points that plans and couplings are between."""
    x, y = (torch.randn(size, 4, generator=seeded(size), dtype=torch.float64) for size in (40, 36))
    return {"x": x, "y": 1 + y}


def shared_projection(folder, problem, rank):
    """Of particles on references in files, of which each process reads a share."""
    files = []
    for index, part in enumerate(problem["y"].split(7)):
        files.append(folder / f"references-{index}.safetensors")
        if rank == 0:
            save_file({"references": part.contiguous()}, files[-1])
    torch.distributed.barrier()
    bridge = SchrodingerBridgeSolver(ReferenceShards(files, split=True), tolerance=1e-9)
    return bridge.couple(problem["x"], 0.6, 0.8).data


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def bytes_of(tensors):
    return sum(local(tensor).untyped_storage().nbytes() for tensor in tensors)


class Watched(trainer.Trainer):
    """Writes down what a test, or benchmarks/scaling.py, asks of a run."""

    seconds = 0.0

    def summary(self):
        return ""  # which would take longer than the steps

    def save_checkpoint(self):
        begun = time.perf_counter()
        super().save_checkpoint()
        self.seconds = time.perf_counter() - begun

    def train(self):
        folder, every = super().train(), [module for prepared in self.prepared for module in prepared.modules()]
        moments = [value for state in self.optimizer.state.values() for value in state.values()]
        facts = {
            "split": sorted({type(m).__name__ for m in every if isinstance(m, FSDPModule)}),
            "checkpointed": sum(isinstance(m, CheckpointWrapper) for m in every),
            "bytes": bytes_of(self.parameters) + bytes_of(self.ema.shadow_params) + bytes_of(moments),
            "checkpoint_seconds": self.seconds,
            "mebibytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "precision": self.config.mixed_precision,
            "dtypes": sorted({str(p.dtype) for prepared in self.prepared for p in prepared.parameters()}),
        }
        Path(os.environ["FACTS"]).write_text(json.dumps(facts))
        return folder


STEP_OF, WRITE, ROOM = trainer.Trainer._optimizer_step, checkpoints._write, resource.getrlimit(resource.RLIMIT_FSIZE)
BUILD, ENCODED = trainer.build_components, objectives.Objective._encoded


def doubled(*arguments):
    found = BUILD(*arguments)
    for network in found.networks.values():
        network.double()
    return found


def in_float64(double):
    """Networks and pictures, and with them all that is computed."""
    trainer.build_components = doubled if double else BUILD
    objectives.Objective._encoded = (lambda *arguments: ENCODED(*arguments).double()) if double else ENCODED


def break_at(moment=None, step=0, rank=None):
    """In every process where ``rank`` is None."""
    here = rank is None or rank == int(os.environ["RANK"])
    resource.setrlimit(resource.RLIMIT_FSIZE, ROOM)

    def optimizer_step(self, batches):
        loss = STEP_OF(self, batches)
        if here and self.step == step - 1:
            if moment == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if moment == "interrupt":
                os.kill(os.getpid(), signal.SIGINT)
            if moment == "full disk":
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, ROOM[1]))
        return loss

    def writing(tensors, folder):
        WRITE(tensors, folder)
        if here and moment == "removed folder" and folder.name == f".checkpoint-{step}.partial":
            shutil.rmtree(folder)

    trainer.Trainer._optimizer_step, checkpoints._write = optimizer_step, writing


def train(job, folder, rank):
    os.environ["FACTS"] = str(folder / f"{job['name']}-{rank}.json")
    use(job)
    break_at(*job.get("break", ()))
    in_float64(job.get("double", False))
    recipe = job["recipes"][rank] if "recipes" in job else job["recipe"]
    (file := folder / f"{job['name']}-{rank}.recipe.json").write_text(json.dumps(recipe))
    if rank == 0:
        for source, target in job.get("copies", []):
            shutil.copytree(source, target)
    sys.argv = ["train.py", "--config", str(file)]
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    return script.main()


def share(job, folder, rank):
    """What processes compute together, for a test to compare with one process."""
    use(job)
    world, problem = job["world"], couplings()
    found = {
        "plan": transport_column_share(problem["x"], problem["y"].chunk(world)[rank], 0.3, tolerance=1e-9).plan,
        "pairs": sinkhorn_pairs(problem["x"], problem["y"].chunk(world)[rank], 0.02, seeded(), True, 1e-7, split=True),
        "potentials": SemidiscreteCoupling(problem["y"].float()).fit(samples=20).potentials,
        "rows": in_shares(5, lambda places: torch.tensor([[i, rank] for i in places])),
        "references": shared_projection(folder, problem, rank),
    }
    made = []

    def compute(places):
        made.append(len(places))
        return {"rows": torch.tensor(list(places))}

    cache = TensorCache(folder / f"cache-{world}", 10, compute)
    save_file(found | {"made": torch.tensor(made), "cached": cache[9]["rows"]}, folder / f"{job['name']}-{rank}.safetensors")
    try:
        transport_column_share(problem["x"], problem["y"][rank:], 0.3)
    except ValueError as error:
        print(error, file=sys.stderr)
    return 0


def session(jobs, folder, rank, world):
    """Jobs one after another in this process."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", ACCELERATE_USE_CPU="true"
    )
    trainer.Trainer, trainer.Recorder.finish = Watched, lambda self: None  # without curves
    for job in jobs:
        signal.alarm(LIMIT)
        os.dup2(os.open(folder / f"{job['name']}-{rank}.txt", os.O_WRONLY | os.O_CREAT), 2)
        os.environ["MASTER_PORT"] = job["port"]
        status = (train if "recipe" in job else share)(job, folder, rank)
        (folder / f"{job['name']}-{rank}.status").write_text(str(status))


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def fork(jobs, folder, world):
    children = []
    for rank in range(world):
        if (number := os.fork()) == 0:
            try:
                session(jobs, folder, rank, world)
            except BaseException:
                traceback.print_exc()
            os._exit(0)
        children.append(number)
    if jobs[-1].get("killed"):
        out, end = Path(jobs[-1]["recipe"]["output_dir"]), time.monotonic() + LIMIT
        while checkpoints.latest_checkpoint(out) is None and time.monotonic() < end:
            time.sleep(0.01)
        for number in children:
            os.kill(number, signal.SIGKILL)
    for number in children:
        os.waitpid(number, 0)


if __name__ == "__main__":
    # nothing is computed before the forks, which would leave them threads that are not there
    jobs, caching.ROWS_OF_SHARD = Path(sys.argv[1]), 2
    told = [job | {"port": free_port()} for job in json.loads(jobs.read_text())]
    for (world, _), group in itertools.groupby(told, key=lambda job: (job["world"], job.get("session"))):
        fork(list(group), jobs.parent, world)
