"""Recipes: files, overrides, and the wording of mistakes."""

import json
from pathlib import Path

import pytest

from atlas_diffusers.config import DatasetConfig, TrainingConfig, apply_overrides, read_mapping, validate
from atlas_diffusers.training.networks import NETWORKS
from atlas_diffusers.training.sections import scheduler_from_dict

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ([], {}),
        (["--seed", "3"], {"seed": 3}),
        (["--seed=3"], {"seed": 3}),
        (["--dataset.resolution", "64"], {"dataset": {"resolution": 64}}),
        (["--a.b.c=x=y"], {"a": {"b": {"c": "x=y"}}}),
        (["--a.b", "1", "--a.c", "2"], {"a": {"b": 1, "c": 2}}),
        (["--seed", "1", "--seed", "2"], {"seed": 2}),
        (["--learning_rate", "-1"], {"learning_rate": -1}),
        (["--output_dir", "runs/a b"], {"output_dir": "runs/a b"}),
        (["--name="], {"name": None}),
    ],
)
def test_overrides(arguments, expected):
    assert apply_overrides({}, arguments) == expected


@pytest.mark.parametrize(
    "text, value",
    [
        ("1", 1),
        ("1.5", 1.5),
        ("1.5e-3", 1.5e-3),
        ("1e-4", 1e-4),
        ("2E+3", 2e3),
        ("true", True),
        ("null", None),
        ("[1, 2]", [1, 2]),
        ("[red heart, panda face]", ["red heart", "panda face"]),
        ("{beta_start: 0.5}", {"beta_start": 0.5}),
        ("'1'", "1"),
        ("atlas", "atlas"),
        ("e5", "e5"),
    ],
)
def test_override_values_have_the_types_of_yaml(text, value):
    found = apply_overrides({}, ["--key", text])["key"]
    assert found == value and type(found) is type(value)


def test_overrides_keep_neighbours_and_leave_the_original_alone():
    data = {"dataset": {"name": "a", "resolution": 32}, "seed": 1}
    assert apply_overrides(data, ["--dataset.resolution", "64"]) == {"dataset": {"name": "a", "resolution": 64}, "seed": 1}
    assert data == {"dataset": {"name": "a", "resolution": 32}, "seed": 1}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--seed"], "expected --key value, got '--seed'"),
        (["seed", "3"], "got 'seed' in key position"),
        (["--seed", "1", "2"], "got '2' in key position"),
        (["--seed.deep", "1"], "--seed.deep: 'seed' is a value, not a section"),
        (["--dataset.categories", "[a"], "--dataset.categories"),
        (["--key={a: b"], "--key"),
    ],
)
def test_override_mistakes(arguments, message):
    with pytest.raises(ValueError) as error:
        apply_overrides({"seed": 0}, arguments)
    assert message in str(error.value)


def test_yaml_and_json_files_read_alike(tmp_path):
    (tmp_path / "recipe.yaml").write_text("output_dir: größe\nlearning_rate: 1e-4\nmodel: {dropout: 2e-1}\n", encoding="utf-8")
    data = {"output_dir": "größe", "learning_rate": 1e-4, "model": {"dropout": 0.2}}
    (tmp_path / "recipe.json").write_text(json.dumps(data), encoding="utf-8")
    assert read_mapping(tmp_path / "recipe.yaml") == read_mapping(str(tmp_path / "recipe.json")) == data


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.yaml", "- 1\n- 2\n", "top level must be a mapping of keys to values, found list"),
        ("a.yaml", "", "top level must be a mapping of keys to values, found NoneType"),
        ("a.json", "3", "top level must be a mapping of keys to values, found int"),
        ("a.yaml", "key: [1, 2\nother: 3", "does not parse.*line 2"),
        ("a.json", '{"key": 1,}', "does not parse.*line 1"),
        ("a.yaml", "key: !!python/object/apply:os.getcwd []", "does not parse"),
    ],
)
def test_broken_files_are_named(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=rf"{name}: .*{message}"):
        read_mapping(tmp_path / name)


def test_a_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.yaml"):
        read_mapping(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    "data, message",
    [
        ({"max_step": 3}, "max_step: unknown key, did you mean 'max_steps'?"),
        ({"dataset": {"resolutions": 3}}, "dataset.resolutions: unknown key, did you mean 'resolution'?"),
        ({"text_encoder": {"hiden_size": 3}}, "text_encoder.hiden_size: unknown key, did you mean 'hidden_size'?"),
        ({"zzzz": 3}, "zzzz: unknown key"),
        ({"batch_size": 0}, "batch_size=0: Input should be greater than or equal to 1"),
        ({"batch_size": "many"}, "batch_size='many': Input should be a valid integer"),
        ({"lr_scheduler": "cubic"}, "lr_scheduler='cubic': Input should be 'constant_with_warmup', 'cosine' or 'linear'"),
        ({"dataset": {"alias_probability": 1.5}}, "dataset.alias_probability=1.5: Input should be less than or equal to 1"),
        ({"batch_size": 32, "micro_batch_size": 12}, "micro_batch_size=12 does not divide batch_size=32"),
        ({"batch_size": 8, "micro_batch_size": 16}, "micro_batch_size=16 does not divide batch_size=8"),
        ({"dataset": {"caption_column": None}}, "text_encoder needs dataset.caption_column"),
    ],
)
def test_mistakes_name_field_value_and_remedy(data, message):
    with pytest.raises(ValueError) as error:
        validate(TrainingConfig, {"output_dir": "out", **data})
    assert message in str(error.value)


def test_every_mistake_is_reported_at_once():
    with pytest.raises(ValueError) as error:
        validate(TrainingConfig, {"seeds": 1, "learning_rate": -1.0, "dataset": {"num_workers": -2}, "output_dir": 7})
    lines = str(error.value).split("; ")
    assert len(lines) == 4
    for name in ("output_dir", "seeds: unknown key, did you mean 'seed'?", "learning_rate=-1.0", "dataset.num_workers=-2"):
        assert any(line.startswith(name) for line in lines)


@pytest.mark.parametrize("batch_size, micro", [(32, None), (32, 32), (32, 8), (1, 1)])
def test_a_micro_batch_divides_the_batch(batch_size, micro):
    config = validate(TrainingConfig, {"output_dir": "out", "batch_size": batch_size, "micro_batch_size": micro})
    assert (config.batch_size, config.micro_batch_size) == (batch_size, micro)


def test_defaults_are_not_shared():
    first, second = (validate(TrainingConfig, {"output_dir": "out"}) for _ in range(2))
    first.dataset.resolution = 7
    first.model["patch_size"] = 9
    assert second.dataset == DatasetConfig() and second.model == {} and TrainingConfig(output_dir="x").dataset.resolution == 32


@pytest.mark.parametrize("path", sorted((ROOT / "training" / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_validate_and_build(path):
    config = validate(TrainingConfig, read_mapping(path))
    if config.scheduler is not None:
        assert type(scheduler_from_dict(config.scheduler)).__name__ == config.scheduler["_class_name"]
    network = NETWORKS[config.model.get("_class_name", "AtlasUNet2DModel")]
    assert not set(config.model) - {"_class_name"} - set(network.__init__.__wrapped__.__annotations__)


def test_the_emoji_recipe():
    config = validate(TrainingConfig, read_mapping(ROOT / "training" / "recipes" / "emoji.yaml"))
    assert config.dataset.categories == ["Smileys & Emotion", "Animals & Nature", "Food & Drink"]
    assert config.dataset.split == "train" and config.learning_rate == 1.5e-3
    assert config.scheduler["prediction_type"] == "v_prediction"


def test_a_date_is_a_text(tmp_path):
    (tmp_path / "recipe.yaml").write_text("output_dir: 2024-01-01\nmodel: {note: 2001-12-14t21:59:43.10-05:00}\n")
    data = apply_overrides(read_mapping(tmp_path / "recipe.yaml"), ["--init_from", "2024-02-03"])
    assert data == {"output_dir": "2024-01-01", "model": {"note": "2001-12-14t21:59:43.10-05:00"}, "init_from": "2024-02-03"}
    assert validate(TrainingConfig, {**data, "model": {}}).output_dir == "2024-01-01"


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("deep.yaml", "a: " + "[" * 5000, "nested too deeply"),
        ("deep.json", '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
        ("circle.yaml", "a: &a [*a]\n", "nested too deeply"),
        ("bomb.yaml", BOMB, "it has more than 100,000 values"),
        ("key.yaml", "dataset: {1: x}\n", "key 1 is not a text"),
        ("latin.yaml", "output_dir: größe\n".encode("latin-1"), "it is not UTF-8"),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 12 else "",
)
def test_hostile_files_are_one_short_line(tmp_path, name, text, message):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=f"{name}: does not parse: .*{message}") as error:
        read_mapping(tmp_path / name)
    assert len(str(error.value)) < 200 + len(str(tmp_path))


def test_hostile_overrides_are_one_short_line():
    for value in ("[" * 5000, "&a [*a]"):
        with pytest.raises(ValueError, match="--model.x: nested too deeply"):
            apply_overrides({}, ["--model.x", value])


def test_no_message_dumps_the_recipe():
    data = {"output_dir": "out", "sample_prompts": ["word"] * 500, "batch_size": 32, "micro_batch_size": 12}
    data["trackers"] = {"a": "b" * 900}
    with pytest.raises(ValueError) as error:
        validate(TrainingConfig, data)
    assert len(str(error.value)) < 300 and "trackers=" in str(error.value)
    with pytest.raises(ValueError) as error:
        validate(TrainingConfig, {**data, "trackers": []})
    assert str(error.value) == "Value error, micro_batch_size=12 does not divide batch_size=32"
