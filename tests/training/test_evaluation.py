"""What a run tells: evaluations against the metrics themselves, rows with speeds, curves, and no rows of a run that died."""

import json
import types

import pytest
import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from accelerate.utils import LoggerType
from conftest import build_tiny_pipeline, build_tiny_unet
from PIL import Image
from test_trainer import build

from atlas_diffusers.cli import main
from atlas_diffusers.config import DatasetConfig
from atlas_diffusers.metrics import efficientnet_features, energy_distance, kid, manifold_overlap
from atlas_diffusers.pictures.sheets import to_pictures
from atlas_diffusers.training import BridgePairs, Evaluator, PictureDataset, evaluation, load_checkpoint, load_training_data

DATA = {"name": "embedded:emoji", "categories": ["Activities"], "resolution": 8}


@pytest.fixture(scope="module")
def dataset():
    config = DatasetConfig(**DATA)
    return PictureDataset(load_training_data(config).select(range(12)), config)


def test_the_numbers_are_those_of_the_metrics(dataset, float64, monkeypatch):
    """Each caption's picture from the noise of its own seed; made one by one in float64 they are those that were rated."""
    pipeline, rated, features_of = build_tiny_pipeline(), [], evaluation._features
    monkeypatch.setattr(evaluation, "_features", lambda pictures: (rated.append(pictures), features_of(pictures))[1])
    numbers, sheet = Evaluator(dataset)(pipeline, count=14, num_inference_steps=2, guidance_scale=1.0, seed=3)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3)).tolist()
    prompts = [dataset[order[k % 12], 0]["text"] for k in range(14)]
    images = [
        pipeline(
            prompt, num_inference_steps=2, guidance_scale=1.0, generator=torch.Generator().manual_seed(3 + k), output_type="pt"
        ).images[0]
        for k, prompt in enumerate(prompts)
    ]
    real, found = rated
    assert torch.equal(real, torch.stack([dataset[index, 0]["pixels"] for index in range(12)]))
    # the pictures are rounded to float32
    torch.testing.assert_close(found.double(), 2 * torch.stack(images) - 1, rtol=0, atol=2e-7)
    # of one batch, so that the features are bit-equal
    features, others = (efficientnet_features((pictures / 2 + 0.5).clamp(0, 1)) for pictures in (found, real))
    assert numbers["kid"] == pytest.approx(kid(features, others).mean, rel=1e-9)
    assert numbers["energy_distance"] == pytest.approx(energy_distance(features, others), rel=1e-9)
    assert numbers["recall"] == manifold_overlap(others, features).recall
    nearest = (found.double() - real.double()[:, None]).square().flatten(2).mean(2).sqrt().min(0).values.median().item()
    assert numbers["nearest_median"] == pytest.approx(nearest, rel=1e-9)
    assert numbers["generated"] == 14 and numbers["real"] == 12 and sheet.width > 8 * 64


def test_kid_stands_beside_that_of_real_pictures(dataset, tmp_path, capsys):
    other = PictureDataset(load_training_data(dataset.config).select(range(12, 30)), dataset.config)
    evaluator, real = Evaluator(dataset), torch.stack([dataset[index, 0]["pixels"] for index in range(12)])
    found = torch.stack([other[index, 0]["pixels"] for index in range(18)])
    features = [efficientnet_features((pixels / 2 + 0.5).clamp(0, 1)) for pixels in (found, real)]
    assert evaluator.kid_of(other) == pytest.approx(kid(*features).mean, rel=1e-4, abs=1e-6)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(5))
    halves = features[1][order[::2]], features[1][order[1::2]]
    assert evaluator.kid_of_halves(5) == pytest.approx(kid(*halves).mean, rel=1e-4, abs=1e-6)
    build_tiny_pipeline().save_pretrained(tmp_path / "tiny")
    data = ["--data", "embedded:emoji", "--categories", "Activities", "--beside", "test", "--count", "8", "--steps", "1"]
    assert main(["evaluate", str(tmp_path / "tiny"), *data, "-o", str(tmp_path / "s.json")]) == 0
    numbers = json.loads((tmp_path / "s.json").read_text())
    assert numbers["kid_of_test"] < numbers["kid"] and "kid_of_real_halves" in numbers


def test_too_few_pictures_and_another_size_are_named(dataset):
    evaluator, few = Evaluator(dataset), PictureDataset(dataset.data.select(range(7)), dataset.config)
    with pytest.raises(ValueError, match="at least 8 generated pictures, got count=7"):
        evaluator(build_tiny_pipeline(), count=7)
    with pytest.raises(ValueError, match="at least 8 pictures of the data, got 7"):
        Evaluator(few)
    pipeline = build_tiny_pipeline(unet=build_tiny_unet(sample_size=16), text_encoder=None, tokenizer=None)
    with pytest.raises(ValueError, match=r"pictures of \(3, 16, 16\), the data have \(3, 8, 8\)"):
        evaluator(pipeline, count=8, num_inference_steps=1)


def test_a_run_evaluates_itself_and_draws_its_curves(tmp_path):
    changes = {"eval_interval": 2, "eval_count": 8, "eval_dataset": {**DATA, "resolution": 32}}
    run = build(tmp_path, max_steps=3, sample_steps=1, **changes)
    run.train()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    numbers = json.loads((tmp_path / "evaluation-000002.json").read_text())
    assert [row["step"] for row in rows] == [1, 2, 2, 3] and rows[2] == {"step": 2, **numbers}
    assert all(row["images_per_second"] > 0 for row in rows if "loss" in row)
    for name in ("evaluation-000002.png", "curves.png"):
        with Image.open(tmp_path / name) as image:
            assert len(image.convert("L").getcolors(256)) > 20
    build(tmp_path / "plain", max_steps=3).train()
    (found, _), (expected, _) = (load_checkpoint(folder / "checkpoint-3") for folder in (run.folder, tmp_path / "plain"))
    assert found.keys() == expected.keys() and all(torch.equal(found[name], value) for name, value in expected.items())


def test_rows_after_the_checkpoint_are_written_once(tmp_path):
    build(tmp_path, max_steps=4, checkpoint_interval=4).train()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "loss": 1.0}\n{"step": 6, "lo')
    build(tmp_path, max_steps=6, checkpoint_interval=4).train()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6] and rows[4]["loss"] != 1.0


def test_the_command_writes_numbers_and_a_sheet(tmp_path, capsys):
    build_tiny_pipeline().save_pretrained(tmp_path / "pipeline")
    options = ["--categories", "Activities", "--count", "8", "--steps", "1", "--guidance", "1"]
    arguments = ["evaluate", str(tmp_path / "pipeline"), "--data", "embedded:emoji", *options]
    assert main([*arguments, "-o", str(tmp_path / "scores.json")]) == 0
    numbers = json.loads((tmp_path / "scores.json").read_text())
    assert f"kid: {numbers['kid']:.4f}" in capsys.readouterr().out and (tmp_path / "scores.png").is_file()
    assert main([*arguments, "-o", str(tmp_path / "missing" / "scores.json")]) == 2
    assert "expected a .json file in a folder that exists" in capsys.readouterr().err
    assert main([*arguments, "--lora", str(tmp_path / "missing"), "-o", str(tmp_path / "scores.json")]) == 2
    assert "missing: there is no such folder" in capsys.readouterr().err


def test_the_command_reads_a_folder_as_training_does(dataset, tmp_path, capsys):
    build_tiny_pipeline().save_pretrained(tmp_path / "pipeline")
    (tmp_path / "pictures").mkdir()
    for place in range(8):
        to_pictures(dataset[place, 0]["pixels"][None])[0].save(tmp_path / "pictures" / f"{place}.png")
        (tmp_path / "pictures" / f"{place}.txt").write_text(f"ball {place}", encoding="utf-8")
    options = ["--count", "8", "--steps", "1", "--guidance", "1", "-o", str(tmp_path / "scores.json")]
    assert main(["evaluate", str(tmp_path / "pipeline"), "--data", str(tmp_path / "pictures"), *options]) == 0
    assert "8 pictures, 8 with captions from the texts beside them" in capsys.readouterr().out
    assert json.loads((tmp_path / "scores.json").read_text())["real"] == 8


def test_a_tracker_gets_the_rows(tmp_path, monkeypatch):
    class Tracker(GeneralTracker):
        name, requires_logging_directory, tracker, rows = "tensorboard", False, None, []

        def __init__(self, run_name, **options):
            super().__init__()

        def log(self, values, step, **options):
            self.rows.append((step, values))

    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: [LoggerType.TENSORBOARD])
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "tensorboard", Tracker)
    build(tmp_path, max_steps=2, trackers=["tensorboard"]).train()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert Tracker.rows == [(row["step"], row) for row in rows] and len(rows) == 2


def test_a_tracker_whose_package_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: [])
    with pytest.raises(ValueError, match=r"trackers=\['tensorboard'\]: their packages are not installed"):
        build(tmp_path, trackers=["tensorboard"])


def test_a_bridge_between_pairs_is_measured_by_its_pairs(dataset):
    pairs = BridgePairs(dataset, dataset, paired=True)

    class Halfway:
        """Moves a third of the way from the source to grey."""

        has_text = False

        def __call__(self, image, output_type, **options):
            return types.SimpleNamespace(images=image * 2 / 3 + 0.5 / 3)

    numbers, _ = Evaluator(pairs)(Halfway(), count=len(dataset))
    pixels = torch.stack([dataset[i, 0]["pixels"] for i in range(len(dataset))])
    assert numbers["source_rms"] == 0
    assert numbers["paired_rms"] == pytest.approx((pixels / 3).square().flatten(1).mean(1).sqrt().mean().item(), rel=1e-4)
