"""
Which scheduler works in which flow pipeline of Diffusers, found by running them: ``python benchmarks/pipelines.py``.

The pipelines are the tiny ones of the tests (extra ``test``): their networks return the exact velocity of a Gaussian, so the
end of the probability-flow ODE is known. A number is the relative error there, 10 steps of the pipeline's published
configuration. "No" names what the pipeline asks for and the class does not have; a scheduler is "wrong" if four times the steps
do not bring it below half of stock Euler's error, or, where it draws noise, near the data's mean and deviation. Ours is the
multistep solver if all seven classes work, otherwise those that do not. UniPC and DPM-Solver++ are told by their own options to
sample a flow, and its shift.
"""

import re
import sys
from pathlib import Path

import diffusers
from diffusers.utils import logging
from scheduler_matrix import REFUSALS, SAMPLERS

import atlas_diffusers

sys.path.append(str(Path(__file__).parents[1] / "tests"))

from flow_networks import DEVIATION, MEAN  # noqa: E402
from flow_pipelines import KINDS, Run, build_flow_pipeline, run_flow  # noqa: E402

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
DRAW_NOISE = ("AtlasDDPMScheduler", "AtlasEulerAncestralScheduler")
MISSING = re.compile(r"custom (\w+?)s? |(?:argument|attribute) '(\w+)'")


def swap(name: str, **options):
    """The scheduler of a pipeline becomes one of Diffusers' class ``name``; with options, its shift is told as well."""

    def swapped(config):
        shift = {"flow_shift": config["shift"]} if options and config.get("shift") else {}
        return getattr(diffusers, name).from_config(config, **options, **shift)

    return swapped


EULER = swap("FlowMatchEulerDiscreteScheduler")
PEERS = {
    "FlowMatchEuler": EULER,
    "UniPC": swap("UniPCMultistepScheduler", **FLOW),
    "DPM-Solver++": swap("DPMSolverMultistepScheduler", **FLOW),
    "FlowMatchHeun": swap("FlowMatchHeunDiscreteScheduler"),
}


def run(kind: str, swapped, times: int = 1) -> Run:
    """The pipeline with another scheduler and ``times`` the published number of steps."""
    pipeline = build_flow_pipeline(kind)
    pipeline.scheduler = swapped(pipeline.scheduler.config)
    return run_flow(kind, pipeline, times)


def fails(kind: str, swapped, draws_noise: bool = False) -> str:
    """Why a scheduler does not work in a pipeline, or nothing."""
    try:
        run(kind, swapped)
        fine = run(kind, swapped, times=4)
    except REFUSALS as refusal:
        missing = MISSING.search(str(refusal))
        return f"no `{missing[2] or missing[1] + 's'}`" if missing else f"`{type(refusal).__name__}`"
    if draws_noise:
        right = abs(fine.end.mean() - MEAN) < 0.1 and abs(fine.end.std() - DEVIATION) < 0.2
    else:
        right = fine.error < run(kind, EULER).error / 2
    return "" if right else "wrong"


def ours(kind: str) -> str:
    """Error of the multistep solver, and which of our classes do not work."""
    found = []
    for name, *_ in SAMPLERS.values():
        if failure := fails(kind, getattr(atlas_diffusers, name).from_config, name in DRAW_NOISE):
            found.append(f"{name}: {failure}")
    return "; ".join(found) or f"{run(kind, atlas_diffusers.AtlasMultistepScheduler.from_config).error:.4f}"


def peer(kind: str, name: str) -> str:
    """A peer's error, or why there is none."""
    failure = fails(kind, PEERS[name])
    if failure in ("", "wrong"):
        return f"{failure} {run(kind, PEERS[name]).error:.4f}".strip()
    return failure


def main() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    works = dict.fromkeys(["ours", *PEERS], 0)
    print(f"| flow pipeline | {' | '.join(works)} |\n|---|{'---|' * len(works)}")
    for kind in KINDS:
        cells = {"ours": ours(kind), **{name: peer(kind, name) for name in PEERS}}
        for name, found in cells.items():
            works[name] += found[0].isdigit()
        print(f"| {kind} | {' | '.join(cells.values())} |", flush=True)
    print(f"| works in | {' | '.join(f'{count} of {len(KINDS)}' for count in works.values())} |")


if __name__ == "__main__":
    main()
