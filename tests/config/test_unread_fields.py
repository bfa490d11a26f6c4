"""A field that nothing would read is refused by name, and so is a key that a file has twice."""

import pytest

from atlas_diffusers.cli import main
from atlas_diffusers.config import (
    BridgeConfig,
    DatasetConfig,
    HighResModelConfig,
    KernelConfig,
    NoiseSchedulerConfig,
    SamplerConfig,
    TrainingConfig,
    apply_overrides,
    list_presets,
    list_recipes,
    read_mapping,
    read_recipe,
    validate,
)
from atlas_diffusers.config.presets import PRESETS

FOLDER = {"root": "pictures"}
BRIDGE = {"objective": "bridge_matching", "source_dataset": {}, "text_encoder": None}
ADAPTERS = {"init_from": "atlas-emoji", "lora": {}, "text_encoder": None}

UNREAD = [
    (DatasetConfig, {"alias_probability": 0.5}, "alias_probability=0.5: not read without aliases_column"),
    (DatasetConfig, {"shuffle_buffer": 10}, "shuffle_buffer=10: not read without streaming"),
    (DatasetConfig, {**FOLDER, "caption_column": None, "captions": "files"}, "captions='files': not read without"),
    (DatasetConfig, {"caption_column": None, "aliases_column": "aliases"}, "aliases_column='aliases': not read without"),
    (TrainingConfig, {"eval_count": 64}, "eval_count=64: not read without eval_interval"),
    (TrainingConfig, {"eval_dataset": {}}, "eval_dataset=DatasetConfig("),
    (TrainingConfig, {"eval_interval": 9, "eval_dataset": {"random_flip": True}}, "random_flip=True: not read of eval_dataset"),
    (TrainingConfig, {"eval_interval": 9, "dataset": {"streaming": True}}, "a stream needs an eval_dataset that is not one"),
    (TrainingConfig, {"sample_prompts": ["ball"]}, "sample_prompts=['ball']: not read without sample_interval"),
    (TrainingConfig, {**BRIDGE, "sample_interval": 9, "sample_prompts": ["ball"]}, "not read by objective='bridge_matching'"),
    (TrainingConfig, {**BRIDGE, "source_dataset": {"num_workers": 2}}, "num_workers=2: not read of source_dataset"),
    (TrainingConfig, {**BRIDGE, "coupling": "paired", "dataset": {"random_flip": True}}, "give random_flip to both data sets"),
    (TrainingConfig, {**ADAPTERS, "sample_steps": 2}, "sample_steps=2: not read of adapters without sample_interval"),
    (TrainingConfig, {**ADAPTERS, "lora": {"text_encoder_modules": ["q_proj"]}, "train_text_encoder": False},
     "lora.text_encoder_modules names what trains of it"),
    (TrainingConfig, {"text_encoder": None, "train_text_encoder": False}, "train_text_encoder: false needs init_from"),
    (TrainingConfig, {"coupling": "sinkhorn", "micro_batch_size": 1}, "pairs the pictures of a micro-batch, which has one"),
    (TrainingConfig, {"logit_std": 2.0, "objective": "flow_matching"}, "logit_std=2.0: not read without time_distribution="),
    (BridgeConfig, {"strength": 0.5}, "strength=0.5: not read in mode='replace'"),
    (KernelConfig, {"scale_factors": [1.0]}, "scale_factors=[1.0]: not read without multi_scale"),
    (KernelConfig, {"rff_features": 9}, "rff_features=9: not read by solver_type='auto'"),
    (KernelConfig, {"solver_type": "rff", "n_landmarks": 9}, "n_landmarks=9: not read by solver_type='rff'"),
    (KernelConfig, {"solver_type": "nystrom", "orthogonal": False}, "orthogonal=False: not read by solver_type='nystrom'"),
    (HighResModelConfig, {"conditional": False, "context_dim": 8}, "context_dim=8: not read where conditional is false"),
    (SamplerConfig, {"num_resolutions": 3}, "num_resolutions=3: not read without hierarchical_sampling"),
    (NoiseSchedulerConfig, {"clip_sample": False, "clip_sample_range": 2.0}, "clip_sample_range=2.0: not read without"),
    (NoiseSchedulerConfig, {"sample_max_value": 2.0}, "sample_max_value=2.0: not read without thresholding"),
    (NoiseSchedulerConfig, {"timestep_spacing": "trailing", "steps_offset": 2}, "steps_offset=2: not read by"),
]  # fmt: skip


@pytest.mark.parametrize(
    "model, fields, message", UNREAD, ids=[f"{m.__name__}-{list(f)[-1]}-{i}" for i, (m, f, _) in enumerate(UNREAD)]
)
def test_what_nothing_would_read_is_refused_by_name(model, fields, message):
    with pytest.raises(ValueError) as error:
        validate(model, fields)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "model, fields",
    [
        (DatasetConfig, {"alias_probability": 0.5, "aliases_column": "aliases"}),
        (DatasetConfig, {"shuffle_buffer": 10, "streaming": True}),
        (TrainingConfig, {"eval_interval": 9, "eval_count": 64, "eval_dataset": {}}),
        (TrainingConfig, {"sample_interval": 9, "sample_prompts": ["ball"]}),
        (TrainingConfig, {**ADAPTERS, "guidance_scale": 2.0, "eval_interval": 9}),
        (BridgeConfig, {"strength": 0.5, "mode": "correct"}),
        (KernelConfig, {"scale_factors": [1.0], "multi_scale": True}),
        (NoiseSchedulerConfig, {"beta_start": 0.01, "beta_end": 0.01}),
        (KernelConfig, {"solver_type": "mine", "rff_features": 9, "n_landmarks": 9}),
    ],
)
def test_the_same_fields_are_taken_where_they_are_read(model, fields):
    found = validate(model, fields)
    assert validate(model, found.model_dump()) == found, "a written recipe reads back, though it says every default"


def test_what_ships_says_nothing_that_is_not_read():
    for name in list_presets():
        validate(PRESETS[name][0], PRESETS[name][1])
    for name in list_recipes():
        validate(TrainingConfig, read_recipe(name))


# ---------------------------------------------------------------------- keys


@pytest.mark.parametrize(
    "name, text",
    [
        ("a.yaml", "seed: 1\nmax_steps: 3\nseed: 2\n"),
        ("a.yaml", "dataset: {seed: 1, 'seed': 2}\n"),
        ("a.yaml", "model:\n  - {seed: 1, seed: 1}\n"),
        ("a.json", '{"dataset": {"seed": 1, "seed": 2}}'),
    ],
)
def test_a_key_that_stands_there_twice_is_named(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f"{name}: does not parse: key 'seed' stands there twice") as error:
        read_mapping(tmp_path / name)
    assert "\n" not in str(error.value)


def test_equal_keys_of_different_sections_and_merged_ones_are_fine(tmp_path):
    (tmp_path / "a.yaml").write_text("a: &a {x: 1, y: 1}\nb: {<<: *a, x: 2}\nc: {<<: *a, y: 3}\n")
    assert read_mapping(tmp_path / "a.yaml") == {"a": {"x": 1, "y": 1}, "b": {"x": 2, "y": 1}, "c": {"x": 1, "y": 3}}
    with pytest.raises(ValueError, match="--model: .* key 'x' stands there twice"):
        apply_overrides({}, ["--model", "{x: 1, x: 2}"])


# ---------------------------------------------------------------------- captions

PLAIN = "model: {base_channels: 8, channel_mult: [1, 2], attention_levels: [1], num_heads: 2, norm_num_groups: 4}\n"


@pytest.mark.parametrize(
    "more, is_valid",
    [
        ("dataset: {name: 'embedded:emoji'}\n", False),
        ("dataset: {root: pictures}\ntext_encoder: {hidden_size: 16}\n", False),
        ("text_encoder: null\n", True),
        ("dataset: {root: pictures}\n", True),
    ],
    ids=["captions are there", "encoder asked for", "none", "who knows"],
)
def test_validate_reports_captions_that_the_network_does_not_read(tmp_path, capsys, caplog, more, is_valid):
    (tmp_path / "recipe.yaml").write_text(PLAIN + more)
    assert main(["config", "validate", str(tmp_path / "recipe.yaml")]) == (0 if is_valid else 2)
    told = capsys.readouterr().err
    assert is_valid or "the network does not read captions: give model.cross_attention_levels" in told
    assert ("if the data have captions" in caplog.text) == ("root" in more and is_valid)
