"""The processes of a run, by Accelerate."""

import os
from datetime import timedelta

from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, DistributedType, InitProcessGroupKwargs

from ..config import TrainingConfig

SPLIT = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


def join_processes(config: TrainingConfig, cpu: bool = False) -> Accelerator:
    """
    This process's place among those of the run.

    Args:
        config: gives precision and trackers.
        cpu: leave GPUs alone.

    Raises:
        ValueError: for weights split over processes, trackers that are not installed, and processes that do not know of each
            other.
    """
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=config.mixed_precision,
        log_with=[*config.trackers] or None,
        project_dir=config.output_dir,
        dataloader_config=DataLoaderConfiguration(dispatch_batches=False),
        # the others wait while the main process fills a cache or evaluates
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=12))],
    )
    if (kind := accelerator.distributed_type) in SPLIT:
        raise ValueError(f"{kind}: weights split over processes are not supported; every process must hold the network")
    if missing := set(config.trackers) - {"all"} - {str(tracker) for tracker in accelerator.log_with}:
        raise ValueError(f"trackers={sorted(missing)}: their packages are not installed")
    if (started := int(os.environ.get("WORLD_SIZE", 1))) != accelerator.num_processes:
        raise ValueError(
            f"{started} processes were started that do not know of each other; without GPUs set ACCELERATE_USE_CPU=true"
        )
    return accelerator
