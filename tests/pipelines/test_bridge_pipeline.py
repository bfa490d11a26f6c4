"""References in a pipeline call: the bridge supplies the data prediction, any scheduler takes the step."""

import logging

import datasets
import diffusers
import numpy as np
import pytest
import torch
from conftest import build_tiny_pipeline, seeded
from datasets import Dataset
from PIL import Image
from safetensors.torch import save_file

import atlas_diffusers
from atlas_diffusers import AtlasDDIMScheduler, AtlasPipeline
from atlas_diffusers.bridges import ReferenceShards, SchrodingerBridgeSolver
from atlas_diffusers.config import BridgeConfig
from atlas_diffusers.denoising import noise_level

STOCK = ["DDIMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler"]
STOCK += ["UniPCMultistepScheduler"]
NEVER, ALWAYS = {"gate": 1e9}, {"gate": 1.0}


def references(count=6, seed=5):
    return torch.rand(count, 3, 8, 8, generator=seeded(seed)) * 2 - 1


def run(pipeline, count=4, steps=5, **options):
    generators = [seeded(i) for i in range(count)]
    return pipeline([""] * count, generator=generators, num_inference_steps=steps, output_type="latent", **options)


@pytest.mark.usefixtures("float64")
def test_without_references_nothing_changes(tiny_pipeline):
    plain = run(tiny_pipeline)
    assert plain.bridge is None
    shut = run(tiny_pipeline, references=references(), bridge=NEVER)
    assert torch.equal(shut.images, plain.images)
    assert (shut.bridge.network_calls, shut.bridge.network_calls_saved) == (5, 0)
    assert shut.bridge.gate_log_snr == [pytest.approx(noise_level_of_first_step(tiny_pipeline))]
    uncorrected = run(tiny_pipeline, references=references(), bridge={"mode": "correct", "strength": 0.0, "gate": 1.0})
    torch.testing.assert_close(uncorrected.images, plain.images)


def noise_level_of_first_step(pipeline):
    scheduler = pipeline.scheduler
    scheduler.set_timesteps(5)
    return noise_level(scheduler, scheduler.timesteps[0]).log_snr


@pytest.mark.parametrize("name", [*atlas_diffusers.SCHEDULERS, *STOCK])
def test_any_scheduler_goes_where_the_bridge_says(name):
    """All references are one picture, so its data prediction is known and every scheduler ends there."""
    cls = getattr(diffusers, name)
    # PNDM averages v as it is, which is exact for a straight path only with ε
    config = {"prediction_type": "epsilon" if "PNDM" in name else "v_prediction", "timestep_spacing": "trailing"}
    target = references(1).expand(3, -1, -1, -1).contiguous()
    pipeline = build_tiny_pipeline(scheduler=cls(**config))
    if "set_alpha_to_one" in pipeline.scheduler.config:
        pipeline.scheduler = cls.from_config(pipeline.scheduler.config, set_alpha_to_one=True)
    out = run(pipeline, steps=8, references=target, bridge=ALWAYS)
    assert out.bridge.network_calls == 0
    torch.testing.assert_close(out.images, target[:1].expand(4, -1, -1, -1), rtol=0, atol=2e-3)


@pytest.mark.usefixtures("float64")
def test_the_loop_is_the_scheduler_on_projections(tiny_pipeline):
    """Against a loop written out: coupling, projection, conversion to v, step."""
    scheduler = AtlasDDIMScheduler.from_config(tiny_pipeline.scheduler.config)
    solver, state = SchrodingerBridgeSolver(references()), None
    scheduler.set_timesteps(5)
    x = torch.cat([torch.randn(1, 3, 8, 8, generator=seeded(i)) for i in range(4)])
    for t in scheduler.timesteps:
        alpha, sigma = scheduler.process.level_at(int(t))
        coupling = solver.couple(x, alpha, sigma, state)
        state = coupling.state
        noise = (x - alpha * coupling.data) / sigma
        x = scheduler.step(alpha * noise - sigma * coupling.data, t, x).prev_sample
    out = run(tiny_pipeline, references=references(), bridge=ALWAYS)
    torch.testing.assert_close(out.images, x)
    assert len(out.bridge.effective_references[0]) == 5
    torch.testing.assert_close(out.bridge.nearest_reference, solver.nearest_reference(x).float())


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("mode", ["replace", "correct"])
def test_couplings_do_not_depend_on_how_the_network_is_batched(tiny_pipeline, mode):
    bridge = BridgeConfig(mode=mode, gate=3.0)
    whole = run(tiny_pipeline, count=5, references=references(), bridge=bridge)
    parts = run(tiny_pipeline, count=5, references=references(), bridge=bridge, network_batch_size=2)
    torch.testing.assert_close(parts.images, whole.images)
    assert parts.bridge.network_calls == whole.bridge.network_calls


@pytest.mark.usefixtures("float64")
def test_guided_prompts_are_coupled_in_groups(tiny_pipeline):
    """A group's samples do not depend on the other groups of the batch."""
    options = {"references": references(), "bridge": {"gate": 3.0}, "guidance_scale": 3.0, "num_inference_steps": 4}
    options |= {"output_type": "latent", "num_images_per_prompt": 3}
    data = Dataset.from_dict({"image": [to_image(y) for y in references()], "text": ["red heart", "blue star"] * 3})
    options["references"] = data
    both = tiny_pipeline(["red heart", "green leaf"], generator=[seeded(i) for i in range(6)], **options)
    alone = tiny_pipeline("red heart", generator=[seeded(i) for i in range(3)], **options)
    torch.testing.assert_close(both.images[:3], alone.images)
    assert len(both.bridge.gate_log_snr) == 2


def to_image(y):
    return Image.fromarray(((y.permute(1, 2, 0) + 1) * 127.5).round().byte().numpy())


@pytest.mark.usefixtures("float64")
def test_captions_choose_the_references(tiny_pipeline):
    captions = ["red heart", "blue star", "green leaf"]
    data = Dataset.from_dict({"image": [to_image(y) for y in references(3)], "text": captions})
    bridge = {"gate": 1.0, "caption_temperature": 1e-4}
    for index, caption in enumerate(captions):
        out = tiny_pipeline(caption, num_images_per_prompt=2, references=data, bridge=bridge, num_inference_steps=4,
                            generator=seeded(), output_type="latent")  # fmt: skip
        expected = tiny_pipeline.image_processor.preprocess(data[index]["image"]).expand(2, -1, -1, -1)
        torch.testing.assert_close(out.images, expected.double())


def test_what_is_transparent_in_a_reference_is_white(tiny_pipeline):
    images = [Image.new("RGBA", (8, 8), (255, 0, 0, alpha)) for alpha in (0, 102, 255)]
    tiny_pipeline.set_references(Dataset.from_dict({"image": images, "text": ["a", "b", "c"]}))
    expected = torch.tensor([[1.0, 1, 1], [1, 0.2, 0.2], [1, -1, -1]])
    torch.testing.assert_close(tiny_pipeline.references.values, expected[..., None, None].expand(-1, -1, 8, 8))


def test_captions_and_weights_choose_together(tiny_pipeline):
    data = Dataset.from_dict({"image": [to_image(y) for y in references(3)], "text": ["red heart", "red heart", "leaf"]})
    bridge = {"gate": 1.0, "caption_temperature": 1e-4}
    out = tiny_pipeline("red heart", num_images_per_prompt=2, references=data, bridge=bridge, num_inference_steps=4,
                        reference_weights=torch.tensor([0.0, 1.0, 1.0]), generator=seeded(), output_type="latent")  # fmt: skip
    expected = tiny_pipeline.image_processor.preprocess(data[1]["image"]).expand(2, -1, -1, -1)
    torch.testing.assert_close(out.images, expected, rtol=0, atol=1e-4)


@pytest.mark.usefixtures("float64")
def test_reference_weights_choose_too(tiny_pipeline):
    weights = torch.tensor([0.0, 0, 1, 0, 0, 0])
    out = run(tiny_pipeline, references=references(), reference_weights=weights, bridge=ALWAYS)
    torch.testing.assert_close(out.images, references()[2].expand(4, -1, -1, -1))


@pytest.mark.usefixtures("float64")
def test_pictures_are_references_wherever_they_lie(tiny_pipeline, tmp_path):
    """A list of PIL pictures, a folder, data sets decoded and not, and shards give what their tensor gives."""
    pictures = [to_image(y) for y in references(5)]
    for index, picture in enumerate(pictures):
        picture.save(tmp_path / f"{index}.png")
    tensor = torch.stack([torch.from_numpy(np.array(picture)) for picture in pictures]).permute(0, 3, 1, 2).float() / 127.5 - 1
    tensor = tensor.double().contiguous()
    save_file({"references": tensor[:2].contiguous()}, tmp_path / "a.safetensors")
    save_file({"references": tensor[2:].contiguous()}, tmp_path / "b.safetensors")
    data = Dataset.from_dict({"image": pictures})
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    bridge = {**ALWAYS, "tolerance": 1e-9}  # shards are solved as a matrix, another way to the same plan
    expected = run(tiny_pipeline, references=tensor, bridge=bridge).images
    undecoded = data.cast_column("image", datasets.Image(decode=False))
    for given in (pictures, tuple(pictures), tmp_path, str(tmp_path), data, undecoded, ReferenceShards(files), files):
        found = run(tiny_pipeline, references=given, bridge=bridge).images
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    tiny_pipeline.set_references(pictures)
    torch.testing.assert_close(tiny_pipeline.references.values.double(), tensor, rtol=0, atol=1e-6)


def test_captions_of_a_folder_choose_its_references(tiny_pipeline, tmp_path):
    for index, (picture, caption) in enumerate(zip(references(3), ["red heart", "red heart", "leaf"])):
        to_image(picture).save(tmp_path / f"{index}.png")
        (tmp_path / f"{index}.txt").write_text(caption)
    tiny_pipeline.set_references(tmp_path)
    assert tiny_pipeline.references.captions == ["red heart", "red heart", "leaf"]


@pytest.mark.parametrize(
    "given, message",
    [
        (7, "got int 7"),
        ([torch.zeros(3, 8, 8)], r"got list \[tensor"),
        ([], "got list"),
        (Dataset.from_dict({"text": ["a", "b"]}), r"got a data set with columns \['text'\]"),
    ],
)
def test_what_is_no_reference_is_named(tiny_pipeline, given, message):
    with pytest.raises(ValueError, match=f"references must be a tensor, ReferenceShards.*{message}"):
        run(tiny_pipeline, references=given, bridge=ALWAYS)


def test_shards_are_not_saved_with_a_pipeline(tiny_pipeline, tmp_path):
    save_file({"references": references(4)}, tmp_path / "a.safetensors")
    tiny_pipeline.set_references(ReferenceShards([tmp_path / "a.safetensors"]))
    with pytest.raises(ValueError, match="ReferenceShards lie in files of their own"):
        tiny_pipeline.save_pretrained(tmp_path / "pipeline")


def test_references_travel_with_a_pipeline(tiny_pipeline, tmp_path):
    expected = run(tiny_pipeline, references=references(), bridge=ALWAYS).images
    tiny_pipeline.set_references(references())
    assert run(tiny_pipeline).bridge is None
    tiny_pipeline.save_pretrained(tmp_path)
    loaded = AtlasPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(run(loaded, bridge=ALWAYS).images, expected)
    assert torch.equal(run(tiny_pipeline, references=str(tmp_path / "references.safetensors"), bridge=ALWAYS).images, expected)


def test_noise_levels_of_foreign_schedulers():
    for name in STOCK:
        scheduler = getattr(diffusers, name)(timestep_spacing="trailing")
        scheduler.set_timesteps(5)
        alpha_bar = scheduler.alphas_cumprod[scheduler.timesteps[0].long()].item()
        alpha, sigma = noise_level(scheduler, scheduler.timesteps[0])
        assert sigma / alpha == pytest.approx((1 / alpha_bar - 1) ** 0.5, rel=1e-4)


@pytest.mark.parametrize("options, message", [
    ({"references": references()[:, :2]}, r"shape \(2, 8, 8\); expected \(3, 8, 8\)"),
    ({"references": references(1)}, "at least two points"),
    ({"references": references() * float("nan")}, "NaN"),
    ({"references": references(), "reference_weights": torch.ones(5)}, r"shape \(5,\), references are 6"),
    ({"references": references(), "bridge": {"gate": 0.5}}, "gate"),
    ({"references": references(), "bridge": {"gaet": 5}}, "gaet"),
    ({"references": references(), "bridge": {"mode": "copy"}}, "mode"),
    ({"references": references(), "bridge": {"solver_type": "fft"}}, "solver_type"),
    ({"references": references(), "bridge": {"steps": 0}}, "steps"),
    ({"references": references(), "bridge": {"steps": 2, "mode": "correct"}}, "steps=2 needs mode='replace'"),
    ({"references": references(), "bridge": {"steps": 2}, "image": references(4), "strength": 0.5}, "give no timesteps"),
    ({"bridge": {}}, "neither the call nor the pipeline has references"),
    ({"reference_weights": torch.ones(3)}, "without references"),
], ids=str)  # fmt: skip
def test_bad_input_is_named(tiny_pipeline, options, message):
    with pytest.raises(ValueError, match=message):
        run(tiny_pipeline, **options)


@pytest.mark.parametrize("name", ["AtlasDDIMScheduler", "AtlasEulerScheduler", "DPMSolverMultistepScheduler"])
def test_bridge_steps_come_before_those_of_the_network(name):
    """The gate is placed where noised references, as particles, have as many effective references as it says."""
    cls = getattr(atlas_diffusers, name, None) or getattr(diffusers, name)
    pipeline = build_tiny_pipeline(scheduler=cls(timestep_spacing="trailing", prediction_type="v_prediction"))
    seen, data, bridge = [], references(40), {"gate": 20.0, "steps": 4}

    def watch(pipeline, index, t, tensors):
        seen.append(round(float(t)))

    out = run(pipeline, count=16, steps=3, references=data, bridge=bridge, callback_on_step_end=watch)
    assert (out.bridge.network_calls, out.bridge.network_calls_saved) == (3, 4)
    gate = seen[4]
    assert seen == [round(seen[0] + (gate - seen[0]) * k / 4) for k in range(4)] + [round(gate * (1 - k / 3)) for k in range(3)]
    solver, ddim = SchrodingerBridgeSolver(data), AtlasDDIMScheduler(timestep_spacing="trailing")
    ddim.set_timesteps(250)
    assert solver.posterior_size(*noise_level(ddim, torch.tensor(gate))) == pytest.approx(20, rel=0.1)


def test_groups_of_one_and_many_particles(tiny_pipeline, caplog):
    with caplog.at_level("WARNING", logger="atlas_diffusers.denoising.coupling"):
        logging.getLogger("atlas_diffusers").propagate = True
        run(tiny_pipeline, count=2, references=references(), bridge=ALWAYS)
        assert not caplog.records
        run(tiny_pipeline, count=1, references=references(), bridge=ALWAYS)
    assert [record.getMessage() for record in caplog.records] == [
        "a group of one sample: the bridge has nothing to balance, its projection is the posterior mean"
    ]


def test_the_bridge_refuses_networks_that_predict_a_variance(tiny_pipeline):
    tiny_pipeline.unet.register_to_config(out_channels=6)
    with pytest.raises(ValueError, match="as many channels out as in, got 6 and 3"):
        run(tiny_pipeline, references=references(), bridge=ALWAYS)
