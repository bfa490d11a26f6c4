"""Blocks of the original systems' documents about training and configuration, verbatim but for the package's name."""

import json
import runpy

import pytest
import torch
import yaml
from PIL import Image

from atlas_diffusers import AtlasPipeline
from atlas_diffusers.config import DatasetConfig, TrainingConfig, merge, presets, validate
from atlas_diffusers.examples import run_training, training_pipeline
from atlas_diffusers.system import AdvancedDiffusionSystem, BetaSchedule
from atlas_diffusers.training import PictureDataset, Trainer, load_training_data

GUIDE = {
    "model": """
from atlas.config import HighResModelConfig

model_cfg = HighResModelConfig(
    in_channels=4,
    out_channels=4,
    base_channels=192,
    channel_mult=(1, 2, 4, 4),
    num_res_blocks=2,
    attention_levels=(1, 2),
    conditional=True,
    context_dim=768,
)
""",
    "dataset": """
from atlas.config import DatasetConfig

dataset_cfg = DatasetConfig(
    name="celeba",
    root="./data/celeba",
    resolution=256,
    channels=3,
    center_crop=True,
    batch_size=16,
    download=True,
)
""",
    "training": """
from atlas.config import TrainingConfig

train_cfg = TrainingConfig(
    batch_size=32,
    micro_batch_size=8,
    learning_rate=2e-4,
    gradient_clip_norm=1.0,
    epochs=300,
    mixed_precision=True,
    log_interval=100,
    checkpoint_interval=5000,
)
""",
    "preset": """
from atlas.examples.training_pipeline import run_training

run_training(
    preset_name="experiment:celeba1024",
    dataset_root="./data/celeba",
    checkpoint_dir="./checkpoints/celeba",
    device="cuda",
)
""",
}
SYSTEM = """
linear_ddpm:
  num_train_timesteps: 1000
  beta_start: 0.0001
  beta_end: 0.02
  beta_schedule: "linear"
  clip_sample: true
  prediction_type: "epsilon"
  thresholding: false
  dynamic_thresholding_ratio: 0.995
  sample_max_value: 1.0
  timestep_spacing: "leading"
  steps_offset: 1
  use_clipped_model_output: true
  variance_type: "fixed_small"
  clip_sample_range: 1.0
  sample_padding_threshold: 0.0
  sample_padding_norm: 1.0

cosine_ddim:
  num_train_timesteps: 1000
  beta_start: 0.0001
  beta_end: 0.02
  beta_schedule: "cosine"
  clip_sample: true
  prediction_type: "epsilon"
  thresholding: false
  dynamic_thresholding_ratio: 0.995
  sample_max_value: 1.0
  timestep_spacing: "leading"
  steps_offset: 1
  use_clipped_model_output: true
  variance_type: "fixed_small"
  clip_sample_range: 1.0
  sample_padding_threshold: 0.0
  sample_padding_norm: 1.0
"""
LOADING = """
# Load from YAML
system = AdvancedDiffusionSystem("config.yaml")

# Load from JSON
system = AdvancedDiffusionSystem("config.json")

# Save current configuration
system.save_config("current_config.yaml")
"""


def run(block, **changes):
    code = block.replace("from atlas.", "from atlas_diffusers.")
    for old, new in changes.items():
        code = code.replace(old, new)
    exec(compile(code, "original", "exec"), scope := {})
    return scope


@pytest.fixture
def celeba(tmp_path, monkeypatch):
    """Six pictures without captions where the original's blocks look for them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "data" / "celeba").mkdir(parents=True)
    for i in range(6):
        Image.new("RGB", (40, 30), (40 * i, 0, 0)).save(tmp_path / "data" / "celeba" / f"{i}.png")
    return tmp_path


def test_a_network_is_configured_and_its_checkpointing_switched_on_afterwards():
    from atlas_diffusers.models import HighResLatentScoreModel

    model_cfg = run(GUIDE["model"])["model_cfg"]
    model_cfg.use_checkpointing = True
    model_cfg.base_channels = 32
    with torch.device("meta"):
        assert HighResLatentScoreModel(model_cfg).is_gradient_checkpointing
        model_cfg.use_checkpointing = False
        model = HighResLatentScoreModel(model_cfg)
    assert not model.is_gradient_checkpointing
    assert model.config.channel_mult == [1, 2, 4, 4] and model.config.cross_attention_dim == 768


def test_a_data_set_of_any_name_is_read_from_its_root(celeba):
    config = run(GUIDE["dataset"])["dataset_cfg"]
    assert isinstance(config, DatasetConfig) and config.name == "celeba"
    pictures = PictureDataset(load_training_data(config), config)
    assert len(pictures) == 6 and pictures[0, 0]["pixels"].shape == (3, 256, 256)
    shades = sorted(float(pictures[i, 0]["pixels"][0].mean()) for i in range(6))
    assert shades == pytest.approx([40 * i / 127.5 - 1 for i in range(6)], abs=1e-5)
    recipe = {"dataset": config.model_dump(), "text_encoder": None}
    assert validate(TrainingConfig, recipe).batch_size == 16
    assert validate(TrainingConfig, {**recipe, "batch_size": 16}).batch_size == 16
    with pytest.raises(ValueError, match="batch_size=8, but dataset.batch_size=16: give one of them"):
        validate(TrainingConfig, {**recipe, "batch_size": 8})


def test_hyperparameters():
    config = run(GUIDE["training"])["train_cfg"]
    assert (config.mixed_precision, config.epochs, config.max_steps) == ("fp16", 300, None)
    assert config.batch_size // config.micro_batch_size == 4
    assert TrainingConfig(mixed_precision=False).mixed_precision == "no"
    with pytest.raises(ValueError, match="mixed_precision"):
        TrainingConfig(mixed_precision="half")


def test_a_preset_is_trained(celeba, monkeypatch):
    """Two steps at reduced size, by another preset of the same name."""
    changes = {
        "max_steps": 2, "batch_size": 2, "micro_batch_size": 1, "num_resolutions": 1, "sample_interval": None,
        "model": {"base_channels": 8, "num_heads": 2, "norm_num_groups": 4, "channel_mult": [1, 2], "attention_levels": [1]},
        "dataset": {"resolution": 32, "num_workers": 0},
    }  # fmt: skip
    small = merge(presets.load_preset("experiment:celeba1024"), changes)
    monkeypatch.setitem(presets.PRESETS, "experiment:celeba1024", (TrainingConfig, small))
    with torch.random.fork_rng():
        run(GUIDE["preset"], cuda="cpu")
        pipeline = AtlasPipeline.from_pretrained("checkpoints/celeba/pipeline")
    recipe = json.loads((celeba / "checkpoints" / "celeba" / "recipe.json").read_text(encoding="utf-8"))
    assert recipe["dataset"]["root"] == "./data/celeba"
    assert recipe["gradient_checkpointing"] and recipe["mixed_precision"] == "no"
    assert (celeba / "checkpoints" / "celeba" / "checkpoint-2").is_dir()
    start = Trainer(validate(TrainingConfig, recipe | {"output_dir": "other"}), cpu=True)
    moved = {name: p - pipeline.unet.state_dict()[name] for name, p in start.components.unet.named_parameters()}
    assert all(torch.isfinite(each).all() for each in moved.values()) and moved["conv_in.weight"].abs().max() > 0


@pytest.mark.parametrize("name", ["cifar10", "imagenet64", "ffhq128", "lsun256", "celeba1024"])
def test_presets_are_trained_by_the_commands_of_the_original(celeba, monkeypatch, capsys, name):
    """python -m atlas.examples.NAME_training --data-root FOLDER, as far as the arguments of ``run_training``."""
    calls = []
    monkeypatch.setattr(training_pipeline, "run_training", lambda *arguments: (calls.append(arguments), "done")[1])
    file = f"atlas_diffusers.examples.{name}_training"
    monkeypatch.setattr("sys.argv", [file, "--data-root", "data/celeba", "--max-steps", "2", "--device", "cpu"])
    runpy.run_module(file, run_name="__main__")
    assert calls == [(f"experiment:{name}", "data/celeba", None, "cpu", 2)] and capsys.readouterr().out == "done\n"
    monkeypatch.undo()
    with pytest.raises(SystemExit) as stop:
        training_pipeline.train_command(f"experiment:{name}", "", ["--device", "banana"])
    assert stop.value.code == 2 and f"experiment:{name}: device='banana'" in capsys.readouterr().err


def test_a_device_that_is_not_there_is_refused():
    for device in ("banana", *([] if torch.cuda.is_available() else ["cuda"])):
        with pytest.raises(ValueError, match=f"device={device!r}: expected cpu"):
            run_training("experiment:celeba1024", "nowhere", device=device)


def test_a_section_of_a_preset_keeps_what_is_not_changed():
    changed = merge({"model": {"a": 1, "b": [2]}, "seed": 0}, {"model": {"b": [3]}, "seed": {"x": 1}})
    assert changed == {"model": {"a": 1, "b": [3]}, "seed": {"x": 1}}


def test_systems_are_loaded_from_yaml_and_json(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(SYSTEM)
    (tmp_path / "config.json").write_text(json.dumps(yaml.safe_load(SYSTEM)))
    exec(LOADING, scope := {"AdvancedDiffusionSystem": AdvancedDiffusionSystem})
    system = scope["system"]
    assert system.list_pipelines() == ["linear_ddpm", "cosine_ddim"]
    assert [c.beta_schedule for c in system.configs.values()] == [BetaSchedule.LINEAR, BetaSchedule.COSINE]
    assert AdvancedDiffusionSystem("config.yaml").configs == system.configs
    assert AdvancedDiffusionSystem("current_config.yaml").configs == system.configs
