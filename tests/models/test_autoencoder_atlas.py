"""The autoencoder of patches: at first the principal components, then what training adds."""

import pytest
import torch
import torch.nn.functional as F
from conftest import seeded

from atlas_diffusers import AtlasAutoencoder, AtlasEulerScheduler, AtlasPipeline, AtlasTransformer2DModel
from atlas_diffusers.training.sections import load_autoencoder, pixels_of_latent


def small(**changes) -> AtlasAutoencoder:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AtlasAutoencoder(**{"latent_channels": 5, "block_out_channels": (8, 8, 8, 8), **changes})


def pictures(count: int = 12) -> torch.Tensor:
    """Smooth ones, whose components differ in size."""
    coarse = torch.randn(count, 3, 5, 5, generator=seeded(1), dtype=torch.float64)
    return F.interpolate(coarse, (16, 24), mode="bicubic").clamp(-1, 1)


def test_components_are_the_best_linear_autoencoder():
    vae, x = small().double(), pictures()
    vae.set_components(x)
    mean = x.mean((0, 2, 3), keepdim=True)
    patches = F.unfold(x - mean, 8, stride=8).transpose(1, 2).flatten(0, 1)
    u, s, v = torch.linalg.svd(patches, full_matrices=False)
    best = (u[:, :5] * s[:5]) @ v[:5]
    expected = mean + F.fold(best.unflatten(0, (12, -1)).transpose(1, 2), (16, 24), 8, stride=8)
    torch.testing.assert_close(vae(x).sample, expected)
    latents = vae.encode(x).latents
    spread = latents.square().mean((0, 2, 3))
    torch.testing.assert_close(spread, s[:5] / s[:5].mean())


def test_convolutions_begin_at_nothing_and_learn():
    vae, x = small().double(), pictures()
    vae.set_components(x)
    before = (vae(x).sample - x).square().mean()
    optimizer = torch.optim.Adam([*vae.encoder.parameters(), *vae.decoder.parameters()], lr=3e-3)
    for _ in range(30):
        optimizer.zero_grad()
        loss = (vae(x).sample - x).square().mean()
        loss.backward()
        optimizer.step()
    assert (vae(x).sample - x).square().mean() < 0.9 * before
    assert vae.encoder[-1].weight.abs().max() > 0


def test_a_pipeline_saves_and_loads_it(tmp_path):
    vae = small()
    vae.set_components(pictures().float())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = AtlasTransformer2DModel(2, 5, 5, width=16, num_layers=1, num_heads=1, patch_size=1)
    pipeline = AtlasPipeline(network, AtlasEulerScheduler(use_flow_sigmas=True), vae=vae)
    pipeline.save_pretrained(tmp_path)
    loaded = AtlasPipeline.from_pretrained(tmp_path)
    x = torch.rand(2, 3, 16, 16, generator=seeded(2))
    torch.testing.assert_close(loaded.vae(x).sample, vae(x).sample)
    assert pixels_of_latent(load_autoencoder(str(tmp_path))) == loaded.vae_scale_factor == 8
    images = loaded(num_inference_steps=2, generator=seeded(3), output_type="pt").images
    latents = loaded(num_inference_steps=2, generator=seeded(3), output_type="latent").images
    torch.testing.assert_close(images, (vae.decode(latents).sample / 2 + 0.5).clamp(0, 1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("widths", [(8, 8, 8), (8, 8, 8, 16)])
def test_widths_that_do_not_fit(widths):
    with pytest.raises(ValueError, match="expected at least four equal widths"):
        small(block_out_channels=widths)
