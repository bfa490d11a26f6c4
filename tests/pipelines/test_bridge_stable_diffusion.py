"""The bridge as a ``custom_pipeline`` on a Stable Diffusion folder: references are pictures, encoded by its VAE."""

import copy
from pathlib import Path

import pytest
import torch
from conftest import seeded
from diffusers import DiffusionPipeline
from stock_pipelines import build_stock_pipeline

CUSTOM = str(Path(__file__).parents[2] / "pipelines" / "atlas_pipeline.py")


@pytest.fixture(scope="module")
def bridged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stable-diffusion")
    build_stock_pipeline("text2img").save_pretrained(folder)
    pipeline = DiffusionPipeline.from_pretrained(folder, custom_pipeline=CUSTOM, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(torch.float64)


def test_references_are_encoded_and_reached(bridged):
    pictures = torch.rand(3, 3, 64, 64, generator=seeded(2), dtype=torch.float64) * 2 - 1
    with torch.no_grad():
        latents = bridged.vae.encode(pictures).latent_dist.mode() * bridged.vae.config.scaling_factor
    weights = torch.tensor([0.0, 1.0, 0.0])
    out = bridged("a red heart", num_images_per_prompt=2, num_inference_steps=4, references=pictures, reference_weights=weights,
                  bridge={"gate": 1.0}, generator=seeded(), output_type="latent")  # fmt: skip
    assert out.bridge.network_calls == 0
    # Stable Diffusion's configuration ends at training timestep 0, whose noise is what remains
    scale = bridged.scheduler.alphas_cumprod[0] ** 0.5
    noise = (1 - bridged.scheduler.alphas_cumprod[0]) ** 0.5
    torch.testing.assert_close(out.images, (scale * latents[1:2]).expand(2, -1, -1, -1), rtol=0, atol=6 * noise.item())


def test_without_references_it_is_stable_diffusion(bridged):
    stock = copy.deepcopy(build_stock_pipeline("text2img")).to(torch.float64)
    stock.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 3, "guidance_scale": 5.0, "output_type": "latent", "negative_prompt": "blurry"}
    expected = stock("a red heart", generator=seeded(3), **options).images
    actual = bridged("a red heart", generator=seeded(3), **options).images
    torch.testing.assert_close(actual, expected)
