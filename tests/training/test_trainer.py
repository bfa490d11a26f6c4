"""The loop: it learns, it resumes exactly, it writes what a pipeline needs and nothing else."""

import copy
import importlib.util
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from conftest import seeded

from atlas_diffusers import AtlasDDIMScheduler, AtlasPipeline, AtlasUNet2DModel
from atlas_diffusers.config import TrainingConfig, validate
from atlas_diffusers.training import (
    Trainer,
    families,
    latest_checkpoint,
    load_checkpoint,
    objectives,
    outputs,
    processes,
    sections,
    trainer,
)
from atlas_diffusers.training.checkpoints import checkpoints

ROOT = Path(__file__).parents[2]

RECIPE = {
    "dataset": {
        "name": "embedded:emoji",
        "split": "train",
        "categories": ["Activities"],
        "aliases_column": "aliases",
        "resolution": 32,
        "random_flip": True,
    },
    "model": {
        "base_channels": 8,
        "channel_mult": [1, 2],
        "num_res_blocks": 1,
        "attention_levels": [1],
        "cross_attention_levels": [1],
        "num_heads": 2,
        "addition_embed_type": "text",
        "patch_size": 2,
        "norm_num_groups": 4,
    },
    "text_encoder": {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "max_length": 8, "vocab_size": 560},
    "scheduler": {
        "_class_name": "AtlasDDIMScheduler",
        "beta_schedule": "cosine",
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
    },
    "batch_size": 8,
    "max_steps": 8,
    "learning_rate": 3e-3,
    "warmup_steps": 2,
    "ema_decay": 0.9,
    "min_snr_gamma": 5.0,
    "log_interval": 1,
    "checkpoint_interval": 4,
}


def recipe(folder, **changes):
    data = copy.deepcopy(RECIPE) | {"output_dir": str(folder)}
    for key, value in changes.items():
        data[key] = {**data.get(key, {}), **value} if isinstance(value, dict) and key != "scheduler" else value
    return data


def build(folder, **changes):
    return Trainer(validate(TrainingConfig, recipe(folder, **changes)))


def interrupt_at(monkeypatch, step):
    """Make training stop, as by a signal, when ``step`` is logged."""
    log = Trainer._log

    def interrupted(self, recorder, loss):
        if self.step == step:
            raise KeyboardInterrupt
        log(self, recorder, loss)

    monkeypatch.setattr(Trainer, "_log", interrupted)


def final_state(folder):
    return load_checkpoint(latest_checkpoint(Path(folder)))


def assert_same_checkpoints(first, second):
    (found, state), (expected, expected_state) = final_state(first), final_state(second)
    for each in (state, expected_state):
        # datasets counts the place in a stream from where it was last opened
        each["streams"] = each["streams"] and [{**s, "stream": None} for s in each["streams"]]
    assert state == expected_state
    assert found.keys() == expected.keys()
    different = [name for name, value in expected.items() if not torch.equal(found[name], value)]
    assert not different, f"{len(different)} of {len(expected)} tensors differ: {different[:5]}"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of 8 steps that nothing interrupted."""
    run = build(tmp_path_factory.mktemp("finished"))
    run.train()
    return run


def test_training_starts_from_another_pipelines_weights(finished, tmp_path):
    saved = finished.folder / "pipeline"
    data = {**recipe(tmp_path), "init_from": str(saved)}
    text_encoder = data.pop("text_encoder")
    with pytest.raises(ValueError, match="init_from or model, not both"):
        validate(TrainingConfig, data)
    with pytest.raises(ValueError, match="init_from or text_encoder, not both"):
        validate(TrainingConfig, {**data, "model": {}, "text_encoder": text_encoder})
    run = Trainer(validate(TrainingConfig, {**data, "model": {}}))
    average = finished.ema.shadow_params
    assert all(torch.equal(p, q) for p, q in zip(run.parameters, average)) and run.step == 0
    assert run.components.tokenizer.get_vocab() == finished.components.tokenizer.get_vocab()


def test_the_loss_of_a_fixed_batch_falls(tmp_path):
    run = build(tmp_path, max_steps=30, checkpoint_interval=30, learning_rate=5e-3, log_interval=30)
    items = [run.dataset[i, i] for i in range(16)]
    batch = {"pixels": torch.stack([i["pixels"] for i in items]), "text": [i["text"] for i in items]}
    batch["draw"] = torch.arange(16)

    @torch.no_grad()
    def loss():
        return run.objective(batch, seeded()).item()

    before = loss()
    run.train()
    assert loss() < 0.85 * before


def test_training_leaves_the_global_random_states_alone(tmp_path):
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    run = build(tmp_path, max_steps=1)
    assert torch.equal(torch.get_rng_state(), states[0]), "building a Trainer draws from the global generator"
    run.train()
    assert torch.equal(torch.get_rng_state(), states[0]), "train() draws from the global generator"
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]


@pytest.mark.parametrize("changes", [{}, {"model": {"dropout": 0.2}}], ids=["plain", "dropout"])
def test_the_global_random_state_does_not_decide_the_weights(tmp_path, changes):
    for seed in (1, 2):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            build(tmp_path / str(seed), max_steps=2, **changes).train()
    assert_same_checkpoints(tmp_path / "1", tmp_path / "2")


def test_seeds_give_different_networks(tmp_path):
    first, second = (build(tmp_path / str(seed), seed=seed) for seed in (0, 1))
    weight = "conv_in.weight"
    assert not torch.equal(first.networks["unet"].state_dict()[weight], second.networks["unet"].state_dict()[weight])


def test_a_resumed_run_ends_bit_equal(tmp_path, monkeypatch, finished):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, 6)
        build(tmp_path).train()
    assert latest_checkpoint(tmp_path).name == "checkpoint-4"
    resumed = build(tmp_path)
    assert resumed.step == 4
    resumed.train()
    assert_same_checkpoints(tmp_path, finished.folder)
    for p, q in zip(resumed.parameters, finished.parameters):
        assert torch.equal(p, q)


@pytest.mark.parametrize(
    "changes",
    [
        {"lr_scheduler": "linear", "dataset": {"num_workers": 1}},
        {"lr_scheduler": "constant_with_warmup", "micro_batch_size": 4, "weight_decay": 0.1, "model": {"dropout": 0.2}},
        {"coupling": "sinkhorn", "offset_noise": 0.1, "min_snr_gamma": None, "p2_gamma": 1.0},
        {"optimizer": "muon", "weight_decay": 0.1},
    ],
    ids=["workers", "accumulation-dropout", "coupling", "muon"],
)
def test_resuming_is_exact_whatever_the_recipe(tmp_path, monkeypatch, changes):
    changes = {"max_steps": 3, "checkpoint_interval": 1, **changes}
    build(tmp_path / "whole", **changes).train()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, 2)
        build(tmp_path / "parts", **changes).train()
    build(tmp_path / "parts", **changes).train()
    assert_same_checkpoints(tmp_path / "parts", tmp_path / "whole")


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    build(tmp_path, max_steps=2).train()
    before, _ = final_state(tmp_path)
    again = build(tmp_path, max_steps=2)
    assert again.step == 2
    again.train()
    after, _ = final_state(tmp_path)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_fresh_run_does_not_touch_a_used_folder(tmp_path):
    build(tmp_path, max_steps=2, checkpoint_interval=2).train()
    with pytest.raises(ValueError, match="resume is false, but .*checkpoint-2 exists"):
        build(tmp_path, max_steps=2, resume=False)
    assert latest_checkpoint(tmp_path).name == "checkpoint-2"


def first_gradients(monkeypatch, folder, **changes):
    """Gradients of the first optimiser step, and the captions it saw, with the noise of every picture fixed by the picture."""
    seen = []

    def loss(self, batch, generator):
        pixels = batch["pixels"]
        seen.extend(pixels)
        timesteps = (pixels.flatten(1).double().sum(1).abs() * 1000).long() % 1000
        ids = families.tokenize(self.tokenizer, [""] * len(pixels))
        output = self.wrapped["unet"](pixels, timesteps, self.wrapped["text_encoder"](ids).last_hidden_state).sample
        return (output - pixels).square().mean()

    changes = {"max_steps": 1, "warmup_steps": 0, "weight_decay": 0.0, "gradient_clip_norm": 1e9, **changes}
    run = build(folder, **changes)
    with monkeypatch.context() as patch:
        patch.setattr(objectives.Denoising, "__call__", loss)
        run.train()
    moments = [run.optimizer.state_dict()["state"][i]["exp_avg"] for i in range(len(run.parameters))]
    return [moment / (1 - 0.9) for moment in moments], torch.stack(seen), run


def test_micro_batches_add_up_to_the_gradient_of_the_whole_batch(tmp_path, monkeypatch):
    whole, pictures, _ = first_gradients(monkeypatch, tmp_path / "whole")
    parts, same_pictures, run = first_gradients(monkeypatch, tmp_path / "parts", micro_batch_size=2)
    assert torch.equal(pictures, same_pictures)
    norm = math.sqrt(sum(g.square().sum().item() for g in whole))
    error = math.sqrt(sum((g - h).square().sum().item() for g, h in zip(whole, parts)))
    assert norm > 0.01 and error < 1e-5 * norm
    assert run.ema.optimization_step == run.lr_scheduler.last_epoch == 1


def test_gradient_checkpointing_gives_the_same_gradient(tmp_path, monkeypatch):
    plain, _, _ = first_gradients(monkeypatch, tmp_path / "plain")
    cheap, _, _ = first_gradients(monkeypatch, tmp_path / "cheap", gradient_checkpointing=True)
    for g, h in zip(plain, cheap):
        torch.testing.assert_close(g, h, rtol=1e-5, atol=1e-7)


def test_the_gradient_norm_is_clipped(tmp_path, monkeypatch):
    gradients, _, _ = first_gradients(monkeypatch, tmp_path, gradient_clip_norm=0.01)
    assert math.sqrt(sum(g.square().sum().item() for g in gradients)) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize(
    "name, rate",
    [
        ("cosine", lambda k: 0.5 * (1 + math.cos(math.pi * (k - 2) / 6))),
        ("linear", lambda k: (8 - k) / 6),
        ("constant_with_warmup", lambda k: 1.0),
    ],
)
def test_the_learning_rate_follows_the_recipe(tmp_path, monkeypatch, name, rate):
    def step(self, batches):
        self.optimizer.step()
        self.lr_scheduler.step()
        return torch.zeros(())

    monkeypatch.setattr(Trainer, "_optimizer_step", step)
    monkeypatch.setattr(Trainer, "save_checkpoint", lambda self: None)
    monkeypatch.setattr(trainer, "save_result", lambda *arguments: None)
    monkeypatch.setattr(trainer, "write_card", lambda *arguments: None)
    build(tmp_path, lr_scheduler=name).train()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 9))
    expected = [3e-3 * (k / 2 if k < 2 else rate(k)) for k in range(1, 9)]
    assert [row["lr"] for row in rows] == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_the_average_is_the_recursion_of_the_weights(tmp_path):
    run = build(tmp_path, max_steps=3, ema_decay=0.5)
    averages = [p.detach().clone() for p in run.parameters]
    batches = iter(run._loader())
    for step in range(1, 4):
        run._optimizer_step(batches)
        run.step += 1
        # diffusers' warm-up, (1 − (1 + k)^−0.75) with k counted from 0, capped at ema_decay
        decay = min(0.5, 1 - step**-0.75)
        averages = [decay * a + (1 - decay) * p.detach() for a, p in zip(averages, run.parameters)]
    for average, expected in zip(run.ema.shadow_params, averages):
        torch.testing.assert_close(average, expected, rtol=1e-5, atol=1e-6)


def test_the_saved_pipeline_is_the_averaged_network(finished):
    with torch.random.fork_rng():
        loaded = AtlasPipeline.from_pretrained(finished.folder / "pipeline")
    kept = [p.detach().clone() for p in finished.parameters]
    finished.ema.copy_to(finished.parameters)
    own = outputs.build_pipeline(finished.config, finished.components, finished.networks)
    images = []
    for pipeline in (loaded, own):
        pipeline.unet.eval(), pipeline.text_encoder.eval()
        pipeline.to(torch.float64).set_progress_bar_config(disable=True)
        images.append(pipeline("a red ball", num_inference_steps=3, generator=seeded(), output_type="np").images)
    own.to(torch.float32)
    for p, weight in zip(finished.parameters, kept):
        p.data.copy_(weight)
    # one network is stored channels-last, the other is not
    np.testing.assert_allclose(*images, rtol=0, atol=1e-7)
    assert images[0].shape == (1, 32, 32, 3) and images[0].std() > 0.01
    shadow = dict(zip((id(p) for p in finished.parameters), finished.ema.shadow_params))
    for name, p in finished.networks["unet"].named_parameters():
        assert torch.equal(loaded.unet.state_dict()[name], shadow[id(p)])
    assert dict(loaded.scheduler.config)["prediction_type"] == "v_prediction"
    assert loaded.config.default_guidance_scale == 3.0 and loaded.config.default_num_inference_steps == 25


def test_the_output_folder_holds_no_pickles(finished):
    files = [path for path in finished.folder.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".jsonl", ".txt", ".png", ".md"}
    names = {str(path.relative_to(finished.folder)) for path in files}
    assert {"recipe.json", "metrics.jsonl", "pipeline/model_index.json", "checkpoint-8/state.json"} <= names
    index = json.loads((finished.folder / "pipeline" / "model_index.json").read_text())
    assert index["unet"] == ["atlas_diffusers", "AtlasUNet2DModel"]


def test_the_written_recipe_reads_back(finished):
    data = json.loads((finished.folder / "recipe.json").read_text())
    assert validate(TrainingConfig, data) == finished.config


def test_a_sample_grid_does_not_disturb_training(tmp_path, finished):
    run = build(tmp_path, sample_interval=3, sample_prompts=["ball"], sample_steps=2)
    run.train()
    assert sorted(path.name for path in tmp_path.glob("sample-*.png")) == ["sample-000003.png", "sample-000006.png"]
    assert_same_checkpoints(tmp_path, finished.folder)


def poison(monkeypatch, step):
    plain = objectives.denoising_loss
    calls = []

    def poisoned(*arguments):
        calls.append(1)
        return plain(*arguments) * (math.nan if len(calls) >= step else 1)

    monkeypatch.setattr(objectives, "denoising_loss", poisoned)


def test_a_loss_that_is_no_number_stops_the_run(tmp_path, monkeypatch):
    poison(monkeypatch, 4)
    with pytest.raises(FloatingPointError, match="step 4"):
        build(tmp_path, checkpoint_interval=2).train()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2"]


@pytest.mark.parametrize("max_steps, log_interval", [(8, 100), (8, 8), (3, 2)])
def test_no_checkpoint_is_ever_written_with_weights_that_are_no_numbers(tmp_path, monkeypatch, max_steps, log_interval):
    poison(monkeypatch, 3)
    with pytest.raises(FloatingPointError):
        build(tmp_path, max_steps=max_steps, checkpoint_interval=2, log_interval=log_interval).train()
    assert latest_checkpoint(tmp_path).name == "checkpoint-2"
    assert all(torch.isfinite(value).all() for value in final_state(tmp_path)[0].values())
    assert not (tmp_path / "pipeline").exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model": {"base_channels": 16}}, r"of another shape unet.time_embedding.linear_1.weight \(32, 8\) instead of"),
        ({"model": {"num_res_blocks": 2}}, r"it lacks unet.down_blocks.0.1.resnet.norm1.weight"),
        (
            {"text_encoder": None, "model": {"cross_attention_levels": [], "addition_embed_type": None}},
            r"it has besides text_encoder.embeddings.position_embedding.weight, .* and \d+ more",
        ),
    ],
    ids=["wider", "deeper", "without text"],
)
def test_a_checkpoint_of_another_architecture_is_refused(tmp_path, finished, changes, message):
    shutil.copytree(latest_checkpoint(finished.folder), tmp_path / "checkpoint-1")
    with pytest.raises(ValueError, match=f"checkpoint-1 does not fit this recipe: .*{message}"):
        build(tmp_path, max_steps=1, **changes)


def test_training_without_text(tmp_path):
    changes = {
        "text_encoder": None,
        "dataset": {"caption_column": None, "aliases_column": None},
        "model": {"cross_attention_levels": [], "addition_embed_type": None},
    }
    folder = build(tmp_path, max_steps=2, **changes).train()
    pipeline = AtlasPipeline.from_pretrained(folder)
    assert pipeline.text_encoder is None and pipeline.tokenizer is None
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(num_images_per_prompt=2, num_inference_steps=2, generator=seeded(), output_type="np").images
    assert images.shape == (2, 32, 32, 3) and np.isfinite(images).all()


def test_caption_dropout_replaces_captions_by_nothing(tmp_path, monkeypatch):
    texts = []
    plain = families.tokenize
    monkeypatch.setattr(families, "tokenize", lambda tokenizer, batch: (texts.extend(batch), plain(tokenizer, batch))[1])
    run = build(tmp_path, caption_dropout=0.3)
    batch = {"pixels": torch.zeros(400, 3, 4, 4), "text": ["caption"] * 400, "draw": torch.arange(400)}
    with torch.no_grad():
        run.objective(batch, seeded())
    assert set(texts) == {"caption", ""}
    assert abs(texts.count("") / 400 - 0.3) < 5 * (0.3 * 0.7 / 400) ** 0.5


def test_scheduler_from_dict():
    scheduler = sections.scheduler_from_dict({"beta_schedule": "cosine", "num_train_timesteps": 50})
    assert type(scheduler) is AtlasDDIMScheduler and len(scheduler) == 50
    assert scheduler.config.beta_schedule == "squaredcos_cap_v2"
    with pytest.raises(ValueError, match="'DDIMScheduler' is unknown.*AtlasDDIMScheduler"):
        sections.scheduler_from_dict({"_class_name": "DDIMScheduler"})


def test_an_empty_dataset_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no pictures in split 'train'"):
        build(tmp_path, dataset={"categories": []})


# ---------------------------------------------------------------------- training/train.py


@pytest.fixture
def main(monkeypatch):
    spec = importlib.util.spec_from_file_location("train_script", ROOT / "training" / "train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
        return module.main()

    return run


def test_a_killed_run_started_again_ends_bit_equal(tmp_path, main):
    changes = {"max_steps": 16, "checkpoint_interval": 2, "batch_size": 4}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe(tmp_path / "elsewhere", **changes)))
    arguments = ("--config", tmp_path / "recipe.yaml", "--output_dir", tmp_path / "killed")
    command = [sys.executable, str(ROOT / "training" / "train.py"), *map(str, arguments)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while latest_checkpoint(tmp_path / "killed") is None and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert 2 <= load_checkpoint(latest_checkpoint(tmp_path / "killed"))[1]["step"] < 16
    assert main(*arguments) == 0
    build(tmp_path / "whole", **changes).train()
    assert_same_checkpoints(tmp_path / "killed", tmp_path / "whole")


def test_the_script_applies_overrides(tmp_path, main, capsys):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe(tmp_path / "run")))
    arguments = ("--max_steps", "2", "--model.num_res_blocks=2", "--checkpoint_interval", "1", "--scheduler.beta_end", "2e-2")
    assert main("--config", tmp_path / "recipe.yaml", *arguments) == 0
    assert capsys.readouterr().out == f"pipeline: {tmp_path / 'run' / 'pipeline'}\n"
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-1", "checkpoint-2"]
    config = AtlasUNet2DModel.load_config(tmp_path / "run" / "pipeline" / "unet")
    assert config["num_res_blocks"] == 2
    config = AtlasDDIMScheduler.load_config(tmp_path / "run" / "pipeline" / "scheduler")
    assert config["beta_end"] == 0.02


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--max_step", "2"], "max_step: unknown key, did you mean 'max_steps'?"),
        (["--max_steps"], "expected --key value, got '--max_steps'"),
        (["--dataset.categories", "[Plants]"], "categories ['Plants'] are unknown"),
        (["--dataset.categories", "[Plants"], "dataset.categories"),
        (["--scheduler._class_name", "Nothing"], "scheduler._class_name='Nothing' is unknown"),
        (["--model.num_heads", "3"], "not divisible by num_heads=3"),
    ],
)
def test_the_script_reports_mistakes_in_one_line(tmp_path, main, capsys, arguments, message):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe(tmp_path / "run")))
    assert main("--config", tmp_path / "recipe.yaml", *arguments) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("train.py: ") and message in error


def test_the_script_reports_a_missing_recipe(tmp_path, main, capsys):
    assert main("--config", tmp_path / "nowhere.yaml") == 2
    assert "nowhere.yaml" in capsys.readouterr().err


# ---------------------------------------------------------------------- what a launch says


@pytest.mark.parametrize(
    "state, environment, message",
    [
        ({"distributed_type": "DEEPSPEED"}, {}, "DeepSpeed is not supported: use FSDP, as `accelerate launch --use_fsdp"),
        ({}, {"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed is not supported: use FSDP"),
        ({"distributed_type": "MEGATRON_LM"}, {}, "Megatron-LM is not supported: use FSDP"),
        ({"distributed_type": "FSDP", "is_fsdp2": False}, {}, "version 1 of FSDP is not supported"),
        ({"distributed_type": "MULTI_CPU"}, {"ACCELERATE_USE_FSDP": "true"}, "which Accelerate leaves aside .MULTI_CPU."),
        ({"distributed_type": "FSDP"}, {"FSDP_OFFLOAD_PARAMS": "true"}, "FSDP_OFFLOAD_PARAMS at the launch, but the weights"),
        ({"gradient_accumulation_steps": 4}, {}, "gradient_accumulation_steps=4 at the launch: give micro_batch_size"),
        ({}, {"ACCELERATE_MIXED_PRECISION": "fp16"}, "mixed_precision='bf16' in the recipe, but 'fp16' at the launch"),
    ],
)  # fmt: skip
def test_what_a_launch_says_and_cannot_run_is_refused_before_the_data_are_read(
    tmp_path, monkeypatch, state, environment, message
):
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    launched = {"distributed_type": "MULTI_GPU", "is_fsdp2": True, "gradient_accumulation_steps": 1, **state}
    kind, device = DistributedType(launched.pop("distributed_type")), torch.device("cpu")
    found = SimpleNamespace(distributed_type=kind, device=device, **launched)
    monkeypatch.setattr(processes, "Accelerator", lambda **given: found)
    monkeypatch.setattr(trainer, "load_pictures", lambda *arguments: pytest.fail("the data were read"))
    with pytest.raises(ValueError, match=message):
        build(tmp_path, mixed_precision="bf16")


def test_half_precision_without_effect_is_said(tmp_path, monkeypatch):
    texts = []
    monkeypatch.setattr(processes.logger, "warning", texts.append)
    AcceleratorState._reset_state()
    try:
        assert build(tmp_path, mixed_precision="fp16").accelerator.scaler is None
    finally:
        AcceleratorState._reset_state()
    assert texts == ["mixed_precision='fp16' has no effect on a CPU, which computes in float32: 'bf16' has one"]


def test_precision_is_that_of_the_launch_where_the_recipe_says_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    AcceleratorState._reset_state()
    try:
        run = build(tmp_path)
        assert run.accelerator.mixed_precision == run.config.mixed_precision == "bf16"
    finally:
        AcceleratorState._reset_state()


# ---------------------------------------------------------------------- what is wrong before the first step

NO_TEXT = {"cross_attention_levels": [], "addition_embed_type": None}
UNREAD = {"model": NO_TEXT, "text_encoder": None, "dataset": {"caption_column": None, "aliases_column": None}}
BALL = {"sample_interval": 9, "sample_prompts": ["ball"]}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model": {"base_chanels": 8}}, "model.base_chanels: unknown key, did you mean 'base_channels'?"),
        ({"model": {"base_channels": "wide"}}, "model: "),
        ({"scheduler": {"bogus": 1}}, "scheduler.bogus: unknown key"),
        ({"scheduler": {"beta_shedule": "cosine"}}, "scheduler.beta_shedule: unknown key, did you mean 'beta_schedule'?"),
        ({"model": NO_TEXT}, "the network does not read captions: give model."),
        ({"model": NO_TEXT, "text_encoder": None, **BALL}, "sample_prompts=['ball'], but"),
        ({**UNREAD, "caption_dropout": 0.2}, "caption_dropout=0.2: not read without captions or labels"),
    ],
    ids=["model key", "model value", "scheduler key", "near key", "captions unread", "prompts unread", "nothing to drop"],
)  # fmt: skip
def test_mistakes_are_found_before_the_first_step(tmp_path, changes, message):
    with pytest.raises(ValueError) as error:
        build(tmp_path, **changes)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_recipe_is_utf_8_whatever_the_locale(tmp_path):
    """In a process whose preferred encoding is ASCII."""
    (tmp_path / "recipe.yaml").write_text(
        yaml.safe_dump(recipe(tmp_path / "run", max_steps=1, sample_interval=9, sample_prompts=["漢字"]), allow_unicode=True),
        encoding="utf-8",
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, str(ROOT / "training" / "train.py"), "--config", str(tmp_path / "recipe.yaml")]
    result = subprocess.run(command, env=environment, capture_output=True, timeout=150)
    assert result.returncode == 0, result.stderr[-2000:]
    for file in (tmp_path / "run" / "recipe.json", tmp_path / "run" / "pipeline" / "recipe.json"):
        assert json.loads(file.read_bytes().decode("utf-8"))["sample_prompts"] == ["漢字"]


def test_dropout_differs_between_processes_that_have_the_same_pictures(tmp_path, monkeypatch):
    """The same batch in the place of either of two processes: without dropout the same gradient, with it another."""

    def moments(rank, dropout):
        run = build(tmp_path / f"{rank}-{dropout}", max_steps=1, model={"dropout": dropout})
        batch = torch.utils.data.default_collate([run.dataset[i, i] for i in range(8)])
        with monkeypatch.context() as patch:
            patch.setattr(type(run.accelerator), "num_processes", 2)
            patch.setattr(type(run.accelerator), "process_index", rank)
            patch.setattr(objectives.Objective, "_timesteps", lambda self, count, generator: torch.arange(count) * 100)
            run._optimizer_step(iter([batch]))
        return torch.cat([run.optimizer.state_dict()["state"][i]["exp_avg"].flatten() for i in range(len(run.parameters))])

    first, second = (moments(rank, 0.5) for rank in (0, 1))
    assert (first - second).norm() > 0.1 * first.norm()
    plain = [moments(rank, 0.0) for rank in (0, 1)]
    assert torch.equal(*plain) and plain[0].norm() > 0


def test_networks_train_on_after_a_sample_grid(tmp_path, monkeypatch):
    """Dropout is off in the grid and on again afterwards: the modes are what they were."""
    run = build(tmp_path, model={"dropout": 0.2})
    before = {name: module.training for name, module in run.components.unet.named_modules()}
    with run.averaged() as trained:
        assert not any(module.training for network in trained.values() for module in network.modules())
    assert {name: module.training for name, module in run.components.unet.named_modules()} == before and all(before.values())
    assert run.components.text_encoder.training
    build(tmp_path / "grids", max_steps=3, sample_interval=1, sample_steps=1, model={"dropout": 0.2}).train()
    build(tmp_path / "none", max_steps=3, model={"dropout": 0.2}).train()
    assert_same_checkpoints(tmp_path / "grids", tmp_path / "none")
