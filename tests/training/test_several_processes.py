"""Weights split over processes, checkpoints for any number of them, and what happens when one of them fails."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import several
import torch
from conftest import seeded
from safetensors.torch import load_file
from test_trainer import RECIPE, ROOT, assert_same_checkpoints, recipe

from atlas_diffusers.bridges import SchrodingerBridgeSolver
from atlas_diffusers.training import load_checkpoint, sinkhorn_pairs
from atlas_diffusers.training.checkpoints import checkpoints
from atlas_diffusers.training.semidiscrete import SemidiscreteCoupling
from atlas_diffusers.transport import entropic_transport

STEPS, LONG = 8, 50
PLAIN = {"lr_scheduler": "constant_with_warmup", "checkpoints_total_limit": 9}
BROKEN = {"full disk": 4, "removed folder": 4, "interrupt": 3, "kill": 5}


def job(folder, name, world, strategy="ddp", out=None, more=None, **changes):
    """Eight pictures a step, whatever the number of processes."""
    made = recipe(folder / (out or name), **PLAIN | {"batch_size": 8 // world, "max_steps": STEPS} | changes)
    return {"name": name, "world": world, "strategy": strategy, "recipe": made, **(more or {})}


def relay(folder):
    """Fifty steps in one folder: on 1 process, 2 and 4 with FSDP2, 2 with DDP, and 1."""
    legs = [(1, "ddp"), (2, "fsdp"), (4, "fsdp"), (2, "ddp"), (1, "ddp")]
    rare = {"checkpoint_interval": 10, "learning_rate": 1e-3}
    found = [
        job(folder, f"leg-{number}", world, strategy, "relay", max_steps=10 * number, **rare)
        for number, (world, strategy) in enumerate(legs, 1)
    ]
    return [job(folder, "alone", 1, max_steps=LONG, **rare), *found]


def splits(folder):
    """FSDP2 as launches say, stopped and not, beside DDP."""
    half, painting = str(folder / "whole" / "checkpoint-4"), {"sample_interval": 4, "sample_steps": 2}
    lora = {"init_from": str(folder / "whole" / "pipeline"), "model": None, "text_encoder": None, "lora": {"rank": 2}}
    settings = {
        "FSDP_ACTIVATION_CHECKPOINTING": "true", "FSDP_RESHARD_AFTER_FORWARD": "false",
        "FSDP_TRANSFORMER_CLS_TO_WRAP": "BasicTransformerBlock,CLIPEncoderLayer", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    }  # fmt: skip
    found = [
        job(folder, "whole", 2, "fsdp", **painting),
        job(folder, "resumed", 2, "fsdp", more={"copies": [(half, str(folder / "resumed" / "checkpoint-4"))]}, **painting),
        job(folder, "replicas", 2, "ddp", **painting),
        job(folder, "accumulated", 2, "fsdp", micro_batch_size=2),
        job(folder, "settings", 2, "fsdp", more={"settings": settings}),
        job(folder, "bf16", 2, "fsdp", more={"settings": {"ACCELERATE_MIXED_PRECISION": "bf16"}}),
        job(folder, "lora-fsdp", 2, "fsdp", **lora),
        job(folder, "lora-ddp", 2, "ddp", **lora),
    ]
    for each in found:
        each["recipe"] = {key: value for key, value in each["recipe"].items() if key != "model" or value is not None}
    return found


def in_float64(folder, world):
    """On one process and on two, without weights split."""
    changes = {"max_steps": 30, "learning_rate": 1e-3, "checkpoint_interval": 30}
    source = RECIPE["dataset"] | {"categories": ["Symbols"], "caption_column": None, "aliases_column": None}
    diffusion = {
        "objective": "bridge_matching", "bridge_sigma": 0.5, "bridge_passes": 3, "bridge_steps": 2, "source_dataset": source,
        "text_encoder": None, "model": {"cross_attention_levels": [], "addition_embed_type": None}, "scheduler": None,
        "min_snr_gamma": None, "max_steps": 6, "checkpoint_interval": 6,
    }  # fmt: skip
    precise = {"more": {"double": True}}
    return [
        job(folder, f"double-{world}", world, **precise, **changes),
        job(folder, f"passes-{world}", world, **precise, **diffusion),
    ]


def failures(folder):
    """One of two processes, or both, at a moment, and the same command again; a kill ends the work of both."""
    found = [job(folder, "odd", 2)]
    found[0]["recipes"] = [found[0]["recipe"], found[0]["recipe"] | {"seed": 7}]
    for moment, step in BROKEN.items():
        name, rank = moment.replace(" ", "-"), None if moment == "interrupt" else 1
        found.append(job(folder, f"{name}-again", 2, "fsdp", name, checkpoint_interval=2))
        found.insert(-1, job(folder, name, 2, "fsdp", more={"break": [moment, step, rank]}, checkpoint_interval=2))
    return found[:-1], found[-1:]


def kills(folder):
    """Both processes, at whatever moment they are in, and the same commands again."""
    stream = {"dataset": {"streaming": True, "shuffle_buffer": 12}}
    whole = job(folder, "stream", 2, **stream)
    return whole, [
        (
            job(folder, f"killed-{name}", 2, more={"killed": True}, checkpoint_interval=2, **changes),
            job(folder, f"killed-{name}-again", 2, out=f"killed-{name}", checkpoint_interval=2, **changes),
        )
        for name, changes in (("replicas", {}), ("stream", stream))
    ]


def session(number, *jobs):
    return [each | {"session": number} for each in jobs]


def all_jobs(folder):
    """In an order that changes the number of processes as rarely as it can."""
    alone, *legs = relay(folder)
    before, after = failures(folder)
    stream, ((first, first_again), (second, second_again)) = kills(folder)
    shares = [{"name": f"shares-{world}", "world": world} for world in (2, 3)]
    return [
        *session(1, alone, legs[0], *in_float64(folder, 1)),
        *session(2, legs[1], shares[0], *splits(folder), stream, *in_float64(folder, 2), *before),
        *session(3, legs[2]),
        *session(4, shares[1]),
        *session(5, legs[3], *after, first),
        *session(6, first_again, second),
        *session(7, second_again),
        *session(8, legs[4]),
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of all jobs, in one launch."""
    folder = tmp_path_factory.mktemp("several")
    (folder / "jobs.json").write_text(json.dumps(all_jobs(folder)))
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, str(Path(__file__).with_name("several.py")), str(folder / "jobs.json")]
    subprocess.run(command, env=environment, check=True, timeout=600)
    return folder


def statuses(runs, name):
    """Of the processes of a job that ended by themselves, and what the first one said."""
    return [int(file.read_text()) for file in sorted(runs.glob(f"{name}-?.status"))], (runs / f"{name}-0.txt").read_text()


def losses(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows}


def facts(runs, name):
    return [json.loads((runs / f"{name}-{rank}.json").read_text()) for rank in range(2)]


LEGS = [f"leg-{number}" for number in range(1, 6)]
SPLITS = ["whole", "resumed", "replicas", "accumulated", "settings", "bf16", "lora-fsdp", "lora-ddp"]
OTHERS = ["alone", "stream", "double-1", "double-2", "passes-1", "passes-2"]


@pytest.mark.parametrize("name", [*LEGS, *SPLITS, *OTHERS])
def test_runs_end(runs, name):
    found, told = statuses(runs, name)
    assert found and set(found) == {0}, told[-2000:]


def test_any_number_of_processes_and_either_strategy_go_on_from_a_checkpoint(runs):
    relayed, alone = losses(runs / "relay"), losses(runs / "alone")
    assert list(relayed) == list(alone) == list(range(1, LONG + 1))
    assert max(abs(relayed[step] - alone[step]) for step in alone) < 1e-4
    (found, _), (expected, _) = (load_checkpoint(runs / name / f"checkpoint-{LONG}") for name in ("relay", "alone"))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-3 if "moment" not in name else torch.inf)


@pytest.mark.parametrize("name, steps", [("double", 30), ("passes", 6)])
def test_two_processes_train_as_one_with_twice_the_batch(runs, name, steps):
    """
    In float64: sums in another order differ by 1e-16, and 30 steps amplify that by less than 1e6. Losses are logged in float32,
    after the sum of a step and the mean of two: three roundings of 2⁻²⁴.
    """
    one, two = (losses(runs / f"{name}-{world}") for world in (1, 2))
    assert list(two) == list(one) == list(range(1, steps + 1))
    assert two == {step: pytest.approx(loss, rel=3 * 2**-24) for step, loss in one.items()}
    (first, _), (second, _) = (load_checkpoint(runs / f"{name}-{world}" / f"checkpoint-{steps}") for world in (1, 2))
    averages = [key for key in first if key.startswith("average")]
    assert {first[key].dtype for key in averages} == {torch.float64}
    for key in averages:
        torch.testing.assert_close(second[key], first[key], rtol=0, atol=1e-10)


def test_split_weights_resume_bit_equal(runs):
    assert losses(runs / "resumed").keys() == {5, 6, 7, 8}
    assert_same_checkpoints(runs / "resumed", runs / "whole")
    files = [file.name for file in sorted((runs / "whole" / "checkpoint-8").iterdir())]
    assert len([name for name in files if name.endswith(".safetensors")]) == 2, "each process writes its shard"
    assert {Path(name).suffix for name in files} == {".safetensors", ".json"}


@pytest.mark.parametrize("name", ["replicas", "accumulated", "settings"])
def test_split_weights_learn_what_whole_ones_do(runs, name):
    found, expected = losses(runs / "whole"), losses(runs / name)
    assert list(found) == list(range(1, STEPS + 1))
    if name == "accumulated":  # timesteps are stratified in each micro-batch
        assert found[1] != expected[1] and all(0 < loss < 3 for loss in expected.values())
    else:
        assert found == pytest.approx(expected, abs=1e-5)


def test_the_pipeline_and_the_grids_have_the_gathered_averages(runs):
    tensors, _ = load_checkpoint(runs / "whole" / "checkpoint-8")
    for part, folder in (("unet", "unet/diffusion_pytorch_model"), ("text_encoder", "text_encoder/model")):
        saved = load_file(runs / "whole" / "pipeline" / f"{folder}.safetensors")
        names = [name for name in tensors if name.startswith(f"average.{part}.")]
        assert names and all(torch.equal(saved[name.removeprefix(f"average.{part}.")], tensors[name]) for name in names)
    grids = [torch.frombuffer(bytearray(pixels(runs / name)), dtype=torch.uint8).float() for name in ("whole", "replicas")]
    assert grids[0].std() > 10 and (grids[0] - grids[1]).abs().max() <= 2


def pixels(folder):
    from PIL import Image

    with Image.open(folder / "sample-000008.png") as image:
        return image.tobytes()


def test_what_the_launch_says_is_done(runs):
    for rank in range(2):
        assert facts(runs, "whole")[rank]["split"] == [
            "FSDPAtlasUNetBlock", "FSDPBasicTransformerBlock", "FSDPCLIPEncoderLayer", "FSDPCLIPTextEmbeddings", "FSDPLearner",
            "FSDPResnetBlock2D",
        ]  # fmt: skip
        changed, half = facts(runs, "settings")[rank], facts(runs, "bf16")[rank]
        assert changed["split"] == [
            "FSDPBasicTransformerBlock", "FSDPCLIPEncoderLayer", "FSDPCheckpointWrapper", "FSDPLearner",
        ]  # fmt: skip
        assert changed["checkpointed"] > 0 == facts(runs, "whole")[rank]["checkpointed"]
        assert half["precision"] == "bf16" and half["dtypes"] == ["torch.float32"]
    exact, rounded = losses(runs / "whole"), losses(runs / "bf16")
    assert 0 < max(abs(exact[step] - rounded[step]) for step in exact) < 0.05


def test_a_process_holds_its_share_of_weights_averages_and_moments(runs):
    split, replicas = facts(runs, "whole"), facts(runs, "replicas")
    assert max(fact["bytes"] for fact in split) < 0.65 * replicas[0]["bytes"]


def test_adapters_of_split_weights_are_those_of_whole_ones(runs):
    files = (runs / f"lora-{name}" / "lora" / "pytorch_lora_weights.safetensors" for name in ("fsdp", "ddp"))
    found, expected = map(load_file, files)
    assert found.keys() == expected.keys() and max(value.abs().max() for value in found.values()) > 0.01
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-4)


@pytest.mark.parametrize("moment", BROKEN)
def test_a_process_that_fails_ends_the_run_and_the_next_one_goes_on_from_the_last_checkpoint(runs, moment):
    name, step = moment.replace(" ", "-"), BROKEN[moment]
    found, told = statuses(runs, name)
    told = [line for line in told.splitlines() if line.startswith("train.py: ")]
    assert len(told) == 1, statuses(runs, name)[1][-2000:]
    if moment == "kill":
        assert found == [2] and "another process of the run ended" in told[0]
    elif moment == "interrupt":
        assert found == [130, 130] and "stopped by SIGINT after step" in told[0]
    else:
        assert found == [2, 2] and f"checkpoint-{step} could not be written: process " in told[0]
    assert set(statuses(runs, f"{name}-again")[0]) == {0}, statuses(runs, f"{name}-again")[1][-2000:]
    first = min(losses(runs / name))
    assert first == 1 and list(losses(runs / name)) == list(range(1, STEPS + 1))
    assert_same_checkpoints(runs / name, runs / "whole")
    assert not list((runs / name).glob(".checkpoint*")) and len(checkpoints(runs / name)) >= 4


@pytest.mark.parametrize("name", ["replicas", "stream"])
def test_two_killed_processes_end_bit_equal(runs, name):
    folder = runs / f"killed-{name}"
    assert not list(runs.glob(f"killed-{name}-?.status")), "they were killed"
    found, told = statuses(runs, f"killed-{name}-again")
    assert found == [0, 0], told[-2000:]
    going = [line for line in told.splitlines() if "from step " in line]
    assert going and 2 <= int(going[-1].split("from step ")[1].split(":")[0]) < STEPS
    assert_same_checkpoints(folder, runs / name)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1)), "only one process writes, and no row is there twice"


def test_processes_with_different_recipes_are_found_out(runs):
    found, told = statuses(runs, "odd")
    assert found == [2, 2] and "processes 0 and 1 have different recipes: seed 0 and 7" in told
    assert not (runs / "odd").exists()


def shared(runs, world):
    return [load_file(runs / f"shares-{world}-{rank}.safetensors") for rank in range(world)]


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_a_plan_and_its_pairs(runs, world):
    x, y = several.couplings().values()
    found = shared(runs, world)
    expected = entropic_transport(x, y, 0.3, tolerance=1e-9).plan
    plan = torch.cat([each["plan"] for each in found], 1)
    torch.testing.assert_close(plan, expected, rtol=0, atol=1e-6 * expected.max().item())
    assert torch.equal(torch.cat([each["pairs"] for each in found]), sinkhorn_pairs(x, y, 0.02, seeded(), True, 1e-7))
    error = (runs / f"shares-{world}-0.txt").read_text()
    assert f"every process must hold as many columns as the others, got {36 - world + 1} to 36" in error


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_what_is_computed_once(runs, world):
    """Shards of two rows of a cache, rows of an evaluation, noise of a fit, and files of references."""
    found, problem = shared(runs, world), several.couplings()
    assert [len(each["made"]) for each in found] == [len(range(rank, 5, world)) for rank in range(world)]
    potentials = SemidiscreteCoupling(problem["y"].float()).fit(samples=20).potentials
    for each in found:
        size = -(-5 // world)
        assert each["cached"].item() == 9 and each["rows"].tolist() == [[i, i // size] for i in range(5)]
        torch.testing.assert_close(each["potentials"], potentials, rtol=0, atol=1e-5)
        bridge = SchrodingerBridgeSolver(problem["y"], tolerance=1e-9)
        torch.testing.assert_close(each["references"], bridge.couple(problem["x"], 0.6, 0.8).data, rtol=0, atol=1e-7)


def test_a_missing_shard_is_named(runs, tmp_path):
    path = tmp_path / "checkpoint-8"
    shutil.copytree(runs / "whole" / "checkpoint-8", path)
    lost = sorted(path.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(OSError, match=rf"checkpoint-8 is damaged: {lost.name} is missing; give resume: newest_complete"):
        load_checkpoint(path)
