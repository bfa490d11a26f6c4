"""
What our samplers and Diffusers' can do, found by running them: ``python benchmarks/scheduler_matrix.py``.

Prints the README's table. A cell is ``ours / Diffusers``: ✓ if the option is accepted, samples of a toy network stay finite,
and the option makes the difference that its row is about (most often: another result than without it); – if not. A dot
marks algorithms that draw no noise.
"""

import inspect
import itertools

import diffusers
import torch
from diffusers.utils import logging
from torch.utils._python_dispatch import TorchDispatchMode

import atlas_diffusers

SAMPLERS = {
    "DDPM": ("AtlasDDPMScheduler", "DDPMScheduler"),
    "DDIM": ("AtlasDDIMScheduler", "DDIMScheduler"),
    "PNDM": ("AtlasPNDMScheduler", "PNDMScheduler"),
    "Euler": ("AtlasEulerScheduler", "EulerDiscreteScheduler"),
    "Euler ancestral": ("AtlasEulerAncestralScheduler", "EulerAncestralDiscreteScheduler"),
    "Heun": ("AtlasHeunScheduler", "HeunDiscreteScheduler"),
    "Multistep": ("AtlasMultistepScheduler", "DPMSolverMultistepScheduler"),
}
# how a class says that it cannot; NotImplementedError is a RuntimeError
REFUSALS = (TypeError, ValueError, AttributeError, IndexError, KeyError, RuntimeError)
STEPS = 8
BASE = {"clip_sample": False, "skip_prk_steps": True, "set_alpha_to_one": True, "angle_power": None}
ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
THRESHOLD = {"thresholding": True, "sample_max_value": 1.5, "dynamic_thresholding_ratio": 0.9}
READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal")


def noise(seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def network(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * torch.tanh(x) + 0.3 * x.flip(-1)


def build(cls, **options):
    """A scheduler of ``cls``; an option that it does not know is a ``TypeError``."""
    base = {name: value for name, value in BASE.items() if name in inspect.signature(cls).parameters}
    return cls(**{**base, **options})


def takes_noise(scheduler) -> dict:
    """Arguments of ``step`` that make a sampler draw noise, where it can."""
    options = {"eta": 1.0, "s_churn": 5.0}
    return {name: value for name, value in options.items() if name in inspect.signature(scheduler.step).parameters}


def sample(scheduler, x=None, begin=0, change_after=None, generator=1, network=network, **options) -> torch.Tensor:
    """The end of a trajectory from ``timesteps[begin]``; the sample is changed after call ``change_after``."""
    generator = torch.Generator().manual_seed(generator) if isinstance(generator, int) else generator
    if "generator" in inspect.signature(scheduler.step).parameters:
        options["generator"] = generator
    x = (noise() if x is None else x) * scheduler.init_noise_sigma
    for call, t in enumerate(scheduler.timesteps[begin:]):
        x = scheduler.step(network(scheduler.scale_model_input(x, t)), t, x, **options).prev_sample
        x = x + 1 if call == change_after else x
    return x


def chosen(cls, options: dict | None = None, **request):
    """A scheduler whose steps are chosen."""
    scheduler = build(cls, **(options or {}))
    scheduler.set_timesteps(**(request or {"num_inference_steps": STEPS}))
    return scheduler


def differs(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool(a.isfinite().all()) and not torch.allclose(a, b, rtol=1e-4, atol=1e-4)


def option(against: dict | None = None, **options):
    """Check that the options work and give other samples than ``against``."""
    return lambda cls: differs(sample(chosen(cls, options)), sample(chosen(cls, against)))


def request(**arguments):
    """Check that ``set_timesteps`` takes the arguments and places other steps than by default."""
    return lambda cls: differs(sample(chosen(cls, **arguments)), sample(chosen(cls)))


def begin_index(cls) -> bool:
    """``set_begin_index``: a trajectory that starts in the middle depends on where it starts."""
    ends = []
    for begin in (2, 4):
        scheduler = chosen(cls)
        scheduler.set_begin_index(begin)
        ends.append(sample(scheduler, begin=begin))
    return scheduler.begin_index == 4 and differs(*ends)


def callbacks(cls) -> bool:
    """Changing the sample between any two network calls changes the result, and not only through the network."""
    unchanged = sample(chosen(cls), network=torch.zeros_like)
    calls = range(len(chosen(cls).timesteps))
    return all(differs(sample(chosen(cls), change_after=call, network=torch.zeros_like), unchanged) for call in calls)


def generator_list(cls) -> bool | None:
    """With one generator a sample, a sample does not depend on its batch."""
    scheduler = chosen(cls)
    if "generator" not in inspect.signature(scheduler.step).parameters:
        return None
    both = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    together = sample(scheduler, generator=both, **takes_noise(scheduler))
    alone = sample(chosen(cls), noise()[1:], generator=[torch.Generator().manual_seed(2)], **takes_noise(scheduler))
    return torch.allclose(together[1:], alone, atol=1e-5)


def forward(method: str, timesteps: list[int] | None = None):
    """Check a method of the forward process, with a timestep of its own for every sample: of the steps, or any."""

    def check(cls) -> bool:
        scheduler = chosen(cls)
        t = scheduler.timesteps[[1, 5]] if timesteps is None else torch.tensor(timesteps)
        function = getattr(scheduler, method)
        together = function(noise(), noise(1), t)
        alone = torch.cat([function(noise()[i : i + 1], noise(1)[i : i + 1], t[i : i + 1]) for i in range(2)])
        return torch.allclose(together, alone) and differs(together, function(noise(), noise(1), t.flip(0)))

    return check


def float32_inside(cls) -> bool:
    """The last step of a bfloat16 sample is that of float32, rounded once."""
    x = noise().bfloat16()
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        scheduler = chosen(cls, {"timestep_spacing": "trailing"})
        results.append(scheduler.step(network(x).to(dtype), scheduler.timesteps[-1], x.to(dtype)).prev_sample)
    return results[0].dtype == torch.bfloat16 and torch.equal(results[0], results[1].bfloat16())


class _Reads(TorchDispatchMode):
    """Counts the operations that read values out of tensors."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket.__name__ in READS
        return function(*args, **(kwargs or {}))


def no_reads(cls) -> bool:
    """No step of a trajectory reads a value out of a tensor, which on a GPU waits for it."""
    scheduler = chosen(cls)
    with _Reads() as reads:
        sample(scheduler)
    return reads.count == 0


FEATURES = {
    "prediction `epsilon`": option(prediction_type="epsilon", against={"prediction_type": "v_prediction"}),
    **{f"prediction `{name}`": option(prediction_type=name) for name in ("sample", "v_prediction", "flow_prediction")},
    "betas `linear`": option(beta_schedule="linear", against={"beta_schedule": "scaled_linear"}),
    **{
        f"betas `{name}`": option(beta_schedule=name, against={"beta_schedule": "linear"})
        for name in ("scaled_linear", "squaredcos_cap_v2", "quadratic", "sigmoid", "exponential", "laplace", "karras")
    },
    "`trained_betas`": option(trained_betas=torch.linspace(0.001, 0.03, 1000).tolist()),
    "`rescale_betas_zero_snr`": option(
        **ZERO_SNR, prediction_type="v_prediction", against={"timestep_spacing": "trailing", "prediction_type": "v_prediction"}
    ),
    "the same with `epsilon`": option(**ZERO_SNR, against={"timestep_spacing": "trailing"}),
    **{
        f"spacing `{a}`": option(timestep_spacing=a, against={"timestep_spacing": b})
        for a, b in itertools.pairwise(("linspace", "leading", "trailing", "linspace"))
    },
    "`timesteps=`": request(timesteps=[901, 701, 401, 101]),
    "`sigmas=`": request(sigmas=[10.0, 5.0, 1.0, 0.1, 0.0]),
    **{
        f"`use_{name}`": option(**{f"use_{name}": True})
        for name in ("karras_sigmas", "exponential_sigmas", "beta_sigmas", "lu_lambdas")
    },
    "`final_sigmas_type`": option(final_sigmas_type="sigma_min", against={"final_sigmas_type": "zero"}),
    "`clip_sample`": option(clip_sample=True),
    "`thresholding`": option(**THRESHOLD),
    "`set_begin_index`": begin_index,
    "a callback changes the sample": callbacks,
    "a list of generators": generator_list,
    "`add_noise` at steps, one a sample": forward("add_noise"),
    "`add_noise` at any timesteps": forward("add_noise", [123, 777]),
    "`get_velocity`": forward("get_velocity", [123, 777]),
    "half precision computed in float32": float32_inside,
    "no `.item()` or its like in `step`": no_reads,
}


def supports(check, cls) -> str:
    """The symbol of a cell's half."""
    try:
        result = check(cls)
    except REFUSALS:
        result = False
    return "·" if result is None else "✓" if result else "–"


def main() -> None:
    logging.set_verbosity_error()
    print(f"| ours / Diffusers {diffusers.__version__} | {' | '.join(SAMPLERS)} |\n|---|{':-:|' * len(SAMPLERS)}")
    for feature, check in FEATURES.items():
        cells = []
        for ours, theirs in SAMPLERS.values():
            cells.append(f"{supports(check, getattr(atlas_diffusers, ours))} / {supports(check, getattr(diffusers, theirs))}")
        print(f"| {feature} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
