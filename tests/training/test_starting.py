"""From a folder to a run: derived recipes, init, recipes of the package, the summary and the trial."""

import importlib.util
import json
import re
import sys

import pytest
import torch
from conftest import seeded
from PIL import Image
from stock_pipelines import build_stock_pipeline, silence
from test_trainer import ROOT, build, recipe

from atlas_diffusers import AtlasPipeline, AtlasUNet2DModel
from atlas_diffusers.cli import main
from atlas_diffusers.config import TrainingConfig, list_recipes, read_mapping, read_recipe, validate
from atlas_diffusers.training import Trainer, recorder
from atlas_diffusers.training.deriving import complete_recipe
from atlas_diffusers.training.outputs import load_pictures

SMALL = {"base_channels": 16, "channel_mult": [1, 1], "attention_levels": [1], "num_heads": 2, "norm_num_groups": 4}

FOLDER = {"root": "mine", "name": "folder", "categories": None, "aliases_column": None}


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A folder of twelve captioned pictures, and the script as a function."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    rows = []
    for i in range(12):
        Image.new("RGB", (48, 40), (20 * i, 0, 0)).save(tmp_path / "mine" / f"{i:02d}.png")
        rows.append(json.dumps({"file_name": f"{i:02d}.png", "text": f"shade number {i}"}) + "\n")
    (tmp_path / "mine" / "metadata.jsonl").write_text("".join(rows))
    return tmp_path


def script(monkeypatch, *arguments):
    spec = importlib.util.spec_from_file_location("train_script", ROOT / "training" / "train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
    return module.main()


def completed(**data):
    config = validate(TrainingConfig, data)
    pictures = load_pictures(config, config.dataset)
    return complete_recipe(config, pictures, pictures.captions())


def test_init_writes_a_recipe_that_trains(mine, monkeypatch, capsys):
    assert main(["init", "mine"]) == 0
    told = capsys.readouterr().out
    assert told.startswith("12 pictures, 12 with captions from metadata\nrecipe.yaml: ")
    text = (mine / "recipe.yaml").read_text(encoding="utf-8")
    assert text.startswith("# 12 pictures, 12 with captions from metadata\n")
    assert "short sides of the pictures: 40 to 40" in text
    config = validate(TrainingConfig, read_mapping("recipe.yaml"))
    assert config.dataset.resolution == 32 and config.model["cross_attention_levels"] and config.objective == "flow_matching"
    assert config.sample_prompts == [f"shade number {i}" for i in (0, 3, 6, 9)]
    changes = ["--max_steps", "1", "--batch_size", "2", "--sample_interval", "1", "--sample_steps", "1"]
    model = [f"--model.{key}={value}" for key, value in SMALL.items()] + ["--model.cross_attention_levels=[1]"]
    assert script(monkeypatch, "--config", "recipe.yaml", *changes, *model) == 0
    with torch.random.fork_rng():
        pipeline = AtlasPipeline.from_pretrained("outputs/mine/pipeline")
    assert pipeline.has_text and (mine / "outputs" / "mine" / "sample-000001.png").exists()
    assert main(["init", "mine"]) == 2
    assert "recipe.yaml exists" in capsys.readouterr().err


def test_init_of_pictures_without_captions(mine, capsys):
    (mine / "mine" / "metadata.jsonl").unlink()
    assert main(["init", "mine", "-o", "plain.yaml", "--resolution", "16"]) == 0
    assert "names are captions by --captions names, or folders" in capsys.readouterr().out
    data = read_mapping("plain.yaml")
    assert data["text_encoder"] is None and data["sample_prompts"] == [] and data["dataset"]["resolution"] == 16
    assert "cross_attention_levels" not in data["model"] and validate(TrainingConfig, data).guidance_scale == 1.0
    assert main(["init", "mine", "-o", "names.yaml", "--captions", "names"]) == 0
    assert read_mapping("names.yaml")["sample_prompts"] == ["00", "03", "06", "09"]
    for folder, message in (("nowhere", "folder nowhere does not exist"), ("outputs", "does not exist")):
        assert main(["init", folder, "-o", "x.yaml"]) == 2
        assert message in capsys.readouterr().err


def test_captions_imply_a_network_that_reads_them(mine):
    with_text = completed(dataset={"root": "mine"})
    assert with_text.model["cross_attention_levels"] == [2] and with_text.text_encoder is not None
    config = TrainingConfig(**with_text.model_dump() | {"output_dir": "out", "batch_size": 2})
    assert Trainer(config).components.unet.config.cross_attention_dim == config.text_encoder.hidden_size
    assert with_text.text_encoder.max_length == 16
    rows = [json.dumps({"file_name": "00.png", "text": " ".join(["word"] * length)}) for length in (20,)]
    (mine / "mine" / "metadata.jsonl").write_text("\n".join(rows))
    assert completed(dataset={"root": "mine"}).text_encoder.max_length == 42, "two tokens a word, and two marks"
    (mine / "mine" / "metadata.jsonl").unlink()
    plain = completed(dataset={"root": "mine"})
    assert plain.text_encoder is None and "cross_attention_levels" not in plain.model
    with pytest.raises(ValueError, match="text_encoder needs captions, but no picture has one; set text_encoder: null"):
        completed(dataset={"root": "mine"}, text_encoder={"hidden_size": 32})
    given = {**SMALL, "cross_attention_levels": [1]}
    assert completed(model=given, dataset={"root": "mine"}).model == given


@pytest.mark.parametrize("resolution", [8, 16, 24, 32, 48, 64, 128, 200, 256, 512, 1024])
@pytest.mark.parametrize("num_resolutions", [1, 2])
def test_a_derived_network_fits_its_resolution(resolution, num_resolutions):
    data = {"name": "embedded:digits", "channels": 1, "resolution": resolution, "caption_column": None, "label_column": "label"}
    config = completed(dataset=data, text_encoder=None, num_resolutions=num_resolutions)
    with torch.device("meta"):
        unet = AtlasUNet2DModel(**{"sample_size": resolution, **config.model})
    assert resolution % (unet.size_multiple * 2 ** (num_resolutions - 1)) == 0 and config.model["num_class_embeds"] == 10
    assert resolution / unet.size_multiple <= 32 or resolution % 64, "the deepest level is small where the sides allow it"


def test_names_of_elsewhere_get_their_name_here():
    with pytest.raises(ValueError) as error:
        validate(TrainingConfig, {"lr": 1, "train_data_dir": "x", "train_batch_size": 4, "max_train_steps": 5,
                                  "resume_from_checkpoint": "latest", "dataset": {"enable_bucket": True}})  # fmt: skip
    for name, here in (("lr", "learning_rate"), ("train_data_dir", "dataset.root"), ("train_batch_size", "batch_size"),
                       ("max_train_steps", "max_steps"), ("resume_from_checkpoint", "resume")):  # fmt: skip
        assert re.search(rf"\b{name}: unknown key, did you mean '{here}'\?", str(error.value))


def test_recipes_ship_with_the_package(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["recipes", "list"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == list_recipes() and "emoji" in list_recipes()
    assert main(["recipes", "show", "emoji"]) == 0
    shown = capsys.readouterr().out
    assert shown == (ROOT / "training" / "recipes" / "emoji.yaml").read_text(encoding="utf-8")
    assert main(["recipes", "copy", "emoji"]) == 0 and (tmp_path / "emoji.yaml").read_text(encoding="utf-8") == shown
    (tmp_path / "emoji.yaml").unlink()
    assert read_recipe("emoji")["output_dir"] == "outputs/atlas-emoji"
    (tmp_path / "emoji").write_text("seed: 7\n")
    assert read_recipe("emoji") == {"seed": 7}, "a file goes first"
    capsys.readouterr()
    assert main(["recipes", "show", "emojis"]) == 2 and "recipe 'emojis' is unknown; allowed are" in capsys.readouterr().err


def test_the_summary_says_what_will_happen(mine, monkeypatch, capsys):
    data = recipe(mine / "out", dataset=FOLDER, max_steps=3, text_encoder={"max_length": 4})
    (mine / "recipe.json").write_text(json.dumps(data))
    assert script(monkeypatch, "--config", "recipe.json", "--dry-run") == 0
    found = capsys.readouterr()
    lines = {line.split()[0]: line[10:] for line in found.err.splitlines() if line[:9].strip() in
             ("data", "network", "captions", "steps", "memory", "output", "goes on")}  # fmt: skip
    assert lines["data"] == "folder (mine): 12 pictures, 12 with captions from metadata, at 32 pixels"
    assert lines["steps"] == "3 of 8 pictures, 2 passes over the data"
    assert lines["captions"] == "such as 'shade number 0', 'shade number 4', 'shade number 8'; 12 are cut after 4 tokens"
    run = Trainer(validate(TrainingConfig, data))
    count = sum(p.numel() for p in run.parameters)
    assert lines["network"] == f"AtlasUNet2DModel, {count:,} of {count:,} numbers train"
    assert re.fullmatch(r"about [\d.e-]+ GiB in float32 \([\d.e-]+ of it weights and averages\).*", lines["memory"])
    assert re.fullmatch(r"one batch has loss \d+\.\d{4}; nothing was written\n", found.out)
    assert not (mine / "out").exists() and "goes" not in lines
    run.train()
    assert "goes on   from " in Trainer(validate(TrainingConfig, data)).summary()


def test_a_trial_says_what_would_fail(mine, monkeypatch, capsys):
    data = recipe(mine / "out", dataset=FOLDER)
    for file in (mine / "mine").glob("*.png"):
        file.write_bytes(b"no picture")
    (mine / "recipe.json").write_text(json.dumps(data))
    assert script(monkeypatch, "--config", "recipe.json", "--dry-run") == 2
    assert "cannot be read" in capsys.readouterr().err.splitlines()[-1] and not (mine / "out").exists()


def test_curves_are_never_empty_and_the_bar_shows_the_first_loss(tmp_path, monkeypatch):
    shown, written = [], []
    monkeypatch.setattr(recorder.tqdm, "set_postfix", lambda self, values: shown.append(values))
    monkeypatch.setattr(recorder.tqdm, "write", lambda self, text: written.append(text))
    monkeypatch.setattr(recorder, "TIMED", 2)
    build(tmp_path, max_steps=3, log_interval=50).train()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["step"] for row in rows] == [3] and list(shown[0]) == ["loss"] and float(shown[0]["loss"]) > 0
    assert len(written) == 1 and re.fullmatch(r"about \d+ seconds to go", written[0])
    assert [recorder._duration(t) for t in (89, 600, 7200)] == ["89 seconds", "10 minutes", "2.0 hours"]


def test_a_new_network_learns_the_latents_of_an_autoencoder(mine):
    with silence():
        vae = build_stock_pipeline("text2img").vae
    vae.save_pretrained("pipeline/vae")
    vae.save_pretrained("alone")
    channels, factor = vae.config.latent_channels, 2 ** (len(vae.config.block_out_channels) - 1)
    dataset = {**FOLDER, "resolution": 16 * factor}
    data = {**recipe(mine / "out"), "vae": "alone", "max_steps": 1, "dataset": dataset, "batch_size": 2}
    run = Trainer(validate(TrainingConfig, data))
    c = run.components.unet.config
    assert (c.in_channels, c.out_channels, c.sample_size) == (channels, channels, 16)
    assert {f"unet.{name}" for name, _ in run.components.unet.named_parameters()} <= set(run.snapshot.parameters)
    assert not any(name.startswith("vae") for name in run.snapshot.parameters)
    loss = run.check()
    with torch.random.fork_rng():
        pipeline = AtlasPipeline.from_pretrained(run.train())
    pipeline.set_progress_bar_config(disable=True)
    found = pipeline("shade number 1", num_inference_steps=1, output_type="np", generator=seeded()).images
    assert found.shape == (1, 16 * factor, 16 * factor, 3) and 0.1 < loss < 10
    for name, p in pipeline.vae.named_parameters():
        assert torch.equal(p, vae.state_dict()[name])
    changed = {**data, "vae": "pipeline", "output_dir": "other"}
    assert Trainer(validate(TrainingConfig, changed)).components.vae.config.latent_channels == channels
    with pytest.raises(ValueError, match=f"the autoencoder has {channels} channels, but the network has in_channels=3"):
        Trainer(validate(TrainingConfig, {**changed, "model": {**data["model"], "in_channels": 3}}))
    with pytest.raises(ValueError, match="give init_from or vae, not both"):
        validate(TrainingConfig, {**data, "init_from": "atlas-emoji", "model": {}})
    with pytest.raises(OSError):
        Trainer(validate(TrainingConfig, {**changed, "vae": "mine"}))
