"""The script that makes a data set of Fluent emoji, on a package of three pictures."""

import importlib.util
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from atlas_diffusers.pretrained import FOLDER, is_held_out

SCRIPT = Path(__file__).parents[2] / "training" / "fetch_fluent_emoji.py"
FOOD = [entry for entry in json.loads((FOLDER / "emoji" / "captions.json").read_text()) if entry["category"] == "Food & Drink"]


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("fetch_fluent_emoji", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def archive_of(path, names):
    """A package of pictures whose left half is transparent and whose right half is red."""
    picture, buffer = Image.new("RGBA", (8, 8), (0, 0, 0, 0)), io.BytesIO()
    picture.paste((255, 0, 0, 255), (4, 0, 8, 8))
    picture.save(buffer, "WEBP", lossless=True)
    with tarfile.open(path, "w:gz") as package:
        for name in names:
            member = tarfile.TarInfo(f"package/assets/{name}.webp")
            member.size = len(buffer.getvalue())
            package.addfile(member, io.BytesIO(buffer.getvalue()))
    return path


def test_pictures_are_matched_by_code_point_and_split_as_the_embedded_ones(script, tmp_path):
    chosen = {split: next(e for e in FOOD if is_held_out(e["name"]) == (split == "test")) for split in ("train", "test")}
    names = [entry["unified"].lower() for entry in chosen.values()]
    archive = archive_of(tmp_path / "package.tgz", [*names, "f0000"])
    assert script.write_pictures(archive, tmp_path / "out", ["Food & Drink"], 8) == {"train": 1, "test": 1}
    for (split, entry), name in zip(chosen.items(), names):
        rows = [json.loads(line) for line in (tmp_path / "out" / split / "metadata.jsonl").read_text().splitlines()]
        assert rows == [{"file_name": f"{name}.png", "text": entry["text"]}]
        with Image.open(tmp_path / "out" / split / f"{name}.png") as image:
            assert image.getpixel((0, 4)) == (255, 255, 255) and image.getpixel((7, 4)) == (255, 0, 0)
    assert script.write_pictures(archive, tmp_path / "none", ["Symbols"], 8) == {"train": 0, "test": 0}


def test_a_failed_download_is_one_line(script, tmp_path, monkeypatch, capsys):
    failed = subprocess.CompletedProcess([], 1, "", "no network\n")
    monkeypatch.setattr(script.subprocess, "run", lambda *arguments, **options: failed)
    monkeypatch.setattr(sys, "argv", ["fetch_fluent_emoji.py", str(tmp_path / "out")])
    assert script.main() == 2
    error = capsys.readouterr().err
    assert error.endswith("failed: no network\n") and error.count("\n") == 1
