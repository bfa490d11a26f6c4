"""Every list of samplers and of beta schedules is that of the two tables."""

import diffusers
import pytest
from test_presets import SCRIPT

import atlas_diffusers
from atlas_diffusers import schedulers
from atlas_diffusers._registration import CLASSES, NOISE_SCHEDULERS, SAMPLERS
from atlas_diffusers.pipelines.named_schedulers import scheduler_class, short_names
from atlas_diffusers.schedules import BETA_SCHEDULES, get_betas
from atlas_diffusers.schedules.betas import STOCK_NAMES
from atlas_diffusers.system import BetaSchedule, NoiseSchedulerConfig, NoiseSchedulerFactory, SamplerFactory, SamplingMethod


def test_samplers_are_everywhere():
    names = list(SAMPLERS.values())
    assert len(set(names)) == len(names) == 7
    assert [method.value for method in SamplingMethod] == list(SAMPLERS)
    assert [name for name in schedulers.__all__ if name.startswith("Atlas")] == sorted(names)
    assert atlas_diffusers.SCHEDULERS == [*names, *NOISE_SCHEDULERS.values()]
    assert list(SCRIPT["CLASSES"].values()) == names and {name for name, _ in SCRIPT["presets"]().values()} <= set(names)
    assert [short_names()[short.replace("-", "")] for short in SCRIPT["CLASSES"]] == names
    noise = NoiseSchedulerFactory.create_scheduler(NoiseSchedulerConfig())
    for method, name in SAMPLERS.items():
        assert type(SamplerFactory.create_sampler(method, noise)).__name__ == name
        assert getattr(diffusers, name) is getattr(atlas_diffusers, name) is getattr(schedulers, name)
        assert getattr(schedulers, name).__module__.startswith("atlas_diffusers.schedulers.scheduling_atlas_")


@pytest.mark.parametrize("schedule", NOISE_SCHEDULERS)
def test_a_beta_schedule_is_everywhere(schedule):
    name = NOISE_SCHEDULERS[schedule]
    cls = getattr(atlas_diffusers, name)
    assert cls is getattr(diffusers, name) is getattr(schedulers, name) is scheduler_class(name)
    assert cls.__doc__ == BETA_SCHEDULES[schedule].__doc__ and CLASSES[name] == ".schedulers" and name in schedulers.__all__
    assert cls().betas.tolist() == get_betas(schedule).tolist()
    config = NoiseSchedulerConfig(beta_schedule=BetaSchedule(schedule))
    assert type(NoiseSchedulerFactory.create_scheduler(config)) is cls
    assert f"{schedule}-ddim" in SCRIPT["presets"]()


def test_beta_schedules_are_those_of_the_functions():
    functions = [BETA_SCHEDULES[name] for name in NOISE_SCHEDULERS]
    assert [schedule.value for schedule in BetaSchedule] == list(NOISE_SCHEDULERS)
    assert len(set(functions)) == len(functions)
    assert len(functions) == 8 and not set(STOCK_NAMES) & set(NOISE_SCHEDULERS) and set(STOCK_NAMES) <= set(BETA_SCHEDULES)
    assert BETA_SCHEDULES["squaredcos_cap_v2"] is BETA_SCHEDULES["cosine"]
