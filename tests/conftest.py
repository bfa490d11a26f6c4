"""Tiny offline components, one thread, no hub."""

import logging
import os
import signal

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import diffusers
import pytest
import torch

import atlas_diffusers
from atlas_diffusers.conditioning import build_text_encoder, build_tokenizer

torch.set_num_threads(1)

# What compares numbers that networks made, which differ between instruction sets; `make test-portable` runs it under three.
NUMERIC = {
    "bridges", "conditioning", "denoising", "drop_in", "models", "originals", "pipelines", "test_easy_api.py", "test_system.py",
}  # fmt: skip

TINY_UNET = {
    "sample_size": 8,
    "base_channels": 8,
    "channel_mult": (1, 2),
    "num_res_blocks": 1,
    "attention_levels": (1,),
    "num_heads": 2,
    "norm_num_groups": 4,
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def build_tiny_unet(**changes):
    """A network of some ten thousand parameters with the same weights every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return atlas_diffusers.AtlasUNet2DModel(**{**TINY_UNET, **changes}).eval()


def build_tiny_text():
    """A tokenizer and text encoder of width 16 with the same weights every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = build_tokenizer(["red heart", "blue star", "green leaf"], 600, 8)
        return tokenizer, build_text_encoder(tokenizer, 16, 1, 2).eval()


def build_tiny_pipeline(**changes):
    """A text-to-image ``AtlasPipeline`` of 8x8 pixels."""
    tokenizer, text_encoder = build_tiny_text()
    unet = build_tiny_unet(cross_attention_levels=(1,), cross_attention_dim=16, addition_embed_type="text")
    free = {"prediction_type": "v_prediction", "timestep_spacing": "trailing", "clip_sample": False}
    scheduler = atlas_diffusers.AtlasDDIMScheduler(**free)
    components = {"unet": unet, "scheduler": scheduler, "text_encoder": text_encoder, "tokenizer": tokenizer}
    pipeline = atlas_diffusers.AtlasPipeline(**{**components, "default_num_inference_steps": 3, **changes})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# Files that take longest, which begin first: with `--dist loadfile` no worker then waits at the end for the other one's.
LONG = ["test_several_processes.py", "test_notebooks.py", "test_resuming.py", "test_trainer.py", "test_exact_resume.py"]


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))
    for item in items:
        if NUMERIC.intersection(item.path.parts):
            item.add_marker(pytest.mark.numeric)


@pytest.fixture(autouse=True, scope="session")
def signals_of_a_terminal():
    """A shell starts what it puts in the background with SIGINT ignored, which processes and their children inherit."""
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)


@pytest.fixture(autouse=True)
def global_random_state_is_untouched():
    before = torch.random.get_rng_state()
    yield
    assert torch.equal(before, torch.random.get_rng_state()), "the test changed the global random state"


@pytest.fixture
def float64():
    """
    Networks and noise that the test makes are float64: two ways of computing one thing then agree within ``assert_close``'s
    1e-7. Processors round float32 differently, and a few steps amplify a rounding by up to 10,000: to 1e-3 in float32, to
    1e-12 in float64.
    """
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def tiny_pipeline():
    return build_tiny_pipeline()


@pytest.fixture
def diffusers_log():
    """What Diffusers logs during a test."""
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    logger = diffusers.utils.logging.get_logger("diffusers")
    logger.addHandler(handler)
    yield records
    logger.removeHandler(handler)
