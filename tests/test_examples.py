"""The examples run and print what they did; numbers are compared where there are any."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from atlas_diffusers import AtlasPipeline
from atlas_diffusers.examples import conditioning, lora, run_inference, run_training
from atlas_diffusers.pretrained import load_digits

ROOT = Path(__file__).parents[1]

SMALL = {
    "model": {"base_channels": 8, "channel_mult": [1, 2], "num_res_blocks": 1, "attention_levels": [], "num_heads": 2,
              "norm_num_groups": 4, "num_class_embeds": 10},
    "batch_size": 4, "micro_batch_size": None, "warmup_steps": 1, "checkpoint_interval": 2, "sample_interval": None,
}  # fmt: skip


def paints_a_red_heart(file):
    """The first picture of a sheet is red in the middle."""
    with Image.open(file) as sheet:
        red, green, blue = (channel.crop((48, 48, 128, 128)) for channel in sheet.convert("RGB").split())
    means = [sum(channel.get_flattened_data()) / (80 * 80) for channel in (red, green, blue)]
    return means[0] > 150 > 120 > max(means[1:])


def test_basic_sampling(tmp_path):
    """As README has it, from another folder."""
    command = [sys.executable, "-m", "atlas_diffusers.examples.basic_sampling"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for arguments, file in (([], "basic-sampling.png"), (["sheet.png"], "sheet.png")):
        output = subprocess.run(
            [*command, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        )
        assert output.stdout == f"{file}\n"
    with Image.open(tmp_path / "sheet.png") as sheet, Image.open(tmp_path / "basic-sampling.png") as other:
        assert sheet.width > 3 * 160 and sheet == other
    assert paints_a_red_heart(tmp_path / "sheet.png")


def test_conditioning_paints_a_red_heart(tmp_path):
    conditioning.main(str(tmp_path / "sheet.png"))
    assert paints_a_red_heart(tmp_path / "sheet.png")


def test_custom_kernels():
    """In a process of its own: it registers a kernel."""
    command = [sys.executable, "-m", "atlas_diffusers.examples.custom_kernels"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert float(output.split()[-1]) < 1e-2


def test_lora(tmp_path, capsys):
    with torch.random.fork_rng():
        lora.main(str(tmp_path), "2")
    written = load_file(tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    assert int(capsys.readouterr().out.split()[-2]) == sum(value.numel() for value in written.values()) > 1000
    assert all(value.abs().max() > 0 for value in written.values()), "two steps moved every adapter"


def test_a_preset_is_trained_and_drawn_from(tmp_path):
    digits = tmp_path / "digits"
    for i, row in enumerate(load_digits("test").select(range(20))):
        (digits / str(row["label"])).mkdir(parents=True, exist_ok=True)
        row["image"].resize((32, 32)).save(digits / str(row["label"]) / f"{i}.png")
    with torch.random.fork_rng():
        folder = run_training("experiment:cifar10", str(digits), str(tmp_path / "run"), "cpu", 2, **SMALL)
        found = run_inference(folder, num_samples=2, timesteps=2)
        pipeline = AtlasPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    expected = pipeline(num_images_per_prompt=2, num_inference_steps=2, generator=generators, output_type="pt").images
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert found.std() > 0.01
    recipe = json.loads((folder / "recipe.json").read_text())
    assert recipe["max_steps"] == 2 and recipe["dataset"]["root"] == str(digits) and recipe["mixed_precision"] == "no"
    with pytest.raises(ValueError, match="did you mean 'experiment:cifar10'"):
        run_training("experiment:cifar100")
