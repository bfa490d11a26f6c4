"""training/accelerate/*.yaml as Accelerate reads them; cpu-2.yaml is launched in test_resuming.py."""

import os

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env
from test_trainer import ROOT
from torch.distributed.fsdp import CPUOffloadPolicy

FOLDER = ROOT / "training" / "accelerate"
# processes, of a machine, precision, data parallel copies and shares of weights
SAID = {
    "one-gpu": (1, 1, "bf16", None),
    "ddp-8": (8, 8, "bf16", None),
    "fsdp2-8": (8, 8, "bf16", (1, 8)),
    "fsdp2-hybrid-2x8": (16, 8, "bf16", (2, 8)),
    "cpu-2": (2, 2, "no", None),
}


def test_every_configuration_is_here():
    assert {file.stem for file in FOLDER.iterdir()} == set(SAID)


@pytest.mark.parametrize("name", SAID)
def test_a_configuration_starts_what_it_says(name, monkeypatch):
    processes, local, precision, split = SAID[name]
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    told = ["--config_file", str(FOLDER / f"{name}.yaml"), "--main_process_port", "0", "train.py", "--config", "RECIPE"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(told))
    assert args.num_processes == processes and args.training_script_args == ["--config", "RECIPE"]
    assert bool(args.use_fsdp) is (split is not None) and not args.use_deepspeed
    if processes == 1:
        assert not args.multi_gpu
        command, environment = prepare_simple_launcher_cmd_env(args)
        assert command[1:] == ["train.py", "--config", "RECIPE"]
    else:  # by torchrun
        assert args.use_fsdp or args.multi_gpu
        environment = prepare_multi_gpu_env(args)
        assert int(args.nproc_per_node) == local
    assert environment["ACCELERATE_MIXED_PRECISION"] == precision
    assert ("ACCELERATE_USE_FSDP" in environment) is (split is not None)
    if split is not None:
        shares = {key: environment.get(f"PARALLELISM_CONFIG_DP_{key}_SIZE") for key in ("REPLICATE", "SHARD")}
        assert shares == ({"REPLICATE": "2", "SHARD": "8"} if split[0] > 1 else dict.fromkeys(shares))
        for key in environment.keys() - os.environ.keys():
            monkeypatch.setenv(key, environment[key])
        plugin = FullyShardedDataParallelPlugin()
        assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True and not plugin.activation_checkpointing
        assert not plugin.cpu_ram_efficient_loading and plugin.state_dict_type.name == "SHARDED_STATE_DICT"
        assert not isinstance(plugin.cpu_offload, CPUOffloadPolicy)
