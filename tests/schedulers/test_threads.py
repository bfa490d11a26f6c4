"""Schedulers that threads share: a plan, a position and a history belong to the thread that chose the steps."""

import copy
import inspect
import pickle
import threading

import pytest
import torch
from conftest import seeded
from stock_pipelines import build_stock_pipeline, swap

import atlas_diffusers

SAMPLERS = [name for name in atlas_diffusers.SCHEDULERS if name.startswith("Atlas")]
EVERY = pytest.mark.parametrize("name", SAMPLERS)
STEPS = (3, 5, 8, 5)


def together(*calls):
    """The results of functions, each in a thread of its own."""
    results = [None] * len(calls)

    def call(index):
        results[index] = calls[index]()

    threads = [threading.Thread(target=call, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def network(x):
    return 0.5 * torch.tanh(x) + 0.3 * x.flip(-1)


def noise(seed):
    return torch.randn(1, 2, 4, 4, generator=seeded(seed))


def loop(scheduler, steps, seed, between=lambda: None):
    """A trajectory; ``between`` is called before every step."""
    scheduler.set_timesteps(steps)
    random = {"generator": seeded(seed)} if "generator" in inspect.signature(scheduler.step).parameters else {}
    x = noise(seed) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        between()
        x = scheduler.step(network(scheduler.scale_model_input(x, t)), t, x, **random).prev_sample
    return x


@EVERY
def test_threads_in_lockstep_get_what_they_get_alone(name):
    """Every step of one thread lies between two of the other, so that a shared position or history would be met."""
    scheduler = getattr(atlas_diffusers, name)()
    barrier = threading.Barrier(2, timeout=60)
    alone = [loop(scheduler, 6, seed) for seed in (1, 2)]
    shared = together(*(lambda seed=seed: loop(scheduler, 6, seed, barrier.wait) for seed in (1, 2)))
    assert torch.equal(shared[0], alone[0]) and torch.equal(shared[1], alone[1])
    assert not torch.equal(*alone)


def test_a_thread_that_chose_nothing_goes_on_with_the_last_choice():
    scheduler = atlas_diffusers.AtlasHeunScheduler()
    expected = loop(scheduler, 4, 1)
    scheduler.set_timesteps(4)
    x = noise(1) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        (x,) = together(lambda t=t, x=x: scheduler.step(network(scheduler.scale_model_input(x, t)), t, x).prev_sample)
    assert torch.equal(x, expected) and scheduler.step_index == len(scheduler.timesteps)


@EVERY
def test_a_stock_pipeline_may_be_shared_by_threads(name):
    """Stable Diffusion of Diffusers, called by four threads with other step counts and seeds, without a lock."""
    pipeline = swap(build_stock_pipeline("text2img"), name)
    pipeline.set_progress_bar_config(disable=True)
    # embeddings, since a fast tokenizer is not for threads to share
    with torch.no_grad():
        embeds, negative = pipeline.encode_prompt("a cat", "cpu", 1, True)
    inputs = {"prompt_embeds": embeds, "negative_prompt_embeds": negative, "height": 32, "width": 32, "output_type": "latent"}

    def picture(index):
        return pipeline(**inputs, num_inference_steps=STEPS[index], generator=seeded(index)).images

    alone = [picture(index) for index in range(4)]
    shared = together(*(lambda index=index: picture(index) for index in range(4)))
    assert all(torch.equal(a, b) for a, b in zip(alone, shared))
    assert len({float(x.sum()) for x in alone}) == 4


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))], ids=["deepcopy", "pickle"])
@EVERY
def test_a_copy_goes_on_where_its_original_stands(name, duplicate):
    scheduler, random = getattr(atlas_diffusers, name)(), {}
    if "generator" in inspect.signature(scheduler.step).parameters:
        random = {"generator": seeded()}
    scheduler.set_timesteps(6)
    t, x = scheduler.timesteps, noise(1) * scheduler.init_noise_sigma
    for index in range(3):
        x = scheduler.step(network(x), t[index], x, **random).prev_sample
    twin = duplicate(scheduler)
    assert twin.step_index == 3 and twin.config == scheduler.config
    results = []
    for each in (twin, scheduler):
        y, drawn = x, {key: seeded(5) for key in random}
        for value in t[3:].tolist():
            y = each.step(network(y), value, y, **drawn).prev_sample
        results.append(y)
    assert torch.equal(*results) and not torch.equal(results[0], x)


@pytest.mark.parametrize("name", ["AtlasDDIMScheduler", "AtlasHeunScheduler", "AtlasMultistepScheduler"])
def test_a_compiled_step_is_the_step(name):
    scheduler = getattr(atlas_diffusers, name)()
    expected = loop(scheduler, 3, 1)
    scheduler.step = torch.compile(scheduler.step, backend="eager")
    assert torch.equal(loop(scheduler, 3, 1), expected)
