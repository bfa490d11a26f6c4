"""Model cards say what a run was, and folders go to the hub as they are; the hub is a stand-in."""

import huggingface_hub
import pytest
import yaml
from conftest import build_tiny_pipeline
from test_trainer import build

from atlas_diffusers.cli import main
from atlas_diffusers.training.sharing import push


class Hub:
    """Remembers what it was asked for."""

    def __init__(self):
        self.calls = []

    def create_repo(self, *args, **options):
        self.calls.append(("create", args, options))
        return f"hub/{args[0]}"

    def upload_folder(self, **options):
        self.calls.append(("upload", options["repo_id"], sorted(file.name for file in options["folder_path"].iterdir())))


@pytest.fixture
def hub(monkeypatch):
    found = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: found)
    return found


def test_a_run_writes_its_card_and_goes_to_the_hub(tmp_path, hub):
    run = build(tmp_path / "run", max_steps=2, sample_interval=2, sample_steps=1, license="cc-by-4.0", push_to_hub="me/mine")
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run" / "evaluation-000001.json").write_text('{"nearest_median": 0.25, "features": "f", "generated": 8}')
    folder = run.train()
    head, text = (folder / "README.md").read_text().removeprefix("---\n").split("\n---\n")
    assert yaml.safe_load(head) == {
        "library_name": "diffusers", "pipeline_tag": "text-to-image", "tags": ["atlas-diffusers"], "license": "cc-by-4.0",
    }  # fmt: skip
    assert f"{len(run.pictures):,} pictures of `embedded:emoji` at 32 pixels, with captions such as" in text
    assert "| nearest_median | 0.2500 |" in text and "![Samples](sample-000002.png)" in text and "![Loss](curves.png)" in text
    recipe = yaml.safe_load(text.partition("```yaml\n")[2].partition("```")[0])
    assert recipe["max_steps"] == 2 and recipe["license"] == "cc-by-4.0" and "learning_rate" in recipe
    assert hub.calls[0] == ("create", ("me/mine",), {"private": False, "exist_ok": True})
    assert hub.calls[1][:2] == ("upload", "me/mine") and {"README.md", "model_index.json", "unet"} <= set(hub.calls[1][2])


def test_push_takes_the_folder_of_a_run(tmp_path, hub, capsys):
    build_tiny_pipeline().save_pretrained(tmp_path / "run" / "pipeline")
    assert main(["push", str(tmp_path / "run"), "--repo", "me/mine", "--private"]) == 0
    assert capsys.readouterr().out == "hub/me/mine\n" and hub.calls[0][2]["private"] is True
    assert "model_index.json" in hub.calls[1][2]


def test_what_cannot_be_pushed_is_named(tmp_path, hub):
    with pytest.raises(ValueError, match="'mine': expected user/name"):
        push(tmp_path, "mine")
    with pytest.raises(OSError, match="is neither a pipeline nor adapters"):
        push(tmp_path, "me/mine")
    assert hub.calls == []
