"""Adapters: only they train, they are written in Diffusers' format, and they act on the pipeline as they did in training."""

import copy

import pytest
import torch
from conftest import build_tiny_pipeline, seeded
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from stock_pipelines import build_stock_pipeline, silence
from test_trainer import assert_same_checkpoints, interrupt_at

from atlas_diffusers import AtlasPipeline
from atlas_diffusers.config import TrainingConfig, validate
from atlas_diffusers.pipelines.latents import encode_latents
from atlas_diffusers.training import Trainer
from atlas_diffusers.training.outputs import build_pipeline

RECIPE = {
    "dataset": {"name": "embedded:emoji", "categories": ["Activities"], "resolution": 8},
    "text_encoder": None,
    "lora": {"rank": 2, "text_encoder_modules": ["q_proj", "v_proj"]},
    "batch_size": 4,
    "max_steps": 3,
    "learning_rate": 1e-1,
    "warmup_steps": 0,
    "lr_scheduler": "constant_with_warmup",
    "ema_decay": 0.5,
    "log_interval": 1,
    "checkpoint_interval": 1,
}


def build(folder, start, **changes):
    recipe = {**copy.deepcopy(RECIPE), "output_dir": str(folder), "init_from": str(start), **changes}
    return Trainer(validate(TrainingConfig, recipe))


@pytest.fixture
def start(tmp_path):
    build_tiny_pipeline().save_pretrained(tmp_path / "start")
    return tmp_path / "start"


def generate(pipeline, prompt="red heart", **options):
    pipeline.to(torch.float64)
    return pipeline(prompt, generator=seeded(), num_inference_steps=2, guidance_scale=1.0, output_type="pt", **options).images


def test_only_adapters_train(start, tmp_path):
    run = build(tmp_path / "run", start)
    before = {name: p.clone() for name, p in run.networks["unet"].named_parameters()}
    expected = sum(
        2 * (module.in_features + module.out_features)
        for network, ends in (("unet", ("to_q", "to_k", "to_v", "to_out.0")), ("text_encoder", ("q_proj", "v_proj")))
        for name, module in getattr(build_tiny_pipeline(), network).named_modules()
        if name.endswith(ends)
    )
    assert sum(p.numel() for p in run.parameters) == expected > 0
    run.train()
    for name, p in run.networks["unet"].named_parameters():
        assert torch.equal(p, before[name]) == ("lora" not in name), name


def test_written_adapters_act_as_the_averaged_ones_of_training(start, tmp_path):
    run = build(tmp_path / "run", start)
    folder = run.train()
    written = {file.name for file in folder.iterdir()}
    assert written - {"curves.png"} == {"README.md", "pytorch_lora_weights.safetensors", "recipe.json"}
    run.ema.copy_to(run.parameters)
    for network in run.networks.values():
        network.eval()
    expected = generate(build_pipeline(run.config, run.components, run.networks))
    pipeline = AtlasPipeline.from_pretrained(start)
    pipeline.scheduler = run.components.scheduler
    plain = generate(pipeline)
    with torch.random.fork_rng():
        pipeline.load_lora_weights(folder)
    torch.testing.assert_close(generate(pipeline), expected)
    assert (expected - plain).abs().max() > 1e-2
    pipeline.set_adapters(pipeline.get_active_adapters(), 0.0)
    torch.testing.assert_close(generate(pipeline), plain)
    pipeline.set_adapters(pipeline.get_active_adapters(), 1.0)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    torch.testing.assert_close(generate(pipeline), expected)


def test_an_interrupted_run_ends_bit_equal(start, tmp_path, monkeypatch):
    build(tmp_path / "whole", start).train()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, 2)
        build(tmp_path / "parts", start).train()
    build(tmp_path / "parts", start).train()
    assert_same_checkpoints(tmp_path / "parts", tmp_path / "whole")


def test_stable_diffusion_gets_adapters_that_its_own_pipeline_loads(tmp_path):
    """Trained on latents of its autoencoder."""
    build_stock_pipeline("text2img").save_pretrained(tmp_path / "stock")
    options = {"dataset": {**RECIPE["dataset"], "resolution": 64}, "max_steps": 2}
    with silence():
        run = build(tmp_path / "run", tmp_path / "stock", **options)
        assert run.components.scheduler.config.beta_schedule == "scaled_linear"
        folder = run.train()
        stock = StableDiffusionPipeline.from_pretrained(tmp_path / "stock")  # of its own: what the builder returns is shared
        arguments = {"num_inference_steps": 2, "output_type": "np", "guidance_scale": 1.0}
        plain = stock("a red heart", generator=seeded(), **arguments).images
        with torch.random.fork_rng():
            stock.load_lora_weights(folder)
        assert abs(stock("a red heart", generator=seeded(), **arguments).images - plain).max() > 1e-4
    names = load_file(folder / "pytorch_lora_weights.safetensors").keys()
    assert any(name.startswith("unet.") for name in names) and any(name.startswith("text_encoder.") for name in names)


def test_latents_are_draws_of_the_encoder_times_its_factor():
    vae = build_stock_pipeline("text2img").vae
    pixels = torch.rand(2, 3, 64, 64, generator=seeded()) * 2 - 1
    with torch.no_grad():
        found = encode_latents(vae, pixels, seeded(1))
        expected = vae.encode(pixels).latent_dist.sample(seeded(1)) * vae.config.scaling_factor
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("changes, message", [
    ({"lora": {"target_modules": ["to_z"]}}, r"AtlasUNet2DModel has no modules named \['to_z'\]"),
    ({"lora": {"rank": 0}}, "lora.rank=0"),
    ({"lora": {"ranks": 4}}, "lora.ranks: unknown key, did you mean 'rank'"),
    ({"guidance_scale": 2.0}, "guidance_scale=2.0: not read of adapters whose network is told no guidance"),
])  # fmt: skip
def test_bad_input_is_named(start, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        build(tmp_path / "run", start, **changes)


def test_adapters_need_a_pipeline_to_adapt(tmp_path):
    with pytest.raises(ValueError, match="lora needs init_from"):
        validate(TrainingConfig, {"output_dir": str(tmp_path), "lora": {}})


def test_alpha_over_rank_scales_the_adapters(start, tmp_path):
    """The same adapters with four times the α move the output four times as far from the pipeline's own, to first order."""
    outputs = {}
    for alpha in (None, 0.002, 0.008):
        lora = {"rank": 2, "target_modules": ["to_q", "to_v"]} | ({"alpha": alpha} if alpha else {})
        run = build(tmp_path / str(alpha), start, lora=lora)
        unet = run.components.unet.double().eval()
        for number, (name, p) in enumerate(unet.named_parameters()):
            if "lora_B" in name:
                p.data.copy_(torch.randn(p.shape, generator=seeded(number)))
        with torch.no_grad():
            states = torch.randn(1, 8, 16, generator=seeded(2)).double()
            outputs[alpha] = unet(torch.randn(1, 3, 8, 8, generator=seeded()).double(), 500, states).sample
            if alpha is None:
                unet.disable_adapters()
                outputs["own"] = unet(torch.randn(1, 3, 8, 8, generator=seeded()).double(), 500, states).sample
    shifts = {alpha: outputs[alpha] - outputs["own"] for alpha in (None, 0.002, 0.008)}
    assert shifts[0.002].norm() > 1e-6
    torch.testing.assert_close(shifts[0.008], 4 * shifts[0.002], rtol=0.05, atol=0.02 * shifts[0.008].abs().max().item())
    assert shifts[None].norm() > 50 * shifts[0.002].norm(), "by default α is the rank"
