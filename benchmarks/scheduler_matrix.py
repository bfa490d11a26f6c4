"""
What our samplers and Diffusers' can do, found by running them: ``python benchmarks/scheduler_matrix.py``.

Prints the table of samplers. A cell is ``ours / Diffusers``: ✓ if the option is accepted, samples of a toy network stay finite,
and the option makes the difference that its row is about (most often: another result than without it); – if not, or if there is
no such class for the process. A dot marks options of the other process and algorithms that draw no noise.
"""

import inspect
import itertools
from dataclasses import dataclass

import diffusers
import torch
from diffusers.utils import logging
from torch.utils._python_dispatch import TorchDispatchMode

import atlas_diffusers

# our class, Diffusers' for a variance preserving process, and for a flow
SAMPLERS = {
    "DDPM": ("AtlasDDPMScheduler", "DDPMScheduler", None),
    "DDIM": ("AtlasDDIMScheduler", "DDIMScheduler", None),
    "PNDM": ("AtlasPNDMScheduler", "PNDMScheduler", None),
    "Euler": ("AtlasEulerScheduler", "EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler"),
    "Euler ancestral": ("AtlasEulerAncestralScheduler", "EulerAncestralDiscreteScheduler", None),
    "Heun": ("AtlasHeunScheduler", "HeunDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"),
    "Multistep": ("AtlasMultistepScheduler", "DPMSolverMultistepScheduler", "DPMSolverMultistepScheduler"),
}
# how a class says that it cannot; NotImplementedError is a RuntimeError
REFUSALS = (TypeError, ValueError, AttributeError, IndexError, KeyError, RuntimeError, AssertionError)
STEPS = 8
BASE = {
    "VP": {"clip_sample": False, "skip_prk_steps": True, "set_alpha_to_one": True, "angle_power": None},
    "flow": {"use_flow_sigmas": True, "prediction_type": "flow_prediction"},
}
TRAILING = {"timestep_spacing": "trailing"}
ZERO_SNR = {"rescale_betas_zero_snr": True, **TRAILING}
V_PREDICTION = {"prediction_type": "v_prediction"}
THRESHOLD = {"thresholding": True, "sample_max_value": 1.5, "dynamic_thresholding_ratio": 0.9}
READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal")


def noise(seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def network(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * torch.tanh(x) + 0.3 * x.flip(-1)


@dataclass(frozen=True)
class Candidate:
    """A scheduler class for a process."""

    cls: type
    process: str

    def build(self, **options):
        """A scheduler; an option that its class does not know is a ``TypeError``."""
        base = {name: value for name, value in BASE[self.process].items() if name in inspect.signature(self.cls).parameters}
        return self.cls(**{**base, **options})


def takes_noise(scheduler) -> dict:
    """Arguments of ``step`` that make a sampler draw noise, where it can."""
    options = {"eta": 1.0, "s_churn": 5.0}
    return {name: value for name, value in options.items() if name in inspect.signature(scheduler.step).parameters}


def sample(scheduler, x=None, begin=0, change_after=None, generator=1, network=network, **options) -> torch.Tensor:
    """The end of a trajectory from ``timesteps[begin]``; the sample is changed after call ``change_after``."""
    generator = torch.Generator().manual_seed(generator) if isinstance(generator, int) else generator
    if "generator" in inspect.signature(scheduler.step).parameters:
        options["generator"] = generator
    x = (noise() if x is None else x) * getattr(scheduler, "init_noise_sigma", 1.0)
    scaled = getattr(scheduler, "scale_model_input", lambda x, t: x)  # Diffusers' flow schedulers have neither
    for call, t in enumerate(scheduler.timesteps[begin:]):
        x = scheduler.step(network(scaled(x, t)), t, x, **options).prev_sample
        x = x + 1 if call == change_after else x
    return x


def chosen(candidate, options: dict | None = None, **request):
    """A scheduler whose steps are chosen."""
    scheduler = candidate.build(**(options or {}))
    scheduler.set_timesteps(**(request or {"num_inference_steps": STEPS}))
    return scheduler


def differs(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool(a.isfinite().all()) and not torch.allclose(a, b, rtol=1e-4, atol=1e-4)


def option(against: dict | None = None, steps: dict | None = None, **options):
    """Check that the options work, with ``set_timesteps(**steps)``, and give other samples than ``against``."""
    return lambda candidate: differs(sample(chosen(candidate, options, **(steps or {}))), sample(chosen(candidate, against)))


def request(**arguments):
    """Check that ``set_timesteps`` takes the arguments and places other steps than by default."""
    return lambda candidate: differs(sample(chosen(candidate, **arguments)), sample(chosen(candidate)))


def begin_index(candidate) -> bool:
    """``set_begin_index``: a trajectory that starts in the middle depends on where it starts."""
    ends = []
    for begin in (2, 4):
        scheduler = chosen(candidate)
        scheduler.set_begin_index(begin)
        ends.append(sample(scheduler, begin=begin))
    return scheduler.begin_index == 4 and differs(*ends)


def callbacks(candidate) -> bool:
    """Changing the sample between any two network calls changes the result, and not only through the network."""
    unchanged = sample(chosen(candidate), network=torch.zeros_like)
    calls = range(len(chosen(candidate).timesteps))
    return all(differs(sample(chosen(candidate), change_after=call, network=torch.zeros_like), unchanged) for call in calls)


def generator_list(candidate) -> bool | None:
    """With one generator a sample, a sample does not depend on its batch."""
    noisy = takes_noise(candidate.build())

    def ends(x: torch.Tensor, *seeds: int) -> torch.Tensor:
        return sample(chosen(candidate), x, generator=[torch.Generator().manual_seed(seed) for seed in seeds], **noisy)

    together = ends(noise(), 1, 2)
    if torch.equal(together, ends(noise(), 3, 4)):
        return None
    return torch.allclose(together[1:], ends(noise()[1:], 2), atol=1e-5)


def forward(method: str, timesteps: list[int] | None = None):
    """Check a method of the forward process, with a timestep of its own for every sample: of the steps, or any."""

    def check(candidate) -> bool:
        scheduler = chosen(candidate)
        t = scheduler.timesteps[[1, 5]] if timesteps is None else torch.tensor(timesteps)
        function = getattr(scheduler, method)
        together = function(noise(), noise(1), t)
        alone = torch.cat([function(noise()[i : i + 1], noise(1)[i : i + 1], t[i : i + 1]) for i in range(2)])
        return torch.allclose(together, alone) and differs(together, function(noise(), noise(1), t.flip(0)))

    return check


def scale_noise(candidate) -> bool:
    """Noise is mixed in at the level of each sample's timestep."""
    scheduler = chosen(candidate)
    t = scheduler.timesteps[[1, 5]]
    together = scheduler.scale_noise(noise(), t, noise(1))
    alone = torch.cat([scheduler.scale_noise(noise()[i : i + 1], t[i : i + 1], noise(1)[i : i + 1]) for i in range(2)])
    return torch.allclose(together, alone) and differs(together, scheduler.scale_noise(noise(), t.flip(0), noise(1)))


def per_token_timesteps(candidate) -> bool:
    """Tokens with a time of their own are stepped from there."""
    scheduler = chosen(candidate)
    tokens, t = noise().flatten(2), scheduler.timesteps[0]
    own = torch.stack([t.expand(3), scheduler.timesteps[[0, 2, 4]]])
    return differs(scheduler.step(network(tokens), t, tokens, per_token_timesteps=own)[0], tokens)


def float32_inside(candidate) -> bool:
    """The last step of a bfloat16 sample is that of float32, rounded once."""
    x = noise().bfloat16()
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        scheduler = chosen(candidate, TRAILING if candidate.process == "VP" else None)
        results.append(scheduler.step(network(x).to(dtype), scheduler.timesteps[-1], x.to(dtype)).prev_sample)
    return results[0].dtype == torch.bfloat16 and torch.equal(results[0], results[1].bfloat16())


class _Reads(TorchDispatchMode):
    """Counts the operations that read values out of tensors."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket.__name__ in READS
        return function(*args, **(kwargs or {}))


def no_reads(candidate) -> bool:
    """No step of a trajectory reads a value out of a tensor, which on a GPU waits for it."""
    scheduler = chosen(candidate)
    with _Reads() as reads:
        sample(scheduler)
    return reads.count == 0


def straight(candidate) -> bool:
    """Along straight lines a flow ends its velocity away from the noise, on average if noise is drawn on the way."""
    return abs((sample(chosen(candidate), network=torch.ones_like) - noise()).mean() + 1) < 0.2


def shifted(candidate) -> bool:
    """A shift of the noise levels by an option, `flow_shift` with Diffusers' multistep solvers."""
    name = "shift" if "shift" in inspect.signature(candidate.cls).parameters else "flow_shift"
    return option(**{name: 3.0})(candidate)


def set_shift(candidate) -> bool:
    """A shift of a scheduler that is there already."""
    scheduler = candidate.build()
    scheduler.set_shift(3.0)
    scheduler.set_timesteps(STEPS)
    return differs(sample(scheduler), sample(chosen(candidate)))


def vp(check) -> dict:
    return {"VP": check}


def flow(check) -> dict:
    return {"flow": check}


def both(check) -> dict:
    return {"VP": check, "flow": check}


DYNAMIC = {"use_dynamic_shifting": True, "steps": {"num_inference_steps": STEPS, "mu": 2.0}}

FEATURES = {
    "prediction `epsilon`": vp(option(prediction_type="epsilon", against={"prediction_type": "v_prediction"})),
    **{f"prediction `{name}`": vp(option(prediction_type=name)) for name in ("sample", "v_prediction")},
    "prediction `flow_prediction`": {**vp(option(prediction_type="flow_prediction")), **flow(straight)},
    "betas `linear`": vp(option(beta_schedule="linear", against={"beta_schedule": "scaled_linear"})),
    **{
        f"betas `{name}`": vp(option(beta_schedule=name, against={"beta_schedule": "linear"}))
        for name in ("scaled_linear", "squaredcos_cap_v2", "quadratic", "sigmoid", "exponential", "laplace", "karras")
    },
    "`trained_betas`": vp(option(trained_betas=torch.linspace(0.001, 0.03, 1000).tolist())),
    "`rescale_betas_zero_snr`": vp(option(**ZERO_SNR, **V_PREDICTION, against={**TRAILING, **V_PREDICTION})),
    "the same with `epsilon`": vp(option(**ZERO_SNR, against=TRAILING)),
    **{
        f"spacing `{a}`": vp(option(timestep_spacing=a, against={"timestep_spacing": b}))
        for a, b in itertools.pairwise(("linspace", "leading", "trailing", "linspace"))
    },
    "`shift`": flow(shifted),
    "`set_shift`": flow(set_shift),
    "`use_dynamic_shifting` with `mu=`": flow(option(**DYNAMIC)),
    "the same, `linear`": flow(option(**DYNAMIC, time_shift_type="linear")),
    "`shift_terminal`": flow(option(shift_terminal=0.1)),
    "`invert_sigmas`": flow(option(invert_sigmas=True)),
    "`stochastic_sampling`": flow(option(stochastic_sampling=True)),
    "`timesteps=`": both(request(timesteps=[901, 701, 401, 101])),
    "`sigmas=`": {**vp(request(sigmas=[10.0, 5.0, 1.0, 0.1, 0.0])), **flow(request(sigmas=[0.95, 0.7, 0.4, 0.1]))},
    **{
        f"`use_{name}`": both(option(**{f"use_{name}": True}))
        for name in ("karras_sigmas", "exponential_sigmas", "beta_sigmas", "lu_lambdas")
    },
    "`final_sigmas_type`": vp(option(final_sigmas_type="sigma_min", against={"final_sigmas_type": "zero"})),
    "`clip_sample`": vp(option(clip_sample=True)),
    "`thresholding`": both(option(**THRESHOLD)),
    "`set_begin_index`": both(begin_index),
    "a callback changes the sample": both(callbacks),
    "a list of generators": both(generator_list),
    "`add_noise` at steps, one a sample": vp(forward("add_noise")),
    "`add_noise` at any timesteps": vp(forward("add_noise", [123, 777])),
    "`get_velocity`": vp(forward("get_velocity", [123, 777])),
    "`scale_noise` at steps, one a sample": flow(scale_noise),
    "`per_token_timesteps=`": flow(per_token_timesteps),
    "half precision computed in float32": both(float32_inside),
    "no `.item()` or its like in `step`": both(no_reads),
}


def supports(check, candidate) -> str:
    """The symbol of a cell's half."""
    if check is None:
        return "·"
    try:
        result = candidate is not None and check(candidate)
    except REFUSALS:
        result = False
    return "·" if result is None else "✓" if result else "–"


def main() -> None:
    logging.set_verbosity_error()
    columns = [(name, process) for process in BASE for name in SAMPLERS]
    print(f"| ours / Diffusers {diffusers.__version__} | {' | '.join(f'{process} {name}' for name, process in columns)} |")
    print(f"|---|{':-:|' * len(columns)}")
    for feature, checks in FEATURES.items():
        cells = []
        for name, process in columns:
            ours, *stock = SAMPLERS[name]
            pair = (getattr(atlas_diffusers, ours), getattr(diffusers, stock[process == "flow"] or "", None))
            halves = [supports(checks.get(process), cls and Candidate(cls, process)) for cls in pair]
            cells.append("·" if halves == ["·", "·"] else " / ".join(halves))
        print(f"| {feature} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
