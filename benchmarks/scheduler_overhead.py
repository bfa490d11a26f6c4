"""
Time of our schedulers against Diffusers' for the same algorithm: ``python benchmarks/scheduler_overhead.py``.

A step is what a pipeline does for one network call, ``scale_model_input`` and ``step``, with Stable Diffusion's noise process.
The network's output is a fixed tensor, so only the scheduler is timed; the noise that DDPM and Euler ancestral draw is part of
it, for both. Trajectories of the two alternate in one process, in swapped order every repeat; the ratio is the median of the
repeats' ratios. Flow pipelines call ``step`` alone; their rows compare with Diffusers' flow schedulers at shift 3.

Whether glibc gives freed memory back to the system between steps, which can cost more than a step, is chance. To keep it:
``MALLOC_TRIM_THRESHOLD_=1000000000 MALLOC_MMAP_THRESHOLD_=1000000000 python benchmarks/scheduler_overhead.py``.
"""

import argparse
import statistics
from time import perf_counter

import diffusers
import torch

import atlas_diffusers

STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
ALGORITHMS = {
    "DDIM": ("AtlasDDIMScheduler", "DDIMScheduler", {"set_alpha_to_one": False, "clip_sample": False}),
    "DDPM": ("AtlasDDPMScheduler", "DDPMScheduler", {"clip_sample": False}),
    "PNDM": ("AtlasPNDMScheduler", "PNDMScheduler", {"skip_prk_steps": True}),
    "Euler": ("AtlasEulerScheduler", "EulerDiscreteScheduler", {"timestep_spacing": "leading"}),
    "Euler ancestral": (
        "AtlasEulerAncestralScheduler",
        "EulerAncestralDiscreteScheduler",
        {"timestep_spacing": "leading"},
    ),
    "Heun": ("AtlasHeunScheduler", "HeunDiscreteScheduler", {"timestep_spacing": "leading"}),
    "Multistep": ("AtlasMultistepScheduler", "DPMSolverMultistepScheduler", {"timestep_spacing": "leading"}),
}
FLOW = {
    "DDIM, flow": ("AtlasDDIMScheduler", "FlowMatchEulerDiscreteScheduler"),
    "Euler, flow": ("AtlasEulerScheduler", "FlowMatchEulerDiscreteScheduler"),
    "Heun, flow": ("AtlasHeunScheduler", "FlowMatchHeunDiscreteScheduler"),
    "Multistep, flow": ("AtlasMultistepScheduler", "FlowMatchEulerDiscreteScheduler"),
}
SHAPES = ((1, 4, 64, 64), (8, 4, 128, 128))
STEPS = 50


def build(algorithm: str) -> tuple:
    """Our scheduler and Diffusers', configured alike."""
    if algorithm in FLOW:
        ours, theirs = FLOW[algorithm]
        stock = getattr(diffusers, theirs)(shift=3.0)
        return getattr(atlas_diffusers, ours).from_config(stock.config), stock
    ours, theirs, options = ALGORITHMS[algorithm]
    options = {**STABLE_DIFFUSION, **options}
    if algorithm == "DDPM":
        del options["steps_offset"]  # Diffusers' class passes over it in silence
    return getattr(atlas_diffusers, ours)(**options), getattr(diffusers, theirs)(**options)


def time_set_timesteps(scheduler, before: int) -> float:
    """Seconds that ``set_timesteps`` takes after a trajectory of ``before`` steps."""
    scheduler.set_timesteps(before)
    start = perf_counter()
    scheduler.set_timesteps(STEPS)
    return perf_counter() - start


def time_step(scheduler, noise: torch.Tensor, output: torch.Tensor, scaled: bool) -> float:
    """Mean seconds a step of one trajectory, ``set_timesteps`` not included; the network's input is ``scaled`` first."""
    scheduler.set_timesteps(STEPS)
    x = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    start = perf_counter()
    for t in scheduler.timesteps:
        if scaled:
            scheduler.scale_model_input(x, t)
        x = scheduler.step(output, t, x, return_dict=False)[0]
    return (perf_counter() - start) / len(scheduler.timesteps)


def compare(measure, repeats: int) -> tuple[float, float, float]:
    """
    Median time of ours, of theirs, and of their ratio.

    Args:
        measure: ``measure(0)`` times ours and ``measure(1)`` theirs.
        repeats: pairs of measurements, after one that is thrown away.
    """
    pairs = []
    for repeat in range(repeats + 1):
        order = (0, 1) if repeat % 2 else (1, 0)
        pairs.append([seconds for _, seconds in sorted((which, measure(which)) for which in order)])
    ours, theirs = zip(*pairs[1:])
    return statistics.median(ours), statistics.median(theirs), statistics.median(a / b for a, b in pairs[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=21, help="pairs of trajectories a row (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print("| algorithm | call | ours, µs | Diffusers, µs | ratio |\n|---|---|---:|---:|---:|")
    for algorithm in (*ALGORITHMS, *FLOW):
        pair = build(algorithm)
        rows = {
            f"set_timesteps({STEPS})": lambda which, pair=pair: time_set_timesteps(pair[which], STEPS - 1),
            "the same again": lambda which, pair=pair: time_set_timesteps(pair[which], STEPS),
        }
        for shape in SHAPES:
            step = (*torch.randn(2, *shape), algorithm not in FLOW)
            rows["step " + "x".join(map(str, shape))] = lambda which, pair=pair, step=step: time_step(pair[which], *step)
        for call, measure in rows.items():
            ours, theirs, ratio = compare(measure, args.repeats)
            print(f"| {algorithm} | {call} | {ours * 1e6:.1f} | {theirs * 1e6:.1f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
