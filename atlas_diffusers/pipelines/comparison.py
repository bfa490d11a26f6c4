"""Samplers side by side on one pipeline."""

import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from .watching import watched


class Compared(NamedTuple):
    """
    One sampler at one number of steps.

    Args:
        sampler, steps: which.
        network_calls: of the sampler; guidance doubles the batch, not the calls.
        seconds: of the call.
        distance: RMS distance of the pictures, on [0, 1], to those of the first sampler at the most steps.
        pictures: (n, channels, height, width) in [-1, 1].
    """

    sampler: str
    steps: int
    network_calls: int
    seconds: float
    distance: float
    pictures: torch.Tensor


def compare_samplers(
    pipeline: Any, schedulers: dict[str, Any], steps: list[int], seeds: list[int], call: dict[str, Any]
) -> Iterator[Compared]:
    """
    The same call with every scheduler at every number of steps, from the same noise; the finest of the first comes first.

    Args:
        pipeline: any that makes pictures; not changed.
        schedulers: by the name to show.
        steps: numbers of steps.
        seeds: of the noise, one a picture.
        call: further arguments of the pipeline's call.

    Raises:
        ValueError: without schedulers or steps.
    """
    if not schedulers or not steps or min(steps) < 1:
        raise ValueError(f"expected samplers and numbers of steps from 1, got {list(schedulers)} and {steps}")
    finest = (next(iter(schedulers)), max(steps))
    cells = [(name, count) for name in schedulers for count in sorted(set(steps))]
    truth = None
    for name, count in [finest, *(cell for cell in cells if cell != finest)]:
        calls: list[int] = []
        run = watched(pipeline, schedulers[name], lambda data, calls=calls: calls.append(len(data)))
        begun = time.perf_counter()
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        images = run(**call, num_inference_steps=count, generator=generators, output_type="pt").images
        seconds, pictures = time.perf_counter() - begun, images.float().cpu()
        truth = pictures if truth is None else truth
        distance = (pictures - truth).square().mean().sqrt().item()
        yield Compared(name, count, len(calls), seconds, distance, 2 * pictures - 1)
