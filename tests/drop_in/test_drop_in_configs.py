"""Configurations travel between Diffusers' schedulers and ours, in both directions, in silence, with the noise process."""

import functools
import inspect
import json
import logging
import warnings

import diffusers
import pytest
import torch
from diffusers.utils import DummyObject
from stock_pipelines import ANIMATEDIFF, STABLE_DIFFUSION, STABLE_DIFFUSION_XL, STOCK, build_stock_pipeline, silence, swap

import atlas_diffusers
from atlas_diffusers import BaseNoiseScheduler
from atlas_diffusers.schedules import BETA_SCHEDULES

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # Diffusers with numpy 2
OTHER_PROCESS = ("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler", "RePaintScheduler", "UnCLIPScheduler")


def stock_classes():
    """Diffusers' schedulers of the discrete variance preserving process, by name."""
    found = {}
    for name in dir(diffusers):
        cls = getattr(diffusers, name) if name.endswith("Scheduler") else None
        if cls is None or isinstance(cls, DummyObject) or name in (*OTHER_PROCESS, *atlas_diffusers.SCHEDULERS):
            continue
        if cls.__module__.startswith("diffusers.") and "beta_schedule" in inspect.signature(cls.__init__).parameters:
            found[name] = cls
    return found


CLASSES = stock_classes()
# their own options make Diffusers' other schedulers warn at the second swap, ours or not
STRANGERS = ("LCMScheduler", "TCDScheduler", "SASolverScheduler")
PUBLISHED = {"stable-diffusion": STABLE_DIFFUSION, "xl": STABLE_DIFFUSION_XL, "animatediff": ANIMATEDIFF}
PROCESS = {
    "num_train_timesteps": 500,
    "beta_start": 0.0002,
    "beta_end": 0.013,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
}
KEEPS_ITS_PROCESS = [n for n in atlas_diffusers.SCHEDULERS if not issubclass(getattr(atlas_diffusers, n), BaseNoiseScheduler)]


def assert_same_process(actual, expected, message=None):
    torch.testing.assert_close(actual.alphas_cumprod, expected.alphas_cumprod, rtol=0, atol=1e-6, msg=message)


def test_many_classes_are_tried():
    assert len(CLASSES) >= 18 and CLASSES.keys() >= set(STOCK.values())


def test_silence_hears_both_ways_of_warning():
    logger = logging.getLogger("diffusers.configuration_utils")
    with pytest.raises(AssertionError, match="nonsense"), silence():
        diffusers.DDIMScheduler.from_config({**diffusers.DDIMScheduler().config, "nonsense": 1})
    with pytest.raises(AssertionError, match="by logger"), silence():
        logger.warning("by logger")
    with pytest.raises(AssertionError, match="FutureWarning: by module"), silence():
        warnings.warn("by module", FutureWarning, stacklevel=1)
    with pytest.raises(AssertionError, match="twice"):
        for _ in range(2):
            try:
                with silence():
                    warnings.warn("twice", stacklevel=1)
            except AssertionError as error:
                last = error
        raise last


# ------------------------------------------------------------------ in


@pytest.mark.parametrize("stock", CLASSES)
def test_every_class_reads_every_scheduler_of_diffusers(stock):
    for options, names in (({}, KEEPS_ITS_PROCESS), (PROCESS, atlas_diffusers.SCHEDULERS)):
        original = CLASSES[stock](**options)
        for name in names:
            with silence():
                ours = getattr(atlas_diffusers, name).from_config(original.config)
            assert type(ours).__name__ == ours.config._class_name == name
            assert len(ours.alphas_cumprod) == original.config.num_train_timesteps
            if name in KEEPS_ITS_PROCESS:
                assert_same_process(ours, original, name)
                assert ours.config.prediction_type == original.config.get("prediction_type", "epsilon")


@functools.cache
def original_and_file(stock: str):
    """A scheduler of Diffusers, and what is read from its file: every option is set there, also to null."""
    original = CLASSES[stock]()
    return original, json.loads(original.to_json_string())


@pytest.mark.parametrize("stock", CLASSES)
def test_every_class_reads_what_diffusers_saved(stock):
    original, config = original_and_file(stock)
    for name in atlas_diffusers.SCHEDULERS:
        with silence():
            ours = getattr(atlas_diffusers, name).from_config(config)
        ours.set_timesteps(4)
        if name in KEEPS_ITS_PROCESS:
            assert_same_process(ours, original, name)


@pytest.mark.parametrize("stock", CLASSES)
def test_swaps_go_on_in_silence(stock):
    """From Diffusers to one of ours, to another of ours, and to Diffusers again."""
    original, config = original_and_file(stock)
    config = {key: value for key, value in config.items() if key != "variance_type"}  # another test's matter
    names = KEEPS_ITS_PROCESS
    for first, second, last in zip(names, [*names[1:], names[0]], STOCK.values()):
        with silence():
            ours = getattr(atlas_diffusers, first).from_config(config)
            assert_same_process(getattr(atlas_diffusers, second).from_config(ours.config), original)
        if stock not in STRANGERS:
            with silence():
                assert_same_process(CLASSES[last].from_config(ours.config), original)


@pytest.mark.parametrize("name", atlas_diffusers.SCHEDULERS)
@pytest.mark.parametrize("published", PUBLISHED)
def test_every_class_reads_published_files(published, name):
    """A scheduler_config.json is read as it is, where it says what its author chose."""
    config = PUBLISHED[published]
    with silence():
        ours = getattr(atlas_diffusers, name).from_config(config)
    chosen = {key: value for key, value in config.items() if not key.startswith("_")}
    if name not in KEEPS_ITS_PROCESS:
        chosen = {key: value for key, value in chosen.items() if key not in ("beta_schedule", "trained_betas")}
    assert ours.config.items() >= chosen.items()


@pytest.mark.parametrize("name", KEEPS_ITS_PROCESS)
def test_zero_snr_and_explicit_betas_come_in(name):
    for options in ({"rescale_betas_zero_snr": True, **PROCESS}, {"trained_betas": torch.linspace(0.001, 0.01, 1000).tolist()}):
        original = diffusers.DDIMScheduler(**options)
        with silence():
            assert_same_process(getattr(atlas_diffusers, name).from_config(original.config), original)


# ------------------------------------------------------------------ out


@pytest.mark.parametrize("schedule", BETA_SCHEDULES)
@pytest.mark.parametrize("name", KEEPS_ITS_PROCESS)
def test_every_beta_schedule_goes_out(name, schedule):
    ours = getattr(atlas_diffusers, name)(beta_start=0.0002, beta_end=0.013, beta_schedule=schedule)
    for stock in STOCK.values():
        with silence():
            assert_same_process(CLASSES[stock].from_config(ours.config), ours, stock)


@pytest.mark.parametrize("stock", CLASSES)
def test_every_class_goes_out_to_every_scheduler_of_diffusers(stock):
    """All classes to the schedulers that we reproduce; to the others, which read the same config, two."""
    names = ("AtlasHeunScheduler", "KarrasNoiseScheduler")
    for name in atlas_diffusers.SCHEDULERS if stock in STOCK.values() else names:
        ours = getattr(atlas_diffusers, name)(**PROCESS)
        with silence():
            back = CLASSES[stock].from_config(ours.config)
        assert_same_process(back, ours, name)
        assert back.config.get("prediction_type", "epsilon") == ours.config.prediction_type


@pytest.mark.parametrize("name", atlas_diffusers.SCHEDULERS)
def test_defaults_go_out(name):
    ours = getattr(atlas_diffusers, name)()
    for stock in STOCK.values():
        with silence():
            assert_same_process(CLASSES[stock].from_config(ours.config), ours, stock)


@pytest.mark.parametrize("schedule", ["linear", "sigmoid"])
@pytest.mark.parametrize("name", KEEPS_ITS_PROCESS)
def test_zero_snr_goes_out_to_the_schedulers_that_know_it(name, schedule):
    options = {"beta_schedule": schedule, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    ours = getattr(atlas_diffusers, name)(**options)
    for stock, cls in CLASSES.items():
        if "rescale_betas_zero_snr" in inspect.signature(cls.__init__).parameters:
            with silence():
                assert_same_process(cls.from_config(ours.config), ours, stock)


@pytest.mark.parametrize("name", KEEPS_ITS_PROCESS)
@pytest.mark.parametrize("kind", ["text2img", "xl", "animatediff"])
def test_a_pipeline_gets_its_own_config_back(kind, name):
    """Options that one of our classes does not have stay in its config for the next one."""
    pipeline = build_stock_pipeline(kind, prediction_type="v_prediction")
    original = pipeline.scheduler
    with silence():
        for other in (name, *KEEPS_ITS_PROCESS):
            swap(pipeline, other)
        back = type(original).from_config(pipeline.scheduler.config)
    assert {key: back.config[key] for key in original.config if key != "_use_default_values"} == {
        key: value for key, value in original.config.items() if key != "_use_default_values"
    }
    assert_same_process(back, original)
