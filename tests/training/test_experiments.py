"""Presets: they are valid recipes, and their networks fit the GPUs that they are for."""

import pytest
import torch
from torch import nn
from torch.distributed._tools.mem_tracker import MemTracker

from atlas_diffusers import AtlasUNet2DModel
from atlas_diffusers.config import (
    HighResModelConfig,
    TrainingConfig,
    build_preset,
    list_presets,
    load_preset,
    read_recipe,
    validate,
)
from atlas_diffusers.config.presets import EXPERIMENTS
from atlas_diffusers.training.memory import LiveBytes, estimate_memory

NAMES = ["celeba1024", "cifar10", "ffhq128", "imagenet64", "lsun256"]


def config(name, **changes):
    return validate(TrainingConfig, load_preset(name) | changes)


def test_the_experiments_of_the_original_are_there():
    found = sorted(list_presets("experiment"))
    assert [f"experiment:{name}" for name in NAMES] == found
    assert [config(name).dataset.resolution for name in found] == [1024, 32, 128, 64, 256]


def test_every_preset_is_valid():
    for name in list_presets():
        assert build_preset(name) is not None
    assert build_preset("model:highres_default") == HighResModelConfig()
    assert build_preset("sampler:hierarchical_default").hierarchical_sampling
    assert build_preset("kernel:gaussian_multiscale").arguments()["scale_factors"] == [0.5, 1.0, 2.0]
    profiles = [build_preset(name) for name in list_presets("gpu")]
    assert [p.memory_gb for p in profiles] == [0, 6, 8, 12, 16, 24, 32]
    assert [p.batch_size for p in profiles] == sorted(p.batch_size for p in profiles)
    assert build_preset("gpu:8gb", batch_size=1).batch_size == 1
    with pytest.raises(ValueError, match="batch_size=0"):
        build_preset("gpu:8gb", batch_size=0)


@pytest.mark.parametrize("name", list(EXPERIMENTS))
def test_the_network_fits_its_gpu(name):
    memory = estimate_memory(config(name))
    assert memory.total < 0.8 * EXPERIMENTS[name][0] * 2**30
    halved = config(name, micro_batch_size=config(name).micro_batch_size // 2)
    assert memory.state < estimate_memory(halved).total < memory.total


def test_a_preset_is_a_copy():
    load_preset("experiment:cifar10")["dataset"]["resolution"] = 7
    assert read_recipe("experiment:cifar10")["dataset"]["resolution"] == 32


def test_an_unknown_preset_names_the_known_ones():
    with pytest.raises(ValueError, match=r"'experiment:cifar' is unknown, did you mean 'experiment:cifar10'\?"):
        read_recipe("experiment:cifar")
    with pytest.raises(ValueError, match="'mnist' is unknown; allowed are.*'gpu:6gb'.*experiment:ffhq128"):
        load_preset("mnist")


def test_live_bytes_of_a_chain_are_those_of_its_tensors():
    """Forward: one output a layer is kept for the backward pass; in it the gradient of an output lives beside the next."""
    width, batch, depth = 64, 1000, 5
    with torch.device("meta"):
        chain = nn.Sequential(*(nn.Sigmoid() for _ in range(depth)))
        x = torch.empty(batch, width, requires_grad=True)
        with LiveBytes() as live:
            y = chain(x)
            assert live.now == live.peak == depth * 4 * batch * width
            given = torch.empty_like(y)
            y.backward(given)
        # the outputs, the gradient that is given, and those of two neighbouring layers
        assert live.peak == (depth + 3) * 4 * batch * width
        assert live.now == 3 * 4 * batch * width, "y, its gradient and that of x are left"


def test_the_estimate_is_that_of_torchs_tracker():
    with torch.device("meta"):
        unet = AtlasUNet2DModel(sample_size=16, base_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_levels=(1,))
        tracker = MemTracker()
        tracker.track_external(unet)
        with tracker:
            unet(torch.empty(4, 3, 16, 16), torch.zeros(4)).sample.square().mean().backward()
        weights = 4 * sum(p.numel() for p in unet.parameters())
        unet.zero_grad()
        with LiveBytes() as live:
            unet(torch.empty(4, 3, 16, 16), torch.zeros(4)).sample.square().mean().backward()
    expected = tracker.get_tracker_snapshot("peak")[torch.device("meta")]["Total"] - weights
    assert live.peak == expected


def test_checkpointing_needs_less():
    changes = {"micro_batch_size": 32, "batch_size": 32}
    plain, cheap = (estimate_memory(config("experiment:cifar10", gradient_checkpointing=on, **changes)) for on in (False, True))
    assert cheap.step < 0.7 * plain.step and cheap.state == plain.state


def test_memory_is_not_guessed_for_other_networks():
    with pytest.raises(ValueError, match="recipes with new networks"):
        estimate_memory(config("experiment:cifar10", init_from="atlas-emoji", model={}))
