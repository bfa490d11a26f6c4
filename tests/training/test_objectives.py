"""What a batch teaches: labels, latents, several resolutions, bridges between two data sets."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import build_tiny_unet, seeded
from datasets import Dataset, Features, Image, Value
from diffusers import AutoencoderTiny, FlowMatchEulerDiscreteScheduler, VQModel
from safetensors.torch import load_file
from stock_pipelines import build_stock_pipeline, silence
from test_trainer import build, recipe

from atlas_diffusers import AtlasBridgePipeline, AtlasDDIMScheduler, AtlasPipeline, AtlasTransformer2DModel, AtlasUNet2DModel
from atlas_diffusers.config import DatasetConfig, TrainingConfig, validate
from atlas_diffusers.training import BridgePairs, PictureDataset, Trainer, bridge_objectives, networks, objectives, trainer
from atlas_diffusers.training.caching import CachedPictures, CaptionCache, TensorCache
from atlas_diffusers.training.families import Own
from atlas_diffusers.training.family import Components
from atlas_diffusers.training.sections import load_autoencoder

PLAIN = {"text_encoder": None, "model": {"cross_attention_levels": [], "addition_embed_type": None}}


def batch_of(run, count=6):
    items = [run.dataset[i, 11 * i] for i in range(count)]
    return torch.utils.data.default_collate(items)


def record(run, monkeypatch):
    """What the network is called with."""
    calls, unet = [], run.objective.wrapped["unet"]

    def watched(sample, timesteps, context, class_labels=None):
        calls.append((sample, timesteps, context, class_labels))
        return unet(sample, timesteps, context, class_labels=class_labels)

    monkeypatch.setitem(run.objective.wrapped, "unet", watched)
    return calls


# ---------------------------------------------------------------------- labels and grey pictures


def digits(**changes):
    return {
        **PLAIN,
        "dataset": {
            "name": "embedded:digits", "categories": None, "aliases_column": None, "caption_column": None,
            "label_column": "label", "resolution": 8, "channels": 1, "random_flip": False,
        },
        "model": {**PLAIN["model"], "num_class_embeds": 10, "patch_size": 1, "attention_levels": []},
        **changes,
    }  # fmt: skip


def test_labels_reach_the_network_or_are_dropped(tmp_path, monkeypatch):
    run = build(tmp_path, **digits(caption_dropout=0.4))
    batch = {name: value.repeat(40, *[1] * (value.ndim - 1)) for name, value in batch_of(run, 10).items() if name != "text"}
    batch["draw"] = torch.arange(400)
    calls = record(run, monkeypatch)
    with torch.no_grad():
        run.objective(batch, seeded())
    labels = calls[0][3]
    assert set(labels[labels != batch["label"]].tolist()) == {10}
    assert abs((labels == 10).float().mean() - 0.4) < 5 * math.sqrt(0.24 / 400)


def test_a_network_of_digits_is_trained_and_loaded(tmp_path):
    run = build(tmp_path, **digits(max_steps=2, sample_interval=2, sample_steps=2))
    folder = run.train()
    config = AtlasUNet2DModel.load_config(folder / "unet")
    assert (config["in_channels"], config["out_channels"], config["num_class_embeds"]) == (1, 1, 10)
    saved = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    names = dict(run.components.unet.named_parameters())
    averages = {id(p): average for p, average in zip(run.parameters, run.ema.shadow_params)}
    assert saved.keys() == names.keys() and all(torch.equal(saved[n], averages[id(p)]) for n, p in names.items())
    assert (tmp_path / "sample-000002.png").exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"dataset": {"resolution": 30}}, "dataset.resolution=30 must be a multiple of 4"),
        ({"dataset": {"label_column": "category"}}, "label_column='category' and num_class_embeds=None"),
        ({"dataset": {"channels": 1}, "model": {"in_channels": 3}}, "dataset.channels=1, but the network has in_channels=3"),
        ({"num_resolutions": 5}, "dataset.resolution=32 must be a multiple of 64"),
    ],
)
def test_data_that_the_network_cannot_take(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        build(tmp_path, **changes)


# ---------------------------------------------------------------------- several resolutions


def test_resolutions_are_drawn_equally_and_pictures_averaged(tmp_path, monkeypatch):
    run = build(tmp_path, num_resolutions=3)
    calls, seen, losses = record(run, monkeypatch), [], []
    plain = objectives.denoising_loss
    monkeypatch.setattr(objectives, "denoising_loss", lambda *args: (losses.append(args), plain(*args))[1])
    batch = batch_of(run, 2)
    with torch.no_grad():
        for step in range(90):
            run.objective(batch, torch.Generator().manual_seed(step))
    for sample, *_ in calls:
        seen.append(sample.shape[-1])
    assert run.objective._halved(torch.zeros(1, 1, 32, 32), 3).shape == (1, 1, 4, 4)
    for size in (32, 16, 8):
        assert abs(seen.count(size) / 90 - 1 / 3) < 5 * math.sqrt(2 / 9 / 90)
    for (sample, timesteps, *_), (_, data, noise, *_) in zip(calls, losses):
        torch.testing.assert_close(data, F.adaptive_avg_pool2d(batch["pixels"], sample.shape[-1]))
        alpha, sigma = run.components.scheduler.levels_at(timesteps, data)
        torch.testing.assert_close(sample, alpha * data + sigma * noise)


def test_processes_share_the_timesteps_of_a_step(tmp_path, monkeypatch):
    """Those of two processes, one after the other, are those of one with twice the batch."""
    run, parts = build(tmp_path), []
    whole = run.objective._timesteps(8, seeded())
    for rank in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(type(run.accelerator), "num_processes", 2)
            patch.setattr(type(run.accelerator), "process_index", rank)
            parts.append(run.objective._timesteps(4, seeded()))
    assert torch.equal(torch.cat(parts), whole) and len(whole.unique()) == 8


def test_the_saved_network_knows_its_resolutions(tmp_path):
    folder = build(tmp_path, max_steps=1, num_resolutions=2).train()
    assert AtlasUNet2DModel.load_config(folder / "unet")["num_resolutions"] == 2


# ---------------------------------------------------------------------- caches


@pytest.fixture(scope="module")
def latent_pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stock")
    with silence():
        build_stock_pipeline("text2img").save_pretrained(folder)
    return folder


def adapt(folder, start, **changes):
    data = {
        **recipe(folder), "init_from": str(start), "model": {}, "text_encoder": None, "scheduler": None,
        "train_text_encoder": False, "max_steps": 2, "batch_size": 4,
    }  # fmt: skip
    data["dataset"] = {**data["dataset"], "resolution": 64}
    with silence():
        return Trainer(validate(TrainingConfig, {**data, **changes}))


def test_cached_latents_and_captions_train_as_fresh_ones(tmp_path, latent_pipeline, monkeypatch):
    """In float64, where batches of another size differ by 1e-15 and what follows amplifies that by less than 1e5."""

    def doubled(*arguments):
        found = networks.build_components(*arguments)
        for part in (found.unet, found.text_encoder, found.vae):
            part.double()
        return found

    monkeypatch.setattr(trainer, "build_components", doubled)
    plain = adapt(tmp_path / "plain", latent_pipeline)
    cached = adapt(tmp_path / "cached", latent_pipeline, cache_latents=True, cache_text_embeddings=True)
    assert isinstance(cached.dataset, CachedPictures)
    items = [(i, 5 * i) for i in range(6)]
    batches = [torch.utils.data.default_collate([run.dataset[item] for item in items]) for run in (plain, cached)]
    assert batches[0]["text"] == batches[1]["text"] and "pixels" not in batches[1]
    batches[0]["pixels"] = batches[0]["pixels"].double()
    with torch.no_grad():
        losses = [run.objective(batch, seeded()) for run, batch in zip((plain, cached), batches)]
    assert losses[0] > 0.1 and losses[0].dtype is torch.float64
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-10, atol=0)


def test_latents_without_variance_are_cached_as_they_are(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoencoderTiny(latent_channels=4, scaling_factor=0.5).save_pretrained(tmp_path / "vae")
    changes = {"vae": str(tmp_path / "vae"), "model": {"patch_size": 1, "attention_levels": []}, "dataset": {"resolution": 64}}
    plain, cached = (build(tmp_path / f"{flag}", cache_latents=flag, **changes) for flag in (False, True))
    batches = [torch.utils.data.default_collate([run.dataset[i, 5 * i] for i in range(6)]) for run in (plain, cached)]
    own = [seeded(i) for i in range(6)]
    found = [run.objective._encoded(batch, "pixels", own) for run, batch in zip((plain, cached), batches)]
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(found[0], plain.components.vae.encode(batches[0]["pixels"]).latents / 2)


def test_autoencoders_of_other_classes_are_refused(tmp_path):
    with torch.random.fork_rng():
        VQModel(block_out_channels=(8,), norm_num_groups=8).save_pretrained(tmp_path / "vae")
    with pytest.raises(ValueError, match="class VQModel; allowed are AutoencoderKL, AutoencoderTiny"):
        load_autoencoder(str(tmp_path / "vae"))


def test_a_cache_is_made_once(tmp_path, latent_pipeline, monkeypatch):
    options = {"cache_latents": True, "cache_text_embeddings": True}
    first = adapt(tmp_path, latent_pipeline, **options)
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*.safetensors")}
    assert len(files) == 2
    monkeypatch.setattr(type(first.components.vae), "encode", lambda *a: pytest.fail("encoded again"))
    second = adapt(tmp_path, latent_pipeline, **options)
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*.safetensors")} == files
    assert torch.equal(first.dataset[3, 9]["moments"], second.dataset[3, 9]["moments"])
    monkeypatch.undo()
    data = {**first.config.dataset.model_dump(), "random_flip": False}
    third = adapt(tmp_path, latent_pipeline, **options, dataset=data)
    assert len(list((tmp_path / "cache").iterdir())) == 3, "other data, another cache"
    assert torch.equal(third.dataset[3, 9]["moments"], first.dataset.moments[6]["moments"])


def test_rows_of_a_cache_are_those_computed(tmp_path, monkeypatch):
    monkeypatch.setattr("atlas_diffusers.training.caching.ROWS_OF_SHARD", 5)
    monkeypatch.setattr("atlas_diffusers.training.caching.ROWS_OF_BATCH", 2)
    calls = []

    def compute(places):
        calls.extend(places)
        return {"pair": torch.tensor([[place, -place] for place in places]), "one": torch.tensor(list(places))}

    cache = TensorCache(tmp_path, 12, compute)
    assert [cache[i]["pair"].tolist() for i in range(12)] == [[i, -i] for i in range(12)] and calls == list(range(12))
    assert [int(cache[i]["one"]) for i in range(12)] == list(range(12))
    assert sorted(file.name for file in tmp_path.iterdir()) == [f"{i:05d}.safetensors" for i in range(3)]
    (tmp_path / "00001.safetensors").unlink()
    calls.clear()
    assert TensorCache(tmp_path, 12, compute)[7]["pair"].tolist() == [7, -7] and calls == [5, 6, 7, 8, 9]


def test_cached_captions_are_the_encoders(tmp_path, latent_pipeline):
    pipeline = build_stock_pipeline("text2img")
    def encode(texts):
        return {"states": pipeline.encode_prompt(texts, "cpu", 1, False)[0], "lengths": torch.tensor([len(t) for t in texts])}

    cache = CaptionCache(["red heart", "frog"], encode, tmp_path, "an encoder")
    found = cache(["frog", "", "frog"])
    assert found["lengths"].tolist() == [4, 0, 4]
    with silence():
        expected = pipeline.encode_prompt(["frog", "", "frog"], "cpu", 1, False)[0]
    torch.testing.assert_close(found["states"], expected)


def test_caches_where_they_cannot_be(tmp_path):
    for changes, message in (
        ({"cache_text_embeddings": True}, "needs a text encoder that does not train"),
        ({"cache_latents": True, "dataset": {"skip_bad_images": True}}, "reads every picture"),
        ({"train_text_encoder": False}, "needs init_from"),
        ({"cache_text_embeddings": True, "dataset": {"streaming": True}}, "needs to know every caption"),
        ({"cache_latents": True}, "needs an autoencoder"),
        ({"coupling_epsilon": 0.1}, "coupling_epsilon=0.1: not read without coupling='sinkhorn'"),
    ):
        with pytest.raises(ValueError, match=message):
            build(tmp_path, **changes)
    network, scheduler = build_tiny_unet(cross_attention_dim=None, cross_attention_levels=[]), AtlasDDIMScheduler()
    AtlasPipeline(network, scheduler).save_pretrained(tmp_path / "start")
    for changes, message in (
        ({"cache_latents": True}, "has no autoencoder"),
        ({"cache_text_embeddings": True}, "there is no text encoder"),
        ({"text_encoder": {"hidden_size": 64}}, "not both: init_from brings its own text encoder"),
    ):
        with pytest.raises(ValueError, match=message):
            adapt(tmp_path, tmp_path / "start", sample_prompts=[], **changes)


# ---------------------------------------------------------------------- bridges


def bridge(folder, **changes):
    data = recipe(folder, **PLAIN, objective="bridge_matching", **changes)
    source = {**data["dataset"], "categories": ["Symbols"], "caption_column": None, "aliases_column": None}
    return {**data, "source_dataset": source, "scheduler": None, "min_snr_gamma": None} | {
        key: value for key, value in changes.items() if key == "source_dataset"
    }


def build_bridge(folder, **changes):
    return Trainer(validate(TrainingConfig, bridge(folder, **changes)))


def test_the_bridge_loss_is_its_formula(tmp_path, monkeypatch):
    run = build_bridge(tmp_path, bridge_sigma=0.3)
    batch, calls, drawn = batch_of(run), record(run, monkeypatch), []
    plain = bridge_objectives.randn_tensor
    monkeypatch.setattr(bridge_objectives, "randn_tensor", lambda *args: (drawn.append(plain(*args)), drawn[-1])[1])
    with torch.no_grad():
        loss = run.objective(batch, seeded())
        (x, time, *_), noise = calls[0], drawn[0]
        s = (time / 1000).double().reshape(-1, 1, 1, 1)
        assert time.min() > 0 and time.max() < 1000
        data, source = batch["pixels"].double(), batch["source"].double()
        spread = 0.3 * (s * (1 - s)).sqrt()
        torch.testing.assert_close(x.double(), (1 - s) * data + s * source + spread * noise, rtol=1e-5, atol=1e-5)
        velocity = source - data + 0.3 * (1 - 2 * s) / (2 * (s * (1 - s)).sqrt()) * noise
        output = run.networks["unet"](x, time).sample
    assert loss.item() == pytest.approx((output - velocity).square().mean().item(), rel=1e-5)


def test_pairs_have_the_same_caption_and_the_same_flip():
    def data(texts, **options):
        pictures = [np.random.default_rng(len(text)).integers(0, 255, (8, 8, 3), dtype=np.uint8) for text in texts]
        rows = {"image": [to_row(picture) for picture in pictures], "text": texts}
        features = Features({"image": Image(decode=False), "text": Value("string")})
        return PictureDataset(Dataset.from_dict(rows, features=features), DatasetConfig(resolution=8, **options))

    flips = {"random_flip": True}
    pairs = BridgePairs(data(["a", "bb", "ccc"], **flips), data(["ccc", "a", "d", "bb"], **flips), paired=True)
    for index, draw in [(i, d) for i in range(3) for d in range(10)]:
        item = pairs[index, draw]
        assert torch.equal(item["source"], item["pixels"]), "equal captions have equal pictures here"
    with pytest.raises(ValueError, match=r"1 captions have no source picture: \['e'\]"):
        BridgePairs(data(["a", "e"]), data(["a"]), paired=True)
    several = BridgePairs(data(["a"] * 20), data(["a", "bb", "ccc"]), paired=False)
    assert len({tuple(several[i, 0]["source"].flatten()[:4].tolist()) for i in range(20)}) == 3, "evaluation has one draw"
    free = BridgePairs(data(["a"]), data(["a", "bb", "ccc"]), paired=False)
    sources = {tuple(free[0, draw]["source"].flatten()[:4].tolist()) for draw in range(40)}
    assert len(sources) == 3


def to_row(array):
    import io

    from PIL import Image as PIL

    buffer = io.BytesIO()
    PIL.fromarray(array).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def affine(m, a, b):
    """The exact velocity from N(m, a²) to N(0, b²) along independent straight lines, with ``s = 1`` at the source."""

    def velocity(x, t, encoder_hidden_states=None, class_labels=None, return_dict=True):
        s = t / 1000
        variance = (s * a) ** 2 + ((1 - s) * b) ** 2
        return (m + (s * a**2 - (1 - s) * b**2) / variance * (x - s * m),)

    return velocity


def test_the_pipeline_follows_the_flow_to_the_target():
    small = {"base_channels": 8, "channel_mult": (1,), "attention_levels": (), "num_heads": 2, "norm_num_groups": 4}
    with torch.random.fork_rng():
        unet = AtlasUNet2DModel(sample_size=8, **small)
    pipeline = AtlasBridgePipeline(unet, FlowMatchEulerDiscreteScheduler(), default_guidance_scale=1.0)
    unet.forward = affine(0.2, 0.3, 0.1)
    pipeline.set_progress_bar_config(disable=True)
    source = (0.2 + 0.3 * torch.randn(4, 3, 8, 8, generator=seeded())).clamp(-1, 1)
    found = pipeline(source / 2 + 0.5, num_inference_steps=400, output_type="latent").images
    # the flow between Gaussians is the monotone map
    expected = (source - 0.2) * 0.1 / 0.3
    assert (found - expected).abs().max() < 2e-2 * 0.3
    coarse = pipeline(source / 2 + 0.5, num_inference_steps=100, output_type="latent").images
    assert (coarse - expected).abs().max() > 2.5 * (found - expected).abs().max(), "Euler's error falls as 1/N"


def test_a_bridge_is_trained_saved_and_used(tmp_path):
    run = build_bridge(tmp_path, max_steps=3, coupling="sinkhorn", sample_interval=3, sample_steps=2)
    folder = run.train()
    assert (tmp_path / "sample-000003.png").exists()
    with torch.random.fork_rng():
        pipeline = AtlasBridgePipeline.from_pretrained(folder)
    assert type(pipeline.scheduler) is FlowMatchEulerDiscreteScheduler
    pipeline.to(torch.float64).set_progress_bar_config(disable=True)
    source = torch.rand(2, 3, 32, 32, generator=seeded(), dtype=torch.float64)
    first, second = (pipeline(source, num_inference_steps=3, output_type="np").images for _ in range(2))
    assert np.array_equal(first, second) and first.shape == (2, 32, 32, 3)
    alone = pipeline(source[1:], num_inference_steps=3, output_type="np").images
    np.testing.assert_allclose(alone[0], first[1], atol=1e-7)
    x = 2 * source - 1
    with torch.no_grad():
        for s, after in zip((1, 2 / 3, 1 / 3), (2 / 3, 1 / 3, 0)):
            x = x + (after - s) * pipeline.unet(x, torch.full((2,), 1000 * s)).sample
    for steps in ({"num_inference_steps": 3}, {"sigmas": [1, 2 / 3, 1 / 3]}):
        found = pipeline(source, **steps, output_type="np").images
        np.testing.assert_allclose(found, (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1), atol=1e-6)
    assert first.std() > 0.01


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"source_dataset": None}, "bridge_matching needs source_dataset, the others take none"),
        (
            {"p2_gamma": 1.0, "offset_noise": 0.1},
            "loss_weighting={.*}, offset_noise=0.1: not read by objective='bridge_matching'",
        ),
        ({"dataset": {"streaming": True}}, "cannot be streamed"),
        ({"source_dataset": {"resolution": 16}}, "source_dataset.resolution=16 is not dataset.resolution=32"),
        ({"coupling": "paired"}, "both data sets need a caption_column"),
    ],
)
def test_bridges_that_cannot_be(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        build_bridge(tmp_path, **changes)


def test_pairs_need_a_bridge(tmp_path):
    with pytest.raises(ValueError, match="it needs objective='bridge_matching'"):
        build(tmp_path, coupling="paired")


def test_epochs_are_passes_over_the_data(tmp_path):
    run = build(tmp_path, max_steps=None, epochs=2)
    assert run.config.max_steps == math.ceil(2 * len(run.dataset) / 8) and run.config.epochs is None
    assert validate(TrainingConfig, run.config.model_dump()) == run.config
    with pytest.raises(ValueError, match="give epochs=2 or max_steps=8, not both"):
        build(tmp_path, epochs=2)


# ---------------------------------------------------------------------- weights, labels, and what a cache depends on


@pytest.mark.parametrize(
    "changes, weight",
    [
        ({"min_snr_gamma": 5.0}, lambda snr: min(snr, 5.0)),
        ({"min_snr_gamma": None, "p2_gamma": 0.7}, lambda snr: snr / (1 + snr) ** 0.7),
        ({"min_snr_gamma": None, "edm_sigma_data": 0.5}, lambda snr: snr + 1 / 0.5**2),
    ],
    ids=["min-SNR", "P2", "EDM"],
)
def test_the_recipe_chooses_the_weights(tmp_path, monkeypatch, changes, weight):
    """Each weighs the squared error of the data that the network implies, here that of a network which says nothing."""
    run = build(tmp_path, **changes)
    monkeypatch.setattr(run.objective, "_predict", lambda sample, *rest: torch.zeros_like(sample))
    batch = batch_of(run, 4)
    noises = [torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(int(draw))) for draw in batch["draw"]]
    timesteps = torch.tensor([60, 300, 600, 900])
    monkeypatch.setattr(run.objective, "_timesteps", lambda *rest: timesteps)
    expected = []
    for x0, noise, t in zip(batch["pixels"].double(), noises, timesteps):
        alpha, sigma = (float(level) for level in run.components.scheduler.levels_at(t[None], like=torch.empty(0)))
        found = alpha * (alpha * x0 + sigma * noise.double())  # v = 0 says x_0 = α x
        expected.append(weight(alpha**2 / sigma**2) * (x0 - found).square().mean())
    loss = run.objective(batch, seeded())
    assert loss.item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-4)


def test_labels_that_are_missing_or_too_large_are_named_before_the_first_step(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"label_column='label': \d+ labels are not among 0 to 6, .*: row \d+ has [789]"):
        build(tmp_path, **digits(model={**PLAIN["model"], "num_class_embeds": 7, "patch_size": 1, "attention_levels": []}))
    run = build(tmp_path, **digits())
    rows = {**run.dataset.data[:3], "label": [3, None, 4]}
    damaged = PictureDataset(Dataset.from_dict(rows, features=run.dataset.data.features), run.config.dataset)
    with pytest.raises(ValueError, match="1 labels are not among 0 to 9, .*: row 1 has None"):
        damaged.check_labels(10)
    with pytest.raises(ValueError, match=r"has no label in column 'label' \(found None; expected 0, 1, ...\)"):
        damaged[1, 0]
    batch = batch_of(run, 3)
    batch["label"][1] = 10
    with pytest.raises(ValueError, match="label 10 is not among 0 to 9"):
        run.objective(batch, seeded())


def test_cached_captions_depend_on_the_vocabulary(tmp_path):
    pipeline = build_stock_pipeline("text2img")
    ids = pipeline.tokenizer.get_vocab()
    swapped = dict(ids) | {word: ids[other] for word, other in (("a</w>", "b</w>"), ("b</w>", "a</w>"))}

    class Other:
        def __init__(self):
            self.model_max_length = pipeline.tokenizer.model_max_length

        def get_vocab(self):
            return swapped

        def __call__(self, batch, **options):
            found = pipeline.tokenizer(batch, **options)
            return type(found)({name: value.flip(-1) if name == "input_ids" else value for name, value in found.items()})

    states = []
    for tokenizer in (pipeline.tokenizer, Other()):
        components = Components(pipeline.unet, pipeline.text_encoder, tokenizer, None, None, Own)
        family = Own(components, components.networks, TrainingConfig())
        with torch.no_grad():
            cache = CaptionCache(["red heart", "frog"], family.encode, tmp_path, family.fingerprint())
        states.append(cache(["frog"])["encoder_hidden_states"])
    assert len(list(tmp_path.iterdir())) == 2 and (states[0] - states[1]).abs().max() > 1e-3


def test_cached_latents_depend_on_the_pictures(tmp_path, latent_pipeline):
    first = adapt(tmp_path, latent_pipeline, cache_latents=True)
    plain = first.pictures
    turned = PictureDataset(plain.data.select([1, 0, *range(2, len(plain))]), plain.config)
    second = CachedPictures(turned, first.components.vae, tmp_path / "cache")
    third = CachedPictures(PictureDataset(plain.data, plain.config), first.components.vae, tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 2
    assert torch.equal(second[0, 3]["moments"], first.dataset[1, 3]["moments"])
    assert torch.equal(third[0, 3]["moments"], first.dataset[0, 3]["moments"])


def test_a_damaged_shard_is_made_again_and_named_while_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("atlas_diffusers.training.caching.ROWS_OF_SHARD", 4)
    warnings = []
    monkeypatch.setattr("atlas_diffusers.training.caching.logger.warning", warnings.append)

    def compute(places):
        return {"pair": torch.tensor([[place, -place] for place in places])}

    file = tmp_path / "00001.safetensors"
    cache = TensorCache(tmp_path, 8, compute)
    whole = file.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], b"\xff" * 60):
        file.write_bytes(damaged)
        with pytest.raises(OSError, match="00001.safetensors cannot be read"):
            TensorCache.__getitem__(cache, 5)
        assert TensorCache(tmp_path, 8, compute)[5]["pair"].tolist() == [5, -5]
    assert len(warnings) == 3 and all("00001.safetensors is damaged" in text for text in warnings)
    assert TensorCache(tmp_path, 7, compute)[6]["pair"].tolist() == [6, -6], "a shard of another length is made again"


# ---------------------------------------------------------------------- networks of another class


@pytest.mark.parametrize("kind", ["cross", "joint"])
def test_a_recipe_names_its_network(tmp_path, kind):
    model = {"_class_name": "AtlasTransformer2DModel", "width": 16, "num_layers": 1, "num_heads": 2, "text_attention": kind}
    run = Trainer(validate(TrainingConfig, recipe(tmp_path, max_steps=2) | {"model": model}))
    before = {name: value.clone() for name, value in run.components.unet.state_dict().items()}
    pipeline = run.train()
    loaded = AtlasPipeline.from_pretrained(pipeline)
    assert type(loaded.unet) is AtlasTransformer2DModel and loaded.unet.config.text_attention == kind
    assert any((value - before[name]).abs().max() > 0 for name, value in loaded.unet.state_dict().items())
    call = {"num_inference_steps": 2, "output_type": "pt", "generator": seeded(0)}
    assert loaded(["cat", "dog"], **call).images.std() > 0


def test_an_unknown_network_lists_what_there_is(tmp_path):
    with pytest.raises(ValueError, match="_class_name='ResNet'.*AtlasTransformer2DModel.*AtlasUNet2DModel"):
        build(tmp_path, model={"_class_name": "ResNet"})
