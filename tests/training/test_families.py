"""Pipelines of Diffusers are trained by their own losses, and adapters come back into the stock pipelines."""

import copy
import inspect

import diffusers
import pytest
import torch
from conftest import seeded
from diffusers.utils.torch_utils import randn_tensor
from safetensors.torch import load_file
from stock_pipelines import silence
from trainable_pipelines import TRAINABLE, build_flux, save_trainable

from atlas_diffusers.config import TrainingConfig, validate
from atlas_diffusers.training import Trainer, stratified_timesteps
from atlas_diffusers.training.data import time_ids
from atlas_diffusers.training.losses import flow_times
from atlas_diffusers.training.outputs import build_pipeline

KINDS = pytest.mark.parametrize("kind", TRAINABLE)
ADAPTABLE = [kind for kind in TRAINABLE if kind != "PixArt"]
TOWERS = ["q_proj", "v_proj"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Of every kind."""
    folder = tmp_path_factory.mktemp("trainable")
    return {kind: save_trainable(kind, folder) for kind in TRAINABLE}


def recipe(folder, start, kind, **changes):
    adapting = "lora" in changes and "class_images" not in changes
    return {
        "output_dir": str(folder),
        "init_from": str(start),
        "dataset": {"name": "embedded:emoji", "categories": ["Activities"], "resolution": TRAINABLE[kind].resolution},
        "batch_size": 2,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "warmup_steps": 0,
        "lr_scheduler": "constant_with_warmup",
        "ema_decay": 0.5,
        "caption_dropout": 0.0,
        "log_interval": 1,
        **({} if adapting else {"sample_steps": 2, "guidance_scale": 2.0}),
        **changes,
    }


def build(folder, start, kind, **changes):
    return Trainer(validate(TrainingConfig, recipe(folder, start, kind, **changes)))


def batch_of(run, count=3):
    return torch.utils.data.default_collate([run.dataset[i, 11 * i] for i in range(count)])


# ---------------------------------------------------------------------- losses, as Diffusers' examples write them


def ids(tokenizer, texts, length=77):
    return tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids


def clip_states(pipeline, texts, ends):
    """Of each tower the states before the last layer, and what it pools to."""
    outputs = [
        getattr(pipeline, f"text_encoder{end}")(ids(getattr(pipeline, f"tokenizer{end}"), texts), output_hidden_states=True)
        for end in ends
    ]
    return [output.hidden_states[-2] for output in outputs], [output[0] for output in outputs]


def stable_diffusion(p, x, t, texts, batch):
    return p.unet(x, t, p.text_encoder(ids(p.tokenizer, texts))[0]).sample


def stable_diffusion_xl(p, x, t, texts, batch):
    states, pooled = clip_states(p, texts, ("", "_2"))
    added = {"text_embeds": pooled[1], "time_ids": batch["time_ids"].to(x)}
    return p.unet(x, t, torch.cat(states, -1), added_cond_kwargs=added).sample


def stable_diffusion_3(p, x, t, texts, batch):
    states, pooled = clip_states(p, texts, ("", "_2"))
    words, t5 = torch.cat(states, -1), p.text_encoder_3(ids(p.tokenizer_3, texts, 256))[0]
    words = torch.nn.functional.pad(words, (0, t5.shape[-1] - words.shape[-1]))
    return p.transformer(x, torch.cat([words, t5], 1), torch.cat(pooled, -1), t).sample


def flux(p, x, t, texts, batch):
    """Packed by hand: the four latents of a 2x2 patch next to each other, channel by channel."""
    n, c, h, w = x.shape
    packed = x.reshape(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(n, h * w // 4, 4 * c)
    rows, columns = torch.meshgrid(torch.arange(h // 2), torch.arange(w // 2), indexing="ij")
    places = torch.stack([torch.zeros_like(rows), rows, columns], -1)
    states = p.text_encoder_2(ids(p.tokenizer_2, texts, 512))[0]
    output = p.transformer(
        packed, states, p.text_encoder(ids(p.tokenizer, texts)).pooler_output, t / 1000,
        img_ids=places.reshape(-1, 3).to(x), txt_ids=torch.zeros(512, 3).to(x), guidance=torch.full((n,), 2.0),
    ).sample  # fmt: skip
    return output.reshape(n, h // 2, w // 2, c, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(x.shape)


def pixart(p, x, t, texts, batch):
    found = p.tokenizer([text.lower().strip() for text in texts], padding="max_length", max_length=120, return_tensors="pt")
    states = p.text_encoder(found.input_ids, attention_mask=found.attention_mask)[0]
    added = {"resolution": None, "aspect_ratio": None}
    output = p.transformer(x, states, t, added, encoder_attention_mask=found.attention_mask).sample
    return output.chunk(2, dim=1)[0]


def sana(p, x, t, texts, batch):
    before = inspect.signature(p.__call__).parameters["complex_human_instruction"].default
    before = "\n".join(before)
    length = len(p.tokenizer.encode(before)) + 298
    texts = [before + text.lower().strip() for text in texts]
    found = p.tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    states, kept = p.text_encoder(found.input_ids, found.attention_mask)[0], [0, *range(-299, 0)]
    return p.transformer(x, states[:, kept], t, encoder_attention_mask=found.attention_mask[:, kept]).sample


BY_HAND = {
    "SD": stable_diffusion, "SDXL": stable_diffusion_xl, "SD3": stable_diffusion_3, "Flux": flux, "PixArt": pixart,
    "Sana": sana,
}  # fmt: skip


@KINDS
def test_the_loss_is_that_of_the_formula(kind, folders, tmp_path):
    run = build(tmp_path, folders[kind], kind)
    pipeline, batch = run.components.pipeline.to(torch.float64), batch_of(run)
    batch["pixels"] = batch["pixels"].double()
    own = [torch.Generator().manual_seed(draw) for draw in batch["draw"].tolist()]
    with torch.no_grad():
        found = run.objective(batch, seeded(5))
        encoded, config = pipeline.vae.encode(batch["pixels"]), pipeline.vae.config
        data = encoded.latent if kind == "Sana" else encoded.latent_dist.sample(own)
        data = (data - (config.get("shift_factor") or 0)) * config.scaling_factor
        noise = randn_tensor(data.shape, own, data.device, data.dtype)
        if kind in ("SD", "SDXL", "PixArt"):
            t, target = stratified_timesteps(3, 1000, seeded(5)), noise
            alpha_bar = pipeline.scheduler.alphas_cumprod[t].double().reshape(-1, 1, 1, 1)
            alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        else:
            s = flow_times(3, seeded(5)).clamp(0.0005, 0.9995)
            t, target, sigma = s * 1000, noise - data, s.double().reshape(-1, 1, 1, 1)
            alpha = 1 - sigma
        output = BY_HAND[kind](pipeline, alpha * data + sigma * noise, t, batch["text"], batch)
        expected = (output - target).square().mean()
    # levels are those of a float32 table
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert expected > 0.1


@KINDS
def test_a_dropped_caption_is_what_guidance_leads_away_from(kind, folders, tmp_path):
    """The stock pipeline's call with an empty prompt on one side, our conditions of two empty captions on the other."""
    run = build(tmp_path, folders[kind], kind)
    family, pipeline = run.objective.family, run.components.pipeline
    with torch.no_grad():
        mixed, words = family.encode(["a red heart", ""]), family.encode(["a red heart", "frog"])
        guided = {} if kind == "Flux" else {"do_classifier_free_guidance": True}
        asked = {"prompt_2": None} if kind in ("SD3", "Flux") else {}
        asked |= {"prompt_3": None} if kind == "SD3" else {}
        stock = pipeline.encode_prompt([""], device="cpu", num_images_per_prompt=1, **guided, **asked)
    places = {"SD": [1], "SDXL": [1, 3], "SD3": [1, 3], "Flux": [0, 1], "PixArt": [2, 3], "Sana": [2, 3]}[kind]
    for (name, both), place in zip(mixed.items(), places):
        torch.testing.assert_close(both[1:], stock[place], msg=name)
        torch.testing.assert_close(both[0], words[name][0], msg=name)
    assert not torch.equal(next(iter(words.values()))[1], next(iter(mixed.values()))[1])
    if kind == "SDXL":
        assert not mixed["encoder_hidden_states"][1].any(), "Stable Diffusion XL is guided away from zeros"


def test_sizes_and_crops_are_told_as_in_the_paper():
    """A picture of 300x200 becomes 64x64: of its 96 columns 16 are cut off on the left."""
    assert time_ids((300, 200), (64, 64), cropped=True).tolist() == [200, 300, 0, 16, 64, 64]
    assert time_ids((200, 400), (64, 64), cropped=True).tolist() == [400, 200, 32, 0, 64, 64]
    assert time_ids((300, 200), (64, 64), cropped=False).tolist() == [200, 300, 0, 0, 64, 64]


# ---------------------------------------------------------------------- adapters and pipelines that come out


def picture(pipeline, kind):
    pipeline.set_progress_bar_config(disable=True)
    side, options = TRAINABLE[kind].resolution, {"guidance_scale": 2.0, "num_inference_steps": 2, "output_type": "pt"}
    return pipeline("a red heart", generator=seeded(), height=side, width=side, **options, **TRAINABLE[kind].call).images


def load(kind, folder):
    with torch.random.fork_rng():
        return type(TRAINABLE[kind].build()).from_pretrained(folder)


@pytest.mark.parametrize("kind", ADAPTABLE)
def test_the_stock_pipeline_loads_adapters_and_makes_our_picture(kind, folders, tmp_path):
    towers = [] if kind == "Sana" else TOWERS
    lora = {"rank": 2, "rank_pattern": {"to_v": 3}, "text_encoder_modules": towers}
    run = build(tmp_path, folders[kind], kind, lora=lora, learning_rate=1e-1)
    assert run.config.objective == ("flow_matching" if kind in ("SD3", "Flux", "Sana") else "denoising")
    folder = run.train()
    stock = load(kind, folders[kind]).to(torch.float64)
    plain = picture(stock, kind)
    with torch.random.fork_rng():
        stock.load_lora_weights(folder)
    stock.to(torch.float64)
    with run.averaged() as networks:
        ours = build_pipeline(run.config, run.components, networks)
        expected = picture(ours.pipeline.to(torch.float64), kind)
    found = picture(stock, kind)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert (found - plain).abs().max() > 1e-3, "the adapters change the picture"
    stock.fuse_lora(components=[name for name in stock._lora_loadable_modules if getattr(stock, name, None) is not None])
    stock.unload_lora_weights()
    torch.testing.assert_close(picture(stock, kind), expected, rtol=0, atol=1e-6)
    names = {name.split(".")[0] for name in load_file(folder / "pytorch_lora_weights.safetensors")}
    encoders = {name for name in stock._lora_loadable_modules if name.startswith("text_encoder")}
    assert names == {run.components.family.network} | (encoders if towers else set())


def test_ranks_by_module(folders, tmp_path):
    run = build(tmp_path, folders["SD3"], "SD3", lora={"rank": 2, "rank_pattern": {"attn.to_v": 5, "to_out.0": 1}})
    ranks = {
        name.split(".lora_A")[0].rpartition("attn.")[2]: len(p) for name, p in run.networks["transformer"].named_parameters()
        if "lora_A" in name
    }  # fmt: skip
    assert ranks == {"to_q": 2, "to_k": 2, "to_v": 5, "to_out.0": 1}
    scales = {m.scaling["default"] for m in run.networks["transformer"].modules() if hasattr(m, "scaling")}
    assert scales == {1.0}, "by default α is the rank, also where the rank is another one"


@pytest.mark.parametrize("kind", ["SDXL", "PixArt", "Flux"])
def test_a_whole_pipeline_is_trained_and_stays_what_it_was(kind, folders, tmp_path):
    run = build(tmp_path, folders[kind], kind, sample_interval=2, sample_prompts=["a red heart"], learning_rate=1e-1)
    frozen = {id(p): p.clone() for module in run.components.others for p in module.parameters()}
    folder = run.train()
    trained = load(kind, folder)
    original = load(kind, folders[kind])
    network = run.components.family.network
    before, after = (dict(getattr(pipeline, network).named_parameters()) for pipeline in (original, trained))
    assert before.keys() == after.keys() and any(not torch.equal(before[name], after[name]) for name in before)
    assert type(trained.scheduler) is type(original.scheduler)
    assert len(frozen) > 10 and all(
        torch.equal(p, frozen[id(p)]) for module in run.components.others for p in module.parameters()
    )
    towers = [pipeline.text_encoder.state_dict() for pipeline in (original, trained)]
    assert all(torch.equal(value, towers[1][name]) for name, value in towers[0].items()), "text encoders stay by default"
    assert (tmp_path / "sample-000002.png").exists()
    assert (picture(original, kind) - picture(trained, kind)).abs().max() > 1e-3


def test_text_encoders_train_where_asked(folders, tmp_path):
    run = build(tmp_path, folders["SDXL"], "SDXL", train_text_encoder=True, max_steps=1)
    assert list(run.networks) == ["unet", "text_encoder", "text_encoder_2"]
    before = {name: copy.deepcopy(run.networks[name].state_dict()) for name in ("text_encoder", "text_encoder_2")}
    run.train()
    for name, state in before.items():
        assert any(not torch.equal(value, run.networks[name].state_dict()[key]) for key, value in state.items()), name


@pytest.mark.parametrize("kind", ["SDXL", "Flux", "Sana"])
def test_caches_train_as_fresh_ones(kind, folders, tmp_path):
    cached = {"cache_latents": True, "cache_text_embeddings": True}
    runs = [build(tmp_path / str(i), folders[kind], kind, **options) for i, options in enumerate(({}, cached))]
    with torch.no_grad():
        losses = [run.objective(batch_of(run), seeded()) for run in runs]
    # batches of another size are rounded differently
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------- prior preservation


def test_class_pictures_are_made_once_and_their_loss_is_added(folders, tmp_path):
    asked = {"prompt": "a toy", "count": 3, "weight": 0.5}
    options = {"lora": {"rank": 2}, "class_images": asked}
    run = build(tmp_path / "run", folders["SD"], "SD", **options)
    files = sorted((tmp_path / "run" / "class_images").iterdir())
    assert [file.name for file in files] == ["00000.png", "00001.png", "00002.png"]
    batch = batch_of(run)
    other = batch["class_picture"]
    assert other["text"] == ["a toy"] * 3 and batch["text"][0] != "a toy"
    plain = {name: value for name, value in batch.items() if name != "class_picture"}
    with torch.no_grad():
        generator = seeded()
        expected = run.objective(plain, generator) + 0.5 * run.objective(other, generator)
        assert run.objective(batch, seeded()) == expected
    bytes_before = [file.read_bytes() for file in files]
    options["class_images"] = {**asked, "root": str(files[0].parent)}
    again = build(tmp_path / "again", folders["SD"], "SD", **options)
    assert [file.read_bytes() for file in files] == bytes_before and not (tmp_path / "again" / "class_images").exists()
    again.train()


def test_one_caption_for_every_picture(folders, tmp_path):
    data = recipe(tmp_path, folders["SD"], "SD")["dataset"] | {"caption": "a photo of sks toy", "caption_column": None}
    run = build(tmp_path, folders["SD"], "SD", dataset=data)
    assert batch_of(run)["text"] == ["a photo of sks toy"] * 3


# ---------------------------------------------------------------------- mistakes


@pytest.mark.parametrize("kind, changes, message", [
    ("PixArt", {"lora": {}}, "PixArtAlphaPipeline has no load_lora_weights"),
    ("SD3", {"objective": "denoising"}, "a StableDiffusion3Pipeline learned a flow"),
    ("Flux", {"lora": {"rank_pattern": {"to_z": 4}}}, r"no module with an adapter matches \['to_z'\]"),
    ("Sana", {"lora": {"text_encoder_modules": ["q_proj"]}}, "no text encoder that could have adapters"),
    ("Flux", {"dataset": {"name": "embedded:emoji", "resolution": 15}}, "must be a multiple of 2"),
    ("SDXL", {"dataset": {"name": "embedded:emoji", "resolution": 64, "channels": 1}}, "autoencoder has in_channels=3"),
    ("SD", {"class_images": {"prompt": "a toy", "number": 3}}, "class_images.number: unknown key"),
])  # fmt: skip
def test_mistakes_are_named(kind, changes, message, folders, tmp_path):
    with pytest.raises(ValueError, match=message):
        build(tmp_path, folders[kind], kind, **changes)


def test_other_transformers_are_refused_by_name(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    with pytest.raises(ValueError, match="is a WanPipeline; trained are StableDiffusionPipeline, "):
        build(tmp_path / "run", tmp_path, "SD")


@pytest.mark.skipif(bool(__import__("importlib").util.find_spec("bitsandbytes")), reason="bitsandbytes is installed")
def test_quantised_networks_need_bitsandbytes(folders, tmp_path):
    with pytest.raises(ImportError, match="lora.quantize='4bit' needs bitsandbytes"):
        build(tmp_path, folders["SD"], "SD", lora={"quantize": "4bit"})


def test_a_network_without_guidance_input_is_told_none(tmp_path):
    with torch.random.fork_rng():
        build_flux(guidance=False).save_pretrained(tmp_path / "start")
    run = build(tmp_path / "run", tmp_path / "start", "Flux", max_steps=1)
    with silence():
        run.train()
    assert isinstance(run.components.pipeline, diffusers.FluxPipeline)
