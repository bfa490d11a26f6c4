"""Past one process and past one batch.

    python benchmarks/scaling.py memory     memory per GPU of the presets under DDP and FSDP2, on the meta device
    python benchmarks/scaling.py processes  two gloo processes beside one at equal global batch, on this CPU
    python benchmarks/scaling.py pairing    CPU time of the semidiscrete coupling, one-to-one pairs of 2^17 points
    python benchmarks/scaling.py couplings  KID and curvature of digit flows by coupling

`memory` splits weights as `accelerate launch --config_file training/accelerate/fsdp2-8.yaml` does, over processes that are not
there, and adds what a step needs. `processes` takes turns between its sides; FSDP2 runs on a CPU by the helper of the tests.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
PRESETS = ("cifar10", "imagenet64", "ffhq128", "lsun256", "celeba1024")
RECIPE = {
    "dataset": {"name": "embedded:emoji", "resolution": 32, "random_flip": True},
    "model": {
        "base_channels": 48, "channel_mult": [1, 2, 2], "num_res_blocks": 1, "attention_levels": [1],
        "cross_attention_levels": [1], "num_heads": 4, "addition_embed_type": "text", "patch_size": 2, "norm_num_groups": 16,
    },
    "max_steps": 12, "log_interval": 1, "checkpoint_interval": 12,
}  # fmt: skip
SIDES = {"one process": (1, "ddp"), "two, DDP": (2, "ddp"), "two, FSDP2": (2, "fsdp")}


def memory() -> None:
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from atlas_diffusers.config import TrainingConfig, read_recipe, validate
    from atlas_diffusers.training.memory import estimate_memory
    from atlas_diffusers.training.networks import new_network

    print("| preset | parameters | pictures a GPU | DDP | FSDP2, 8 GPUs | FSDP2, 16 GPUs |\n|---|---|---|---|---|---|")
    for name in PRESETS:
        config = validate(TrainingConfig, read_recipe(f"experiment:{name}"))
        whole = estimate_memory(config)
        gradients, cells = 4 * whole.parameters, [f"{(whole.total + 4 * whole.parameters) / 2**30:.2f}"]
        for world in (8, 16):
            dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
            with torch.device("meta"):
                share, unit = split_sizes(new_network(config))
            dist.destroy_process_group()
            # weights, averages, moments and gradients of the share; activations; a block whole, with its gradients
            cells.append(f"{(5 * 4 * share + whole.step - gradients + 2 * 4 * unit) / 2**30:.2f}")
        size = config.micro_batch_size or config.batch_size
        print(f"| {name} | {whole.parameters:,} | {size} | {' | '.join(cells)} |")


def split_sizes(network: torch.nn.Module) -> tuple[int, int]:
    """Numbers that the first process holds, and that it gathers at once: the largest block and what lies outside of blocks."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    blocks = [module for module in network.modules() if type(module).__name__ in network._no_split_modules]
    units = {id(p): p.numel() for p in network.parameters()}
    sizes = [sum(units.pop(id(p), 0) for p in block.parameters()) for block in reversed(blocks)]
    rest = sum(units.values())
    for block in reversed(blocks):
        fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)
    return sum(p.to_local().numel() for p in network.parameters()), max(sizes) + rest


def processes(rounds: int) -> None:
    found = {side: [] for side in SIDES}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            for side, row in run_sides(Path(folder)).items():
                found[side].append(row)
    print("| | images/s | ratio (of each round) | weights, averages and moments a process, MiB | peak memory a process, MiB | "
          "checkpoint, s | checkpoint, MiB |\n|---|---|---|---|---|---|---|")  # fmt: skip
    for side, rows in found.items():
        ratios = [row["speed"] / base["speed"] for row, base in zip(rows, found["one process"])]
        middle = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        print(f"| {side} | {middle['speed']:.1f} | {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) | "
              f"{middle['state']:.1f} | {middle['peak']:.0f} | {middle['seconds']:.2f} | {middle['written']:.1f} |"
        )  # fmt: skip


def run_sides(folder: Path) -> dict[str, dict[str, float]]:
    jobs = []
    for side, (world, strategy) in SIDES.items():
        recipe = RECIPE | {"output_dir": str(folder / side), "batch_size": 32 // world}
        jobs.append({"name": side, "world": world, "strategy": strategy, "recipe": recipe})
    (folder / "jobs.json").write_text(json.dumps(jobs))
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    command = [sys.executable, str(ROOT / "tests" / "training" / "several.py"), str(folder / "jobs.json")]
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    found = {}
    for side in SIDES:
        rows = [json.loads(line) for line in (folder / side / "metrics.jsonl").read_text().splitlines()]
        facts = json.loads((folder / f"{side}-0.json").read_text())
        files = (folder / side / f"checkpoint-{RECIPE['max_steps']}").iterdir()
        found[side] = {
            "speed": statistics.median(row["images_per_second"] for row in rows[2:]), "state": facts["bytes"] / 2**20,
            "peak": facts["mebibytes"], "seconds": facts["checkpoint_seconds"],
            "written": sum(file.stat().st_size for file in files) / 2**20,
        }  # fmt: skip
    return found


def pairing(largest: int) -> None:
    from atlas_diffusers.config import DatasetConfig
    from atlas_diffusers.pretrained import load_digits, load_emoji
    from atlas_diffusers.training import PictureDataset, SemidiscreteCoupling
    from atlas_diffusers.transport import pair_one_to_one

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    print("| points | dimensions | fit, s | mass off by | pairs of a batch of 32, ms | peak memory, MiB |")
    print("|---|---|---|---|---|---|")
    digits = DatasetConfig(name="embedded:digits", channels=1, resolution=8, caption_column=None)
    for name, data, config in (("digits", load_digits(), digits), ("emoji", load_emoji("train"), DatasetConfig())):
        pictures = PictureDataset(data, config)
        points = torch.stack([pictures[i, 0]["pixels"].flatten() for i in range(len(pictures))])
        coupling, begun = SemidiscreteCoupling(points), time.process_time()
        coupling.fit()
        fitted = time.process_time() - begun
        excess = coupling.masses(100 * len(points), generator) * len(points) - 1
        report(f"{name}, {len(points):,}", coupling, f"{fitted:.1f} | {excess.abs().mean():.1%}", generator)
    points = torch.randn(largest, 1024, generator=generator)
    report(f"{largest:,} random", SemidiscreteCoupling(points), "not fitted | ", generator)
    del points
    x, y = torch.randn(2, 2**17, 16, generator=generator)
    begun = time.process_time()
    pairs = pair_one_to_one(x, y)
    cost = [(x - z).square().sum(1).mean().item() for z in (y, y[pairs])]
    print(f"\n2^17 one-to-one pairs in 16 dimensions: {time.process_time() - begun:.1f} s, mean squared distance "
          f"{cost[1]:.2f} ({cost[0]:.2f} by chance)")  # fmt: skip


def report(name: str, coupling, fitted: str, generator: torch.Generator) -> None:
    noise, seconds = torch.randn(32, coupling.dimension, generator=generator), []
    for _ in range(3):
        begun = time.process_time()
        coupling.pair(noise)
        seconds.append(time.process_time() - begun)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"| {name} | {coupling.dimension:,} | {fitted} | {1000 * min(seconds):.1f} | {peak:.0f} |", flush=True)


def couplings(seeds: int, steps: int) -> None:
    """Real digits are their own features: 64 numbers."""
    from atlas_diffusers.config import TrainingConfig
    from atlas_diffusers.metrics import kid
    from atlas_diffusers.training import Trainer

    torch.set_num_threads(1)
    print("| coupling | seed | KID, 4 steps | 8 steps | 50 steps | curvature |\n|---|---|---|---|---|---|", flush=True)
    for seed in range(seeds):
        for coupling in ("independent", "sinkhorn", "semidiscrete"):
            with tempfile.TemporaryDirectory() as folder:
                run = Trainer(TrainingConfig(
                    output_dir=folder, seed=seed, max_steps=steps, batch_size=128, learning_rate=2e-3, ema_decay=0.995,
                    dataset={"name": "embedded:digits", "channels": 1, "resolution": 8, "caption_column": None},
                    model={"base_channels": 32, "channel_mult": [1, 2], "num_res_blocks": 1, "attention_levels": [1],
                           "num_heads": 4, "norm_num_groups": 8},
                    text_encoder=None, objective="flow_matching", coupling=coupling, checkpoint_interval=steps,
                    log_interval=steps,
                ), cpu=True)  # fmt: skip
                run.train()
                real = torch.stack([run.pictures[i, 0]["pixels"].flatten() for i in range(len(run.pictures))])
                with run.averaged() as networks, torch.no_grad():
                    rows = [sampled(networks["unet"], count) for count in (4, 8, 50)]
            scores = [f"{1000 * kid(found, real).mean:.2f}" for found, _ in rows]
            print(f"| {coupling} | {seed} | {' | '.join(scores)} | {rows[-1][1]:.3f} |", flush=True)


def sampled(network: torch.nn.Module, steps: int) -> tuple[torch.Tensor, float]:
    """1,024 samples by Euler's method, and E |v − (x₁ − x₀)|² over E |x₁ − x₀|², zero for straight paths."""
    x = start = torch.randn(1024, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    velocities = []
    for step in range(steps):
        s = torch.full((len(x),), 1 - step / steps)
        velocities.append(network(x, s * 1000).sample)
        x = x - velocities[-1] / steps
    change = start - x
    curved = sum((v - change).square().mean() for v in velocities) / steps
    return x.flatten(1), (curved / change.square().mean()).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("memory", "processes", "pairing", "couplings"))
    parser.add_argument("--rounds", type=int, default=3, help="of `processes`")
    parser.add_argument("--points", type=int, default=1_000_000, help="of `pairing`")
    parser.add_argument("--seeds", type=int, default=3, help="of `couplings`")
    parser.add_argument("--steps", type=int, default=3000, help="of `couplings`")
    args = parser.parse_args()
    {"memory": memory, "processes": lambda: processes(args.rounds), "pairing": lambda: pairing(args.points),
     "couplings": lambda: couplings(args.seeds, args.steps)}[args.part]()  # fmt: skip


if __name__ == "__main__":
    main()
