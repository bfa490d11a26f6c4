"""Noise paired with a whole data set: potentials against closed forms, and training with the pairs."""

import json
import math

import pytest
import torch
from conftest import seeded
from diffusers import AutoencoderTiny
from hypothesis import given, settings
from hypothesis import strategies as st
from test_trainer import build, interrupt_at

from atlas_diffusers.config import TrainingConfig, validate
from atlas_diffusers.training import semidiscrete
from atlas_diffusers.training.semidiscrete import SemidiscreteCoupling, coupled_noise

DIGITS = {
    "dataset": {
        "name": "embedded:digits", "label_column": "label", "caption_column": None, "aliases_column": None, "resolution": 8,
        "channels": 1, "random_flip": False, "categories": None,
    },
    "text_encoder": None, "objective": "flow_matching", "scheduler": None, "min_snr_gamma": None, "coupling": "semidiscrete",
    "model": {
        "channel_mult": [1], "attention_levels": [], "cross_attention_levels": [], "addition_embed_type": None,
        "num_class_embeds": 10,
    },
}  # fmt: skip


def test_points_on_a_line_share_the_noise_by_its_quantiles():
    """Between N(0, 1) and n points on a line the map is monotone: point k gets the noise between quantiles k/n and (k+1)/n."""
    points = torch.tensor([[3.0], [-1.0], [0.5], [7.0], [2.0]])
    coupling = SemidiscreteCoupling(points).fit(samples=4000)
    borders = torch.special.ndtri(torch.arange(1, 5, dtype=torch.float64) / 5)
    order = points[:, 0].argsort()
    y, g = points[order, 0].double(), coupling.potentials[order].double()
    # neighbours j and k score the same where x = (g_j − g_k)/(y_k − y_j)
    torch.testing.assert_close(-g.diff() / y.diff(), borders, rtol=0, atol=0.03)
    noise = torch.randn(20_000, 1, generator=seeded(1))
    found = points[coupling.pair(noise), 0]
    assert bool((found[noise[:, 0].argsort()].diff() >= 0).all())


def test_every_point_gets_its_share_of_the_noise():
    points = torch.randn(300, 16, generator=seeded()) * torch.linspace(0.2, 3, 300)[:, None]
    uneven, fitted = SemidiscreteCoupling(points), SemidiscreteCoupling(points).fit()
    off = [(c.masses(60_000, seeded(5)) * 300 - 1).abs().mean().item() for c in (uneven, fitted)]
    # 200 draws a point are off by sqrt(2/(200π)) on average when the masses are exact
    assert off[0] > 1 and off[1] < 2 * math.sqrt(2 / (200 * math.pi))


def test_pairs_are_nearer_than_those_of_chance():
    points = torch.randn(500, 4, generator=seeded()) @ torch.diag(torch.tensor([3.0, 1.0, 1.0, 0.3]))
    coupling, noise = SemidiscreteCoupling(points).fit(samples=100), torch.randn(4000, 4, generator=seeded(1))
    cost = (noise - points[coupling.pair(noise)]).square().sum(1).mean().item()
    # E |x − y|² of Gaussians: Σ (1 − s)² under the optimal map, Σ (1 + s²) by chance
    assert cost == pytest.approx(2**2 + 0.7**2, rel=0.3) and cost < 0.5 * (2 + 9 + 2 + 1 + 0.09)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 99), st.integers(1, 70), st.integers(1, 70))
def test_blocks_and_files_change_nothing(seed, block, size):
    points, g = torch.randn(60, 3, generator=seeded(seed)), torch.randn(60, generator=seeded(seed + 1))
    noise = torch.randn(20, 3, generator=seeded(seed + 2))
    expected = (noise @ points.T + g).argmax(1)
    before, semidiscrete.BLOCK = semidiscrete.BLOCK, block
    try:
        assert torch.equal(SemidiscreteCoupling(points.split(size), g).pair(noise), expected)
    finally:
        semidiscrete.BLOCK = before


def test_conditions_keep_pairs_within_their_kind(tmp_path):
    points = torch.cat([torch.randn(40, 3, generator=seeded()) - 2, torch.randn(80, 3, generator=seeded(1)) + 2])
    labels = torch.nn.functional.one_hot((torch.arange(120) >= 40).long()).float()
    asked, noise = torch.randint(120, (3000,), generator=seeded(2)), torch.randn(3000, 3, generator=seeded(3))
    free = SemidiscreteCoupling(points, None, labels, 0.0).fit(samples=200)
    bound = SemidiscreteCoupling(points, None, labels, 20.0).fit(samples=200)
    assert ((free.pair(noise, asked) >= 40) == (asked >= 40)).float().mean() < 0.7
    found = bound.pair(noise, asked)
    assert bool(((found >= 40) == (asked >= 40)).all())
    for kind in (0, 1):  # within a kind all noise is met, as when a kind is asked for
        own = noise[(asked >= 40) == bool(kind)]
        assert own.mean().abs() < 0.1 and own.std() == pytest.approx(1, abs=0.05)
    assert (torch.bincount(found, minlength=120)[:40].float().mean() / torch.bincount(found, minlength=120)[40:].float().mean()
            == pytest.approx(1, abs=0.1))  # fmt: skip
    bound.save(tmp_path / "c.safetensors")
    assert torch.equal(SemidiscreteCoupling.load(tmp_path / "c.safetensors").pair(noise, asked), found)


def test_the_noise_of_a_place_is_its_own():
    noise = coupled_noise([3, 4, 3], (2, 5))
    assert torch.equal(noise[0], noise[2]) and not torch.equal(noise[0], noise[1])
    assert not torch.equal(noise[0], torch.randn(2, 5, generator=seeded(3)))


def test_a_run_trains_on_the_pairs_and_resumes_exactly(tmp_path, monkeypatch):
    data = DIGITS["dataset"] | {"split": "test"}
    changes = DIGITS | {"max_steps": 4, "checkpoint_interval": 1, "batch_size": 16, "dataset": data}
    monkeypatch.setattr(semidiscrete, "SAMPLES_OF_POINT", 20)
    run = build(tmp_path / "whole", **changes)
    assert (tmp_path / "whole" / "cache").is_dir() and run.coupling.count == len(run.dataset)
    seen, loss = [], type(run.objective).loss

    def watched(self, data, batch, *rest):
        seen.append((data, batch))
        return loss(self, data, batch, *rest)

    monkeypatch.setattr(type(run.objective), "loss", watched)
    run.train()
    data, batch = seen[0]
    noise = coupled_noise(batch["draw"].tolist(), data.shape[1:]).flatten(1)
    paired, chance = (noise * data.flatten(1)).sum(1).mean(), (noise * data.flatten(1).roll(1, 0)).sum(1).mean()
    assert paired > chance + 2, "noise and picture point the same way"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, 3)
        build(tmp_path / "parts", **changes).train()
    build(tmp_path / "parts", **changes).train()
    rows = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "parts")]
    assert [json.loads(row)["loss"] for row in rows[0]] == [json.loads(row)["loss"] for row in rows[1]]


def test_noise_is_paired_with_cached_latents(tmp_path, monkeypatch):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoencoderTiny(latent_channels=4, scaling_factor=0.5).save_pretrained(tmp_path / "vae")
    changes = {
        "vae": str(tmp_path / "vae"), "objective": "flow_matching", "scheduler": None, "min_snr_gamma": None, "batch_size": 16,
        "model": {"patch_size": 1, "attention_levels": []}, "dataset": {"resolution": 64, "random_flip": False},
        "coupling": "semidiscrete", "coupling_condition_weight": 0.0,
    }  # fmt: skip
    with pytest.raises(ValueError, match="pairs noise with latents, which must be known: give cache_latents: true"):
        build(tmp_path / "fresh", **changes)
    monkeypatch.setattr(semidiscrete, "SAMPLES_OF_POINT", 20)
    run = build(tmp_path / "cached", cache_latents=True, **changes)
    points, vae = torch.cat(run.coupling.parts), run.components.vae
    assert points.shape == (len(run.dataset), 4 * 8 * 8)
    with torch.no_grad():
        expected = vae.encode(torch.stack([run.plain[i, 0]["pixels"] for i in range(5)])).latents / 2
    torch.testing.assert_close(points[:5], expected.flatten(1), rtol=0, atol=1e-5)
    batch, seen = next(iter(run._loader())), []
    monkeypatch.setattr(run.objective, "loss", lambda data, *rest: seen.append(data))
    run.objective(batch, seeded())
    noise = coupled_noise(batch["draw"].tolist(), (points.shape[1],))
    torch.testing.assert_close(seen[0].flatten(1), points[run.coupling.pair(noise)], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"dataset": {"random_flip": True}}, "coupling='semidiscrete' cannot be used with dataset.random_flip"),
        ({"num_resolutions": 2, "offset_noise": 0.1}, "cannot be used with num_resolutions, offset_noise"),
        ({"coupling": "independent", "coupling_condition_weight": 1.0}, "weight=1.0.*without coupling"),
    ],
)
def test_what_it_cannot_pair_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        validate(TrainingConfig, {"coupling": "semidiscrete", **changes})
