import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import build_tiny_pipeline, seeded
from diffusers import AutoModel, DiffusionPipeline
from safetensors.torch import load_file

from atlas_diffusers import AtlasDDIMScheduler, AtlasPipeline, AtlasUNet2DModel
from atlas_diffusers.pretrained import pretrained_path

ROOT = Path(__file__).parents[2]

LOADERS = {
    "own class": "from atlas_diffusers import AtlasPipeline as P; p = P.from_pretrained(folder)",
    "DiffusionPipeline": "import atlas_diffusers; from diffusers import DiffusionPipeline as P; p = P.from_pretrained(folder)",
    "custom pipeline": "from diffusers import DiffusionPipeline as P; p = P.from_pretrained(folder, "
    "custom_pipeline='pipelines/atlas_pipeline.py', trust_remote_code=True)",
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    pipeline = build_tiny_pipeline()
    pipeline.save_pretrained(folder)
    return folder, pipeline("red heart", generator=seeded(), output_type="pt").images


@pytest.fixture
def folder(saved, tmp_path):
    import shutil

    return Path(shutil.copytree(saved[0], tmp_path / "copy"))


@pytest.mark.parametrize("way", LOADERS)
def test_a_fresh_process_loads_it_and_makes_the_same_picture(saved, tmp_path, way):
    folder, expected = saved
    code = f"""
folder = {str(folder)!r}
{LOADERS[way]}
import torch
from safetensors.torch import save_file
torch.set_num_threads(1)
image = p("red heart", generator=torch.Generator().manual_seed(0), output_type="pt").images
save_file({{"image": image}}, {str(tmp_path / "image.safetensors")!r})
print(type(p).__name__)
"""
    # the environment also chooses the instruction set, without which pictures differ in the last digits
    env = os.environ | {"HF_MODULES_CACHE": str(tmp_path), "HOME": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert result.stdout.strip() == "AtlasPipeline", result.stderr
    assert torch.equal(load_file(tmp_path / "image.safetensors")["image"], expected)


def test_the_index_is_frozen_wire_format(saved):
    index = json.loads((saved[0] / "model_index.json").read_text())
    assert index["_class_name"] == "AtlasPipeline"
    assert index["unet"] == ["atlas_diffusers", "AtlasUNet2DModel"]
    assert index["scheduler"] == ["atlas_diffusers", "AtlasDDIMScheduler"]
    assert index["text_encoder"] == ["transformers", "CLIPTextModel"]
    assert index["vae"] == [None, None]


def test_only_safetensors_and_json_are_written(saved):
    suffixes = {path.suffix for path in saved[0].rglob("*") if path.is_file()}
    assert suffixes == {".safetensors", ".json"}


def test_components_load_by_themselves(saved):
    with torch.random.fork_rng():
        assert isinstance(AutoModel.from_pretrained(str(saved[0] / "unet")), AtlasUNet2DModel)
        assert isinstance(AtlasDDIMScheduler.from_pretrained(saved[0], subfolder="scheduler"), AtlasDDIMScheduler)
        assert isinstance(DiffusionPipeline.from_pretrained(saved[0]), AtlasPipeline)


@pytest.mark.parametrize("name", ["no-such-folder", "./a/b", "some/folder/deep"])
def test_an_unknown_name_lists_what_there_is(name):
    with pytest.raises(OSError, match=f"no pipeline '{name}'.*folder with model_index.json.*hub id"):
        AtlasPipeline.from_pretrained(name)


def test_a_folder_without_an_index(tmp_path):
    with pytest.raises(OSError, match="no model_index.json"):
        AtlasPipeline.from_pretrained(str(tmp_path))


def test_a_missing_component(folder):
    import shutil

    shutil.rmtree(folder / "unet")
    with pytest.raises(OSError, match="component 'unet' is missing.*AtlasUNet2DModel"):
        AtlasPipeline.from_pretrained(folder)


@pytest.mark.parametrize("file", ["unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"])
def test_damaged_weights(folder, file):
    (folder / file).write_bytes((folder / file).read_bytes()[:1000])
    with pytest.raises(OSError):
        AtlasPipeline.from_pretrained(folder)


def test_pretrained_names_do_not_escape_their_folder():
    assert pretrained_path("../pretrained/atlas-emoji") is None
    assert pretrained_path("emoji") is None
