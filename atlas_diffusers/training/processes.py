"""The processes of a run, by Accelerate, and what they do together."""

import os
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import DataLoaderConfiguration, DistributedType, InitProcessGroupKwargs, gather
from diffusers.utils import logging

from ..config import TrainingConfig

logger = logging.get_logger(__name__)

REFUSED = {DistributedType.DEEPSPEED: "DeepSpeed", DistributedType.MEGATRON_LM: "Megatron-LM"}
REMEDY = "use FSDP, as `accelerate launch --use_fsdp --fsdp_version 2` or training/accelerate/fsdp2-8.yaml"

Result = TypeVar("Result")


def join_processes(config: TrainingConfig, cpu: bool = False) -> Accelerator:
    """
    This process's place among those of the run, by what `accelerate launch` or torchrun said.

    Args:
        config: gives precision, where it says so, and trackers.
        cpu: leave GPUs alone.

    Raises:
        ValueError: for a strategy that cannot run, settings of the launch that contradict the recipe, trackers that are not
            installed, and processes that do not know of each other.
    """
    launched, said = os.environ.get("ACCELERATE_MIXED_PRECISION", "no"), "mixed_precision" in config.model_fields_set
    if said and launched not in ("no", config.mixed_precision):
        raise ValueError(f"mixed_precision={config.mixed_precision!r} in the recipe, but {launched!r} at the launch: give one")
    if _asked("ACCELERATE_USE_DEEPSPEED"):  # which Accelerate would import first
        raise ValueError(f"DeepSpeed is not supported: {REMEDY}")
    accelerator = Accelerator(
        cpu=cpu or not torch.accelerator.is_available(),
        mixed_precision=config.mixed_precision if said else None,
        log_with=[*config.trackers] or None,
        project_dir=config.output_dir,
        dataloader_config=DataLoaderConfiguration(dispatch_batches=False),
        # processes wait for the slowest share of a cache or of an evaluation
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=12))],
    )
    if (kind := accelerator.distributed_type) in REFUSED:
        raise ValueError(f"{REFUSED[kind]} is not supported: {REMEDY}")
    if kind == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ValueError(f"version 1 of FSDP is not supported: {REMEDY}")
    if kind != DistributedType.FSDP and _asked("ACCELERATE_USE_FSDP"):
        raise ValueError(f"FSDP at the launch, which Accelerate leaves aside ({kind.value}): it splits weights over GPUs")
    if kind == DistributedType.FSDP and accelerator.device.type == "cpu" and _asked("FSDP_OFFLOAD_PARAMS"):
        raise ValueError("FSDP_OFFLOAD_PARAMS at the launch, but the weights are on the CPU already: launch without it")
    if kind == DistributedType.FSDP and config.optimizer == "muon":
        raise ValueError("optimizer: muon turns whole matrices, which FSDP splits over processes: give optimizer: adamw")
    if (steps := accelerator.gradient_accumulation_steps) != 1:
        raise ValueError(f"gradient_accumulation_steps={steps} at the launch: give micro_batch_size in the recipe instead")
    if missing := set(config.trackers) - {"all"} - {str(tracker) for tracker in accelerator.log_with}:
        raise ValueError(f"trackers={sorted(missing)}: their packages are not installed")
    if (started := int(os.environ.get("WORLD_SIZE", 1))) != accelerator.num_processes:
        raise ValueError(
            f"{started} processes were started that do not know of each other; to leave GPUs alone set ACCELERATE_USE_CPU=true"
        )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu" and accelerator.is_main_process:
        logger.warning("mixed_precision='fp16' has no effect on a CPU, which computes in float32: 'bf16' has one")
    return accelerator


def _asked(setting: str) -> bool:
    """Whether the launch turned a setting on."""
    return os.environ.get(setting, "false").lower() in ("true", "1")


def place() -> tuple[int, int]:
    """The number of this process, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def together(work: Callable[[], Result]) -> list[Result]:
    """
    What ``work`` gives in each process, in their order.

    Raises:
        OSError: in all processes, if it is raised in one.
    """
    rank, world = place()
    try:
        own = work(), None
    except OSError as error:
        if world == 1:
            raise
        own = None, f"process {rank}: {error}"
    every: list[Any] = [own]
    if world > 1:
        every = [None] * world
        dist.all_gather_object(every, own)
    if failures := [reason for _, reason in every if reason is not None]:
        raise OSError("; ".join(failures))
    return [result for result, _ in every]


def in_shares(count: int, work: Callable[[range], torch.Tensor]) -> torch.Tensor:
    """
    ``work(range(count))``, ``(count, ...)`` on the CPU, of which each process computes as many rows as the others.

    Args:
        count: rows, at least 1.
        work: the rows of a range of places.
    """
    rank, world = place()
    if world == 1:
        return work(range(count)).cpu()
    size = -(-count // world)
    own = work(range(min(rank * size, count - 1), min((rank + 1) * size, count)))
    padded = torch.cat([own, own[-1:].expand(size - len(own), *own.shape[1:])])
    gathered = gather(padded.contiguous().to(PartialState().device))
    return cast(torch.Tensor, gathered).cpu()[:count]


def check_agreement(said: Mapping[str, object], what: str) -> None:
    """
    Raise ``ValueError`` in all processes if they were told different things, with the keys and both values.

    Args:
        said: what this process was told, by key.
        what: a name for it.
    """
    every = together(lambda: said)
    for rank, other in enumerate(every[1:], 1):
        keys = [key for key in sorted({*every[0], *other}) if every[0].get(key) != other.get(key)]
        if keys:
            shown = "; ".join(f"{key} {every[0].get(key)!r} and {other.get(key)!r}" for key in keys[:3])
            raise ValueError(f"processes 0 and {rank} have different {what}: {shown}")


def is_lost_process(error: RuntimeError) -> bool:
    """Whether an error says that another process cannot be reached any more."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)
