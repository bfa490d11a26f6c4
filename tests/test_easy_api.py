"""Pictures with one call: the same ones whatever the batch size, the memory and the calls before."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import TINY_UNET, build_tiny_pipeline, build_tiny_unet, seeded
from safetensors.torch import save_file

from atlas_diffusers import AtlasPipeline, check_hardware, hardware
from atlas_diffusers.config import build_preset
from atlas_diffusers.easy_api import EasySampler, create_sampler, list_profiles
from atlas_diffusers.pipelines.foreign import load_any

PROMPTS = ["red heart", "blue star", "green leaf"]


def sampler(batch_size=4, **options):
    return EasySampler(build_tiny_pipeline(), build_preset("gpu:cpu", batch_size=batch_size, **options))


@pytest.mark.usefixtures("float64")
def test_pictures_are_those_of_the_pipeline():
    found = sampler().generate(PROMPTS, "leaf", num_samples=2, timesteps=3, guidance_scale=2.0, seed=5)
    pipeline = build_tiny_pipeline()
    for i, prompt in enumerate(p for p in PROMPTS for _ in range(2)):
        expected = pipeline(
            prompt, negative_prompt="leaf", num_inference_steps=3, guidance_scale=2.0, generator=seeded(5 + i), output_type="pt"
        ).images[0]
        torch.testing.assert_close(found[i], expected)
    assert found.shape == (6, 3, 8, 8)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("batch_size", [1, 2, 5, 6, 100])
def test_the_batch_size_changes_nothing(batch_size):
    call = {"negative_prompts": ["a", "b", "c"], "num_samples": 2, "timesteps": 2, "seed": 1}
    expected = sampler(6).generate(PROMPTS, **call)
    torch.testing.assert_close(sampler(batch_size).generate(PROMPTS, **call), expected)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("prompts", [["red heart", "blue star"], None])
def test_pictures_coupled_with_references_do_not_depend_on_the_batch_size(prompts):
    """The whole batch is coupled with the references, whatever the network sees at a time."""
    references = torch.rand(6, 3, 8, 8, generator=seeded(5)) * 2 - 1
    call = {"num_samples": 3, "timesteps": 3, "seed": 1, "references": references, "output_type": "latent"}
    expected = sampler(100).generate(prompts, **call, bridge={"gate": 2.0})
    for size in (1, 2, 5):
        made = sampler(size)
        calls = fail_above(made, size * (1 if prompts is None else 2))
        torch.testing.assert_close(made.generate(prompts, **call, bridge={"gate": 2.0}), expected)
        assert calls and made.profile.batch_size == size
    plain = sampler(2).generate(prompts, **{**call, "references": None})
    assert (plain - expected).abs().max() > 0.05


def fail_above(made, limit):
    """Calls of the network with more samples run out of memory."""
    calls, forward = [], made.pipeline.unet.forward

    def limited(x, *args, **kwargs):
        calls.append(len(x))
        if len(x) > limit:
            raise torch.cuda.OutOfMemoryError("injected")
        return forward(x, *args, **kwargs)

    made.pipeline.unet.forward = limited
    return calls


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("prompts", [PROMPTS, None])
def test_out_of_memory_halves_the_batch_and_keeps_the_pictures(prompts):
    call = {"num_samples": 2 if prompts else 6, "timesteps": 2, "seed": 3, "guidance_scale": 2.0}
    expected = sampler(6).generate(prompts, **call)
    made = sampler(6)
    limit = 4 if prompts else 2
    calls = fail_above(made, limit)
    torch.testing.assert_close(made.generate(prompts, **call), expected)
    assert max(calls) > limit and made.profile.batch_size < 6
    calls.clear()
    made.generate(prompts, **call)
    assert max(calls) <= limit, "the next call starts with what fits"


def test_one_picture_that_is_too_large_is_an_error():
    made = sampler(2)
    fail_above(made, 0)
    with pytest.raises(torch.OutOfMemoryError, match="injected"):
        made.generate(PROMPTS)


def test_other_errors_are_not_swallowed(monkeypatch):
    made = sampler(4)
    monkeypatch.setattr(made.pipeline.unet, "forward", lambda *a, **k: (_ for _ in ()).throw(RuntimeError("broken")))
    with pytest.raises(RuntimeError, match="broken"):
        made.generate(PROMPTS)


def test_nothing_leaks_into_the_next_call():
    made = sampler()
    first = made.generate(seed=2, num_samples=2, timesteps=2)
    made.generate(PROMPTS, "leaf", guidance_scale=9.0, timesteps=3)
    assert torch.equal(made.generate(seed=2, num_samples=2, timesteps=2), first)


@pytest.mark.usefixtures("float64")
def test_seeds_decide_the_pictures():
    made = sampler()
    one, two, other = (made.generate("red heart", timesteps=2, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one, two) and not torch.equal(one, other)
    assert not torch.equal(*(made.generate("red heart", timesteps=2) for _ in range(2)))
    several = made.generate("red heart", num_samples=2, timesteps=2, seed=1)
    torch.testing.assert_close(several[1:], other)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"prompts": []}, "prompts is an empty list"),
        ({"num_samples": 0}, "num_samples=0"),
        ({"negative_prompts": "a"}, "negative_prompts need prompts"),
        ({"prompts": PROMPTS, "negative_prompts": ["a", "b"]}, "2 negative prompts for 3 prompts"),
        ({"prompts": "a", "height": 7}, "height=7"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        sampler().generate(**arguments)


def test_prompts_without_a_text_encoder():
    with pytest.raises(ValueError, match="enable_clip is False"):
        sampler(enable_clip=False).generate("red heart")


# ---------------------------------------------------------------------- checkpoints


def unconditional():
    pipeline = build_tiny_pipeline(unet=build_tiny_unet(), text_encoder=None, tokenizer=None)
    pipeline.scheduler = type(pipeline.scheduler)(clip_sample=False)
    return pipeline


def assert_same_pictures(made):
    """Those of the network that was saved; weights are float32, sums float64."""
    made.pipeline.to(torch.float64)
    expected = EasySampler(unconditional().to(torch.float64), build_preset("gpu:cpu"))
    torch.testing.assert_close(made.generate(seed=0, timesteps=2), expected.generate(seed=0, timesteps=2))


def test_a_pipeline_folder_and_an_embedded_name(tmp_path):
    build_tiny_pipeline().save_pretrained(tmp_path)
    made = create_sampler(str(tmp_path), "cpu", batch_size=3)
    assert made.profile.batch_size == 3
    call = {"timesteps": 2, "seed": 0}
    assert torch.equal(made.generate("red heart", **call), sampler(3).generate("red heart", **call))
    assert create_sampler("atlas-emoji", "cpu").side == 32
    assert create_sampler("atlas-emoji", "cpu", resolution=64).side == 64


def test_a_bare_safetensors_file(tmp_path):
    unet = build_tiny_unet()
    save_file(unet.state_dict(), tmp_path / "network.safetensors")
    with pytest.raises(OSError, match="expected network.json or config.json"):
        create_sampler(str(tmp_path / "network.safetensors"), "cpu")
    unet.save_config(tmp_path)
    made = create_sampler(str(tmp_path / "network.safetensors"), "cpu")
    assert_same_pictures(made)


@pytest.mark.parametrize("key", ["ema", "model_state_dict", None])
def test_an_old_checkpoint_of_plain_tensors(tmp_path, key):
    """Compiled networks were saved with a prefix; averaged weights come first."""
    state = {f"_orig_mod.{name}": value for name, value in build_tiny_unet().state_dict().items()}
    other = {name: value + 1 for name, value in state.items()}
    config = dict(TINY_UNET)
    data = {**state} if key is None else {"config": config, key: state, **({"model": other} if key == "ema" else {})}
    torch.save(data, tmp_path / "old.pt")
    if key is None:
        (tmp_path / "old.json").write_text(json.dumps(config))
    made = create_sampler(str(tmp_path / "old.pt"), "cpu")
    assert_same_pictures(made)


class Trap:
    """Would run code when unpickled."""

    def __reduce__(self):
        return (print, ("the trap ran",))


def test_pickled_objects_are_refused(tmp_path, capsys):
    torch.save({"model": Trap()}, tmp_path / "trap.pt")
    with pytest.raises(OSError, match="holds pickled objects, which could run code when read: refused"):
        create_sampler(str(tmp_path / "trap.pt"), "cpu")
    assert "the trap ran" not in capsys.readouterr().out


def test_checkpoints_that_do_not_fit_are_named(tmp_path):
    unet = build_tiny_unet()
    save_file(unet.state_dict(), tmp_path / "network.safetensors")
    (tmp_path / "network.json").write_text(json.dumps({**TINY_UNET, "base_channels": 16}))
    with pytest.raises(ValueError, match=r"of another shape \['time_embedding.linear_1.weight'"):
        load_any(str(tmp_path / "network.safetensors"))
    with pytest.raises(OSError, match="there is no such file"):
        load_any(str(tmp_path / "nothing.pt"))
    with pytest.raises(OSError, match="no pipeline"):
        load_any(str(tmp_path / "nothing"))
    (tmp_path / "damaged.safetensors").write_bytes(b"damaged")
    with pytest.raises(OSError, match="weights are damaged"):
        load_any(str(tmp_path / "damaged.safetensors"))


@pytest.mark.parametrize("content", [b"", b"PK", b"no weights"], ids=repr)
def test_a_file_that_is_no_checkpoint(tmp_path, content):
    (tmp_path / "damaged.pt").write_bytes(content)
    with pytest.raises(OSError, match="damaged.pt"):
        load_any(str(tmp_path / "damaged.pt"))


@pytest.mark.parametrize("config", ["user/repository", 3, ["a"]], ids=repr)
def test_a_configuration_that_is_none(tmp_path, monkeypatch, config):
    """A text would be looked for on the hub."""
    monkeypatch.setattr("socket.socket.connect", lambda *address: pytest.fail(f"connects to {address}"))
    torch.save({"config": config, "model": build_tiny_unet().state_dict()}, tmp_path / "old.pt")
    with pytest.raises(OSError, match="old.pt: config=.*; expected the network's configuration"):
        load_any(str(tmp_path / "old.pt"))
    save_file(build_tiny_unet().state_dict(), tmp_path / "network.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(OSError, match=r"config.json holds \w+; expected an object"):
        load_any(str(tmp_path / "network.safetensors"))
    (tmp_path / "config.json").write_text(json.dumps({**TINY_UNET, "num_heads": "two"}))
    with pytest.raises(OSError, match="config.json: num_heads='two'; expected int"):
        load_any(str(tmp_path / "network.safetensors"))


# ---------------------------------------------------------------------- profiles


def test_profiles():
    assert list(list_profiles()) == ["cpu", "6gb", "8gb", "12gb", "16gb", "24gb", "32gb"]
    assert hardware.find_profile("16GB").memory_gb == 16 and hardware.find_profile("8gb", batch_size=7).batch_size == 7
    with pytest.raises(ValueError, match=r"gpu_memory='7GB' is unknown; allowed are \['auto', 'cpu', '6gb'"):
        create_sampler(gpu_memory="7GB")


@pytest.mark.parametrize(
    "gigabytes, expected", [(0, 0), (4, 0), (5.8, 6), (7.8, 8), (11.9, 12), (15.7, 16), (23.6, 24), (31.5, 32), (80, 32)]
)
def test_auto_takes_the_largest_profile_that_fits(monkeypatch, gigabytes, expected):
    monkeypatch.setattr(hardware, "gpu_memory", lambda device=0: gigabytes * hardware.GIB)
    assert hardware.find_profile("auto").memory_gb == expected


def test_the_memory_warning_can_be_switched_off(monkeypatch, caplog, tmp_path):
    build_tiny_pipeline().save_pretrained(tmp_path)
    monkeypatch.setattr("atlas_diffusers.easy_api.GIB", 1000)
    messages = []
    monkeypatch.setattr("atlas_diffusers.easy_api.logger.warning", messages.append)
    create_sampler(str(tmp_path), "6GB")
    assert len(messages) == 1 and "of 6 GB" in messages[0]
    monkeypatch.setenv("ATLAS_DISABLE_MEMORY_WARNINGS", "1")
    create_sampler(str(tmp_path), "6GB")
    assert len(messages) == 1


def test_half_precision_stays_on_gpus(tmp_path):
    build_tiny_pipeline().save_pretrained(tmp_path)
    made = create_sampler(str(tmp_path), "24GB")
    assert isinstance(made.pipeline, AtlasPipeline) and made.pipeline.unet.dtype == torch.float32
    assert made.profile.batch_size == 16


def test_check_hardware(capsys):
    assert check_hardware.main(["--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["torch"] == torch.__version__ and found["settings"]["batch_size"] >= 1
    result = subprocess.run([sys.executable, "-m", "atlas_diffusers.check_hardware"], capture_output=True, text=True)
    assert result.returncode == 0 and f"profile {found['profile']}" in result.stdout
