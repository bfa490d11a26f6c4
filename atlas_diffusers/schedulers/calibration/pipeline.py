"""A pipeline as a model: its own call is run, with a scheduler in place of its own whose steps are answered from outside."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from time import perf_counter
from typing import Any

import torch
from PIL import Image

from ...schedules.time_grid import TimeGrid
from ..angle import radius
from ..scheduling_atlas_multistep import AtlasMultistepScheduler
from .model import Model, Step, check_finite
from .paused_call import PausedCall
from .recorder import CallsDiffer, Observed, Recorder

BATCH_ARGUMENTS = ("num_images_per_prompt", "num_videos_per_prompt", "batch_size")
OWN_ARGUMENTS = (
    "latents", "generator", "num_inference_steps", "timesteps", "sigmas", "output_type", "return_dict", *BATCH_ARGUMENTS
)  # fmt: skip
PER_SAMPLE = ("prompt", "negative_prompt", "image", "mask_image", "control_image", "video", "class_labels")
CONDITIONS = ("prompt", "embeds", "class_labels")
FUNCTION_INSTEAD = "calibrate a function f(sample, timestep) of its network instead"


class Rehearsed(BaseException):
    """Ends a call at its first step."""


class PipelineModel(Model):
    """
    A pipeline, called as it will be used: every batch is a call of its own, paused at each step until all batches are there.

    Args:
        pipeline: any with a ``scheduler`` and a call that takes ``num_inference_steps``.
        call: arguments of its call; lists of prompts, labels and pictures are taken in turn, one a trajectory.
        seeds: of the start noise, one a trajectory.
        steps: ``num_inference_steps`` of the calls that are calibrated, which tell where image-to-image starts.

    Raises:
        ValueError: for arguments that a calibration sets itself, and a pipeline whose call cannot be driven.
    """

    def __init__(
        self, pipeline: Any, scheduler: AtlasMultistepScheduler, call: dict, seeds: list[int], batch_size: int, steps: int
    ):
        super().__init__(scheduler, len(seeds), batch_size)
        self.pipeline, self.call, self.seeds = pipeline, call, seeds
        self.known = inspect.signature(type(pipeline).__call__).parameters
        self._check_call()
        self.recorder, self._encoded, self._asked = Recorder.from_config(scheduler.config), {}, {}
        first, again = self._rehearse(steps), self._rehearse(steps)
        if not torch.equal(first, again):
            raise ValueError(f"{self._name} starts from other noise when it is called again; {FUNCTION_INSTEAD}")
        self.shape, self.device = tuple(first.shape[1:]), first.device
        self.begin, self.steps = self.recorder.begin, steps
        self.shift = None if scheduler.process.shift is None else self.recorder.even.shift
        if steps - self.begin < 2:
            raise ValueError(f"the call leaves {steps - self.begin} of {steps} steps; tables need at least 2")
        self.scales_noise = self.recorder.scaled and not self.begin
        self.top = self.recorder.even.source[self.begin].sigma_hat if self.begin else scheduler.largest_sigma_hat

    @property
    def _name(self) -> str:
        return type(self.pipeline).__name__

    def _check_call(self) -> None:
        if "num_inference_steps" not in self.known or not hasattr(self.pipeline, "scheduler"):
            raise ValueError(f"{self._name} has no scheduler, or takes no num_inference_steps; {FUNCTION_INSTEAD}")
        if "generator" not in self.known:
            raise ValueError(f"{self._name} takes no generator, so its start noise varies; {FUNCTION_INSTEAD}")
        if taken := [key for key in self.call if key in OWN_ARGUMENTS]:
            raise ValueError(f"call has {taken}, which a calibration sets itself")
        if unknown := [key for key in self.call if key not in self.known]:
            raise ValueError(f"call has {unknown}, which {self._name} does not take")

    # ------------------------------------------------------------------ one call

    @torch.no_grad()
    def _run(self, rows: slice, steps: int) -> None:
        """Call the pipeline for some trajectories."""
        indices = range(rows.start, rows.stop)
        arguments = {key: _of_rows(key, value, indices) for key, value in self.call.items()}
        if not any(part in key for key in arguments for part in CONDITIONS):
            arguments[next(key for key in BATCH_ARGUMENTS if key in self.known)] = len(indices)
        arguments["generator"] = [torch.Generator().manual_seed(self.seeds[row]) for row in indices]
        if "output_type" in self.known:
            arguments["output_type"] = "latent"
        self.pipeline(**arguments, num_inference_steps=steps)

    @contextmanager
    def _recording(self, sigmas: Sequence[float], start: float) -> Iterator[None]:
        """The recorder in place of the scheduler."""
        self.recorder.given, self.recorder.start = list(sigmas), start
        with self._with(self.recorder):
            yield

    @contextmanager
    def _with(self, other: AtlasMultistepScheduler) -> Iterator[None]:
        """Another scheduler, texts encoded once, and no progress bars."""
        pipeline = self.pipeline
        scheduler, bars = pipeline.scheduler, getattr(pipeline, "_progress_bar_config", None)
        pipeline.scheduler = other
        pipeline._progress_bar_config = {**(bars or {}), "disable": True}
        if hasattr(pipeline, "encode_prompt"):
            pipeline.encode_prompt = self._encode
        try:
            yield
        finally:
            pipeline.scheduler = scheduler
            pipeline.__dict__.pop("encode_prompt", None)
            if bars is None:
                del pipeline._progress_bar_config
            else:
                pipeline._progress_bar_config = bars

    def _encode(self, *args: Any, **kwargs: Any):
        """``pipeline.encode_prompt``, once for the same texts."""
        if any(isinstance(value, torch.Tensor) for value in (*args, *kwargs.values())):
            return type(self.pipeline).encode_prompt(self.pipeline, *args, **kwargs)
        key = repr((args, kwargs))
        if key not in self._encoded:
            self._encoded[key] = type(self.pipeline).encode_prompt(self.pipeline, *args, **kwargs)
        return self._encoded[key]

    # ------------------------------------------------------------------ rehearsals

    def _rehearse(self, steps: int) -> torch.Tensor:
        """The first sample of the first batch, at one network call each; measures them."""
        rows, samples, started = self.parts()[0], [], perf_counter()

        def stop(output: torch.Tensor, sample: torch.Tensor):
            samples.append(sample)
            raise Rehearsed

        self.recorder.answer, self.recorder.allows = stop, lambda calls: True
        with self._recording([self.scheduler.largest_sigma_hat], 1.0):
            try:
                self._run(rows, steps)
            except Rehearsed:
                pass
        if not samples or len(samples[0]) != rows.stop:
            shapes = [tuple(sample.shape) for sample in samples]
            raise ValueError(f"{self._name} steps samples of shapes {shapes} in a call for {rows.stop}; {FUNCTION_INSTEAD}")
        self.calls += rows.stop
        self.seconds_per_call = (perf_counter() - started) / rows.stop
        return samples[0]

    def _steps_for(self, calls: int) -> int:
        """``num_inference_steps`` with which the pipeline makes so many network calls."""
        if not self.begin:
            return calls
        if calls not in self._asked:
            steps = round(calls * self.steps / (self.steps - self.begin))
            while (found := self._calls_of(steps)) != calls:
                steps += 1 if found < calls else -1
            self._asked[calls] = steps
        return self._asked[calls]

    def _calls_of(self, steps: int) -> int:
        self.recorder.allows = lambda calls: False
        with self._recording([self.scheduler.largest_sigma_hat], 1.0):
            try:
                self._run(self.parts()[0], steps)
            except CallsDiffer as differ:
                return differ.calls
        raise ValueError(f"{self._name} does not say where image-to-image starts; {FUNCTION_INSTEAD}")

    # ------------------------------------------------------------------ all trajectories

    def march(self, sigmas: Sequence[float], step: Step, start: float = 1.0, rows: slice = slice(None)) -> torch.Tensor:
        parts, steps = self.parts(rows), self._steps_for(len(sigmas))
        self.recorder.allows = lambda calls: calls == len(sigmas)
        with self._recording(sigmas, start):
            calls = [PausedCall(partial(self._paused_run, part, steps)) for part in parts]
            try:
                return self._drive(calls, self.scheduler.nodes(sigmas), step)
            finally:
                for call in calls:
                    call.abandon()

    def plain(self, calls: int) -> torch.Tensor:
        solver, ends = Observed.from_config(self.scheduler.config), []
        with self._with(solver):
            for rows in self.parts():
                self._run(rows, calls + self.begin)
                ends.append(_exact(solver.end).flatten(1))
        self.calls += solver.calls
        return torch.cat(ends)

    def _paused_run(self, rows: slice, steps: int, call: PausedCall) -> None:
        self._run(rows, steps)

    def _drive(self, calls: list[PausedCall], nodes: TimeGrid, step: Step) -> torch.Tensor:
        """All calls from step to step, together."""
        sent, x, levels = [None] * len(calls), torch.zeros(()), nodes.source
        for n, (level, timestep) in enumerate(zip(levels, nodes.timesteps)):
            r, seen, velocities = radius(level, 1.0), [], []
            for call, sample in zip(calls, sent):
                output, found = self._resume(call, sample, n)
                output, x_here = (_exact(tensor) for tensor in (output, found))
                # states stay exact where the pipeline rounds them; what it does to samples between steps, it does to them
                seen.append((x_here if sample is None else x_here - _exact(sample)).flatten(1) / r)
                velocities.append(self.velocity(output, x_here, level))
            x, v = x + torch.cat(seen), torch.cat(velocities)
            check_finite(v, timestep)
            x = step(n, x, v)
            r = radius(levels[n + 1], 1.0) if n + 1 < len(levels) else 1.0
            batches = (x * r).unflatten(1, self.shape).to(found.dtype)
            sent = list(batches.split(self.batch_size))
        for call, sample in zip(calls, sent):
            self._resume(call, sample, len(levels), last=True)
        return x

    def _resume(self, call: PausedCall, sample: torch.Tensor | None, n: int, last: bool = False):
        """A call's next output and sample."""
        self.recorder.answer = lambda output, sample: call.pause((output, sample))
        asked = call.resume(sample)
        if (asked is None) != last:
            raise ValueError(f"{self._name} made {'more' if last else 'only'} {n} network calls; {FUNCTION_INSTEAD}")
        return asked


def _exact(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _of_rows(name: str, value: object, rows: Sequence[int]):
    """What an argument says about some trajectories: lists are taken in turn, one text or picture is that of all."""
    name = name.rstrip("_234")
    one_text = isinstance(value, str) and name in ("prompt", "negative_prompt")
    if one_text or (isinstance(value, Image.Image) and name in PER_SAMPLE):
        return [value] * len(rows)
    per_sample = name in PER_SAMPLE or "embeds" in name or "attention_mask" in name
    if not per_sample or not isinstance(value, (list, torch.Tensor)):
        return value
    chosen = [value[row % len(value)] for row in rows]
    return torch.stack(chosen) if isinstance(value, torch.Tensor) else chosen
