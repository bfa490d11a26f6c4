"""From a pipeline or a function to a scheduler with tables."""

import inspect
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from tqdm.auto import tqdm

from ..scheduling_atlas_multistep import AtlasMultistepScheduler
from .cache import Cache
from .calibrator import Calibrator, planned_calls, teach
from .model import FunctionModel, Model
from .pipeline import PipelineModel
from .reports import CalibrationReport, StepReport
from .tables import Calibration, StepTable, calibrations_of
from .teacher import teacher_sigmas, teacher_steps_that_suffice

FEWEST_TRAJECTORIES = 8
PIPELINE_BATCH = 8


@dataclass(frozen=True)
class Settings:
    """How much is spent; see :meth:`AtlasMultistepScheduler.calibrate`."""

    num_inference_steps: tuple[int, ...]
    num_trajectories: int
    teacher_steps: int
    budget: int
    cache: Path | None
    progress: bool

    def __post_init__(self):
        counts = self.num_inference_steps
        enough = self.num_trajectories >= FEWEST_TRAJECTORIES and counts and min(counts) >= 2
        if not enough or self.teacher_steps < 2 * max(counts):
            raise ValueError(
                f"expected num_trajectories of at least {FEWEST_TRAJECTORIES}, step counts of at least 2, and twice as many "
                f"teacher_steps, got {self.num_trajectories}, {list(counts)} and {self.teacher_steps}"
            )


def calibrated_scheduler(
    cls: type[AtlasMultistepScheduler],
    model: Any,
    call: dict[str, Any] | None,
    prompts: list[str] | None,
    guidance_scale: float | None,
    config: dict[str, Any] | None,
    sample_shape: Sequence[int] | None,
    batch_size: int | None,
    generator: torch.Generator | None,
    device: str | torch.device | None,
    settings: Settings,
) -> AtlasMultistepScheduler:
    """:meth:`AtlasMultistepScheduler.calibrate`."""
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    groups: Sequence[tuple[Model, Sequence[int]]]
    seeds = torch.randint(2**62, (settings.num_trajectories,), generator=generator, device=generator.device).tolist()
    if isinstance(model, DiffusionPipeline):
        call = pipeline_call(model, call, prompts, guidance_scale)
        process: dict[str, Any] = model.scheduler.config if config is None else config
        plain = cls.from_config({**process, "calibration": None})
        groups = pipeline_models(model, plain, call, seeds, batch_size or PIPELINE_BATCH, settings.num_inference_steps)
        guidance_scale = guidance_of(model, call)
    elif call is not None or prompts is not None:
        raise ValueError("call and prompts are for a pipeline; a function is called as f(sample, timestep)")
    elif sample_shape is None or config is None:
        raise ValueError("a function as model needs sample_shape and config")
    elif config.get("use_dynamic_shifting"):
        raise ValueError("use_dynamic_shifting=True: a function is called without mu; give config with shift=e^mu in its place")
    else:
        process = config
        plain = cls.from_config({**process, "calibration": None})
        function = FunctionModel(model, plain, sample_shape, seeds, batch_size or len(seeds), device or "cpu")
        groups = [(function, settings.num_inference_steps)]
    of = plain.process_sigma_hats, plain.config.prediction_type, guidance_scale, groups[0][0].shift
    before = tables_before(process, Calibration({}, *of))
    tables, report = calibrate(groups, settings, before)
    scheduler = cls.from_config(plain.config, calibration=Calibration(before | tables, *of).to_config())
    scheduler.calibration_report = report
    return scheduler


def tables_before(config: dict, wanted: Calibration) -> dict:
    """Tables that a configuration has for the same model as far as it says."""
    for found in calibrations_of(config):
        if replace(found, tables={}) == wanted:
            return found.tables
    return {}


def pipeline_call(pipeline: Any, call: dict | None, prompts: list[str] | None, guidance_scale: float | None) -> dict:
    """Arguments of the pipeline's call; where it takes a text and none is given, the empty one."""
    call = dict(call or {})
    if prompts is not None:
        call["prompt"] = list(prompts)
    if guidance_scale is not None:
        call["guidance_scale"] = guidance_scale
    if getattr(pipeline, "text_encoder", None) is not None and not any(key.startswith("prompt") for key in call):
        call["prompt"] = ""
    return call


def guidance_of(pipeline: Any, call: dict) -> float | None:
    """The guidance scale of a call: its own, the pipeline's default, or that of the signature."""
    default = inspect.signature(type(pipeline).__call__).parameters.get("guidance_scale")
    found = call.get("guidance_scale", None if default is None else default.default)
    return pipeline.config.get("default_guidance_scale", 1.0) if found is None else found


def pipeline_models(
    pipeline: Any, scheduler: AtlasMultistepScheduler, call: dict, seeds: list[int], batch_size: int, counts: Sequence[int]
) -> list[tuple[PipelineModel, Sequence[int]]]:
    """One model for all step counts, or one for each where image-to-image starts at a level of its own."""
    first = PipelineModel(pipeline, scheduler, call, seeds, batch_size, counts[0])
    if not first.begin:
        return [(first, counts)]
    others = [PipelineModel(pipeline, scheduler, call, seeds, batch_size, steps) for steps in counts[1:]]
    return [(model, [steps]) for model, steps in zip([first, *others], counts)]


def calibrate(
    groups: Sequence[tuple[Model, Sequence[int]]], settings: Settings, before: dict[tuple[int, int], StepTable]
) -> tuple[dict[tuple[int, int], StepTable], CalibrationReport]:
    """Tables by step count and first step that are better than the plain solver and those ``before``, and what they cost."""
    tables, reports, teacher_calls, budget = {}, {}, 0, settings.budget // len(groups)
    if settings.progress:
        announce(groups, settings, budget)
    for model, counts in groups:
        folder = settings.cache / f"from-{counts[0]}" if settings.cache and model.begin else settings.cache
        cache = None if folder is None else Cache(folder)
        calls, calls_before = [steps - model.begin for steps in counts], model.calls
        plain = {n: model.plain(n) for n in calls}
        teacher_steps = teacher_steps_that_suffice(model, plain[max(calls)], settings.teacher_steps)
        if settings.progress and teacher_steps > settings.teacher_steps:
            tqdm.write(f"the flow is stiff, as strong guidance makes it: the teacher takes {teacher_steps} steps")
        spent = model.calls - calls_before + model.count * teacher_steps  # also where a cache has some of it
        sigmas = teacher_sigmas(model.scheduler.process.ends[1].sigma_hat, model.top, teacher_steps)
        calibrator = Calibrator(model, teach(model, sigmas, cache, settings.progress), plain, cache)
        teacher_calls += model.calls - calls_before - model.count * sum(calls)
        share = max(0, (budget - spent) // model.count // len(calls))
        for steps in tqdm(counts, desc="step counts", disable=not settings.progress):
            table, reports[steps] = calibrator.table(steps - model.begin, share, before.get((steps, model.begin)))
            if reports[steps].kept:
                tables[steps, model.begin] = table
            else:
                warn_not_kept(steps, reports[steps])
    return tables, CalibrationReport(sum(model.calls for model, _ in groups), teacher_calls, reports)


def announce(groups: Sequence[tuple[Model, Sequence[int]]], settings: Settings, budget: int) -> None:
    """Say what a calibration will take."""
    calls = sum(
        planned_calls(budget, model.count, settings.teacher_steps, [steps - model.begin for steps in counts])
        for model, counts in groups
    )
    seconds = groups[0][0].seconds_per_call
    time = "" if seconds is None else f", {seconds:.3g} s each, about {duration(calls * seconds)}"
    tqdm.write(f"about {calls} network calls{time}")


def duration(seconds: float) -> str:
    """A time in the unit that reads best."""
    for size, unit in ((3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} seconds"


def warn_not_kept(steps: int, report: StepReport) -> None:
    warnings.warn(
        f"{steps} steps: on held-out trajectories calibration gives {report.calibrated:.3g}, the plain solver "
        f"{report.uncalibrated:.3g}, which is kept",
        stacklevel=5,
    )
