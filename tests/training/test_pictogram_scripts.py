"""The scripts of the pictograms' pipeline: an autoencoder, a pipeline of a checkpoint."""

import argparse
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import seeded
from PIL import Image
from safetensors.torch import load_file
from test_trainer import build

from atlas_diffusers import AtlasAutoencoder, AtlasPipeline
from atlas_diffusers.training.checkpoints import latest_checkpoint, load_checkpoint

SCRIPTS = Path(__file__).parents[2] / "training"


def script(name: str):
    spec = importlib.util.spec_from_file_location(Path(name).stem, SCRIPTS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_checkpoint_becomes_the_pipeline_of_its_averages(tmp_path):
    run = build(tmp_path / "run", max_steps=3, checkpoint_interval=2, log_interval=1, save_dtype="float16")
    run.train()
    told = script("export_checkpoint").export(tmp_path / "run", tmp_path / "out")
    assert told["step"] == 3 and told["pictures"] == 3 * run.config.batch_size
    assert told == json.loads((tmp_path / "out" / "state.json").read_text())
    checkpoint = latest_checkpoint(tmp_path / "run")
    assert checkpoint is not None
    tensors, _ = load_checkpoint(checkpoint)
    pipeline = AtlasPipeline.from_pretrained(tmp_path / "out")
    for part in ("unet", "text_encoder"):
        for name, weight in getattr(pipeline, part).named_parameters():
            assert torch.equal(weight, tensors[f"average.{part}.{name}"].half().float())
        stored = load_file(next((tmp_path / "out" / part).glob("*.safetensors")))
        assert all(value.dtype == torch.float16 for value in stored.values() if value.is_floating_point())


def test_what_cannot_be_exported(tmp_path, capsys, monkeypatch):
    module = script("export_checkpoint")
    monkeypatch.setattr("sys.argv", ["export_checkpoint.py", str(tmp_path), str(tmp_path / "out")])
    assert module.main() == 2
    assert "recipe.json" in capsys.readouterr().err
    run = build(tmp_path / "run", max_steps=1)
    run.folder.mkdir()
    (run.folder / "recipe.json").write_text(run.config.model_dump_json())
    with pytest.raises(ValueError, match="no checkpoint yet"):
        module.export(run.folder, tmp_path / "out")


def test_an_autoencoder_learns_and_a_frozen_encoder_stays(tmp_path, monkeypatch, capsys):
    module = script("train_autoencoder")
    pictures = (torch.nn.functional.interpolate(torch.rand(12, 3, 7, 7, generator=seeded(0)), 64) * 255).byte()
    monkeypatch.setattr(module, "pictures", lambda split, limit=None: pictures)
    monkeypatch.setattr(module, "COMPONENTS_OF", 6)
    options = {"channels": 4, "batch_size": 4, "learning_rate": 1e-3, "latent_noise": 0.1, "bf16": False, "log_interval": 50,
               "seed": 0}  # fmt: skip
    first, second = tmp_path / "first", tmp_path / "second"
    with torch.random.fork_rng():
        module.train(argparse.Namespace(output=first, start=None, freeze_encoder=False, steps=15, **options))
        module.train(argparse.Namespace(output=second, start=first, freeze_encoder=True, steps=15, **options))
    quality = [float(line.split("PSNR ")[1].split()[0]) for line in capsys.readouterr().out.splitlines()]
    assert quality[0] < quality[1] and quality[2] == pytest.approx(quality[1], abs=0.01) and quality[2] < quality[3]
    before, after = (AtlasAutoencoder.from_pretrained(folder).state_dict() for folder in (first, second))
    still = {name for name in before if torch.equal(before[name], after[name])}
    assert all((name in still) == name.startswith(("encoder", "project")) for name in before)


def test_the_loss_is_the_error_and_the_moments():
    module = script("train_autoencoder")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AtlasAutoencoder(latent_channels=4, block_out_channels=(8, 8, 8, 8))
    x = torch.rand(3, 3, 16, 16, generator=seeded(1)) * 2 - 1
    vae.set_components(x)
    deviations = torch.tensor([1.0, 2.0, 0.5, 0.0])
    found = module.autoencoder_loss(vae, x, deviations, 0.0, seeded())
    z = vae.encode(x).latents
    error = x - vae.decode(z).sample
    moments = sum(z[:, c].mean() ** 2 + (z[:, c].std() - deviations[c]) ** 2 for c in range(4)) / 4
    expected = error.abs().mean() + 2 * (error**2).mean() + moments / 10
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_pictures_of_a_seventh_style_have_the_names_of_things(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS / "data")
    module = script("data/build_streamline")
    square = {"body": '<path fill="#00f" d="M0 0h24v48H0z"/>'}
    keys = ["car", "red-heart-2", "no-such-thing", "dog-1", "dog-2"]
    icons = {"width": 48, "height": 48, "icons": dict.fromkeys(keys, square)}
    assert module.named(keys) == {"car": "automobile", "red-heart-2": "red heart", "dog-1": "dog", "dog-2": "dog"}
    found = module.build(icons, tmp_path)
    files = {split: tmp_path / split / "metadata.jsonl" for split in found}
    rows = {split: [json.loads(line) for line in file.read_text().splitlines()] for split, file in files.items()}
    assert {split: len(lines) for split, lines in rows.items()} == found and sum(found.values()) == 4
    texts = [row["text"] for lines in rows.values() for row in lines]
    assert sorted(texts) == [f"{name}, streamline style" for name in ("automobile", "dog", "dog", "red heart")]
    split, row = next((split, row) for split, lines in rows.items() for row in lines)
    picture = np.asarray(Image.open(tmp_path / split / row["file_name"]))
    assert picture.shape == (64, 64, 3) and (picture[:, :31] == (0, 0, 255)).all() and (picture[:, 33:] == 255).all()
