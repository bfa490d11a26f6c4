"""Calibration of the multistep solver: a teacher's trajectories, nodes placed on them, coefficients fitted on-policy."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from diffusers.utils.torch_utils import randn_tensor
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from ..scheduling_atlas_multistep import AtlasMultistepScheduler
from .fit import distance, fit
from .node_placement import Placement
from .pipeline import pipeline_predictions
from .tables import Calibration, StepTable, process_of
from .teacher import Trajectories, run_teacher, teacher_sigmas

Predict = Callable[[torch.Tensor, torch.Tensor, slice], torch.Tensor]
# weight of inner residuals, ridge: each serves distributions that those before it do not
PLACEMENTS = (
    (0.5, 1e-4), (0.5, 1e-3), (1.0, 1e-4), (0.5, 1e-2), (0.1, 1e-2),
    (1.0, 1e-1), (0.5, 1e-5), (1.0, 1e-3), (0.2, 1e-4), (0.1, 1e-1),
)  # fmt: skip
EVALUATIONS = 58  # network calls a trajectory and step count that the search may take
HELD_OUT, FEWEST = 3, 8
SAME_MODEL = 1e-3  # relative difference of velocities that rounding may leave


@dataclass(frozen=True)
class StepReport:
    """Mean RMS distance of held-out ends from the teacher's, without and with the table; whether the table is kept."""

    uncalibrated: float
    calibrated: float
    kept: bool


@dataclass(frozen=True)
class CalibrationReport:
    """
    What a calibration cost and is expected to give.

    Args:
        network_calls: samples that went through the model, the teacher's included.
        teacher_calls: those of the teacher.
        steps: a report for every step count.
    """

    network_calls: int
    teacher_calls: int
    steps: dict[int, StepReport]


class Model:
    """
    A prediction function as velocities of flattened samples; counts calls.

    Args:
        predict: called as ``f(sample, timestep, rows)`` with ``batch_size`` samples at a time, ``rows`` a slice of all.
        scheduler: converts, and clips, predictions.
        shape: of one sample.
        batch_size: samples at once.
    """

    def __init__(self, predict: Predict, scheduler: AtlasMultistepScheduler, shape: tuple[int, ...], batch_size: int):
        self.predict, self.scheduler, self.shape, self.batch_size = predict, scheduler, shape, batch_size
        self.calls = 0

    def __call__(self, x: torch.Tensor, sigma: float, first_row: int = 0) -> torch.Tensor:
        """v of some samples in a row, (batch, d), at σ̂."""
        level = self.scheduler.process.from_sigma_hat(sigma)
        timestep = torch.tensor(self.scheduler.process.timesteps_of([level])[0]).to(x.device)
        output = self.output(x, timestep, first_row).to(x.dtype)
        return self.scheduler.velocity(output, x, self.scheduler.predict_data(output, x, level), level)

    @torch.no_grad()
    def output(self, x: torch.Tensor, timestep: torch.Tensor, first_row: int = 0) -> torch.Tensor:
        """The model's predictions, (batch, d)."""
        outputs = []
        for start in range(0, len(x), self.batch_size):
            sample = x[start : start + self.batch_size].unflatten(1, self.shape)
            rows = slice(first_row + start, first_row + start + len(sample))
            outputs.append(self.predict(sample, timestep, rows))
            if outputs[-1].shape != sample.shape:
                found = tuple(outputs[-1].shape)
                raise ValueError(f"the model returned shape {found} for samples of shape {tuple(sample.shape)}")
            if not bool(outputs[-1].isfinite().all()):
                raise ValueError(f"the model returned NaN or infinity at timestep {timestep.item():g}")
        self.calls += len(x)
        return torch.cat(outputs).flatten(1)

    def sample(self, x: torch.Tensor, scheduler: AtlasMultistepScheduler) -> torch.Tensor:
        """Where a scheduler takes start noise, (batch, d)."""
        for timestep in scheduler.timesteps:
            x = scheduler.step(self.output(x, timestep), timestep, x).prev_sample
        return x


class Calibrator:
    """
    Tables for several step counts from one teacher.

    Args:
        model: velocities.
        teacher: its trajectories; every third is held out.
        scheduler: the uncalibrated solver to be better than.
    """

    def __init__(self, model: Model, teacher: Trajectories, scheduler: AtlasMultistepScheduler):
        self.model, self.teacher, self.scheduler = model, teacher, scheduler
        self.train = torch.arange(len(teacher.ends), device=teacher.ends.device) % HELD_OUT != HELD_OUT - 1
        self.placement = Placement(teacher.part(self.train))

    def table(self, steps: int) -> tuple[StepTable, StepReport]:
        """The best nodes found by ``EVALUATIONS`` calls a trajectory, with their coefficients, against the plain solver."""
        evaluations, tried = max(EVALUATIONS // steps, 2), {}
        for settings in PLACEMENTS:
            if len(tried) < (2 * evaluations + 2) // 3:
                self._try(self.placement.place(steps, *settings), tried)
        moves = self.placement.moves(steps)
        while len(tried) < evaluations and (move := next(moves, None)):
            best = min(tried, key=lambda nodes: tried[nodes][0])
            self._try(self.placement.moved(best, *move), tried)
        _, held_out, table = min(tried.values(), key=lambda result: result[0])
        self.scheduler.set_timesteps(steps)
        plain = self._errors(self.model.sample(self.teacher.states[0], self.scheduler))[1]
        return table, StepReport(plain, held_out, held_out < plain)

    def _try(self, nodes: list[int], tried: dict[tuple, tuple[float, float, StepTable]]) -> None:
        """Fit these nodes, unless they were tried before."""
        if nodes and tuple(nodes) not in tried:
            table, ends = fit(self.model, self.teacher, nodes, self.train)
            tried[tuple(nodes)] = (*self._errors(ends), table)

    def _errors(self, ends: torch.Tensor) -> tuple[float, float]:
        """Distances from the teacher's ends: over all trajectories and over the held-out ones."""
        held_out = ~self.train
        return distance(ends, self.teacher.ends), distance(ends[held_out], self.teacher.ends[held_out])


def calibrate(
    predict: Predict,
    scheduler: AtlasMultistepScheduler,
    noise: torch.Tensor,
    num_inference_steps: Sequence[int],
    teacher_steps: int,
    batch_size: int,
    guidance_scale: float | None,
    cache: Path | None,
    progress: bool,
) -> tuple[Calibration, CalibrationReport]:
    """See :meth:`AtlasMultistepScheduler.calibrate`; ``predict`` as in :class:`Model`."""
    model = Model(predict, scheduler, tuple(noise.shape[1:]), batch_size)
    sigmas = teacher_sigmas(scheduler.process, teacher_steps)
    teacher = teach(model, noise.flatten(1), sigmas, cache, progress)
    teacher_calls, tables, reports = model.calls, {}, {}
    calibrator = Calibrator(model, teacher, scheduler)
    for steps in tqdm(num_inference_steps, desc="step counts", disable=not progress):
        table, report = calibrator.table(steps)
        reports[steps] = report
        if report.kept:
            tables[steps] = table
        else:
            warnings.warn(
                f"{steps} steps: on held-out trajectories calibration gives {report.calibrated:.3g}, the plain solver "
                f"{report.uncalibrated:.3g}, which is kept",
                stacklevel=3,
            )
    process = process_of(scheduler.process)
    calibration = Calibration(tables, process, scheduler.config.prediction_type, guidance_scale)
    return calibration, CalibrationReport(model.calls, teacher_calls, reports)


def teach(model: Model, noise: torch.Tensor, sigmas: list[float], cache: Path | None, progress: bool) -> Trajectories:
    """The teacher's trajectories from ``noise``, batch by batch; batches that ``cache`` has are read, others written to it."""
    parts, starts = [], range(0, len(noise), model.batch_size)
    with tqdm(total=len(starts) * len(sigmas), desc="teacher", disable=not progress) as bar:
        for start in starts:
            batch = noise[start : start + model.batch_size]
            file = None if cache is None else cache / f"teacher-{start:05}.safetensors"
            if file is not None and file.exists():
                parts.append(read_part(file, batch, sigmas))
                check_model(model, parts[-1], start, file)
                bar.update(len(sigmas))
                continue
            parts.append(run_teacher(partial(model, first_row=start), batch, sigmas, bar.update))
            if file is not None:
                write_part(file, parts[-1])
    states, velocities = (torch.cat([getattr(part, name) for part in parts], 1) for name in ("states", "velocities"))
    return Trajectories(sigmas, states, velocities, torch.cat([part.ends for part in parts]))


def write_part(file: Path, part: Trajectories) -> None:
    """Write trajectories whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: getattr(part, name).cpu().contiguous() for name in ("states", "velocities", "ends")}
    unfinished = file.with_suffix(".part")
    save_file({**tensors, "sigmas": torch.tensor(part.sigmas, dtype=torch.float64)}, unfinished)
    unfinished.rename(file)


def read_part(file: Path, noise: torch.Tensor, sigmas: list[float]) -> Trajectories:
    """``ValueError`` for trajectories from other noise or on another grid."""
    stored = load_file(file)
    if stored["sigmas"].tolist() != sigmas or not torch.equal(stored["states"][0], noise.cpu()):
        raise ValueError(f"{file} belongs to another calibration: other noise, betas, or number of trajectories or steps")
    return Trajectories(sigmas, *(stored[name].to(noise.device) for name in ("states", "velocities", "ends")))


def check_model(model: Model, part: Trajectories, first_row: int, file: Path) -> None:
    """``ValueError`` unless the model, as it is called now, gives the stored velocity halfway, at one call a trajectory."""
    middle = len(part.sigmas) // 2
    stored = part.velocities[middle]
    error = distance(model(part.states[middle], part.sigmas[middle], first_row), stored)
    if not error <= SAME_MODEL * stored.square().mean().sqrt().item():
        raise ValueError(f"{file} belongs to another calibration: the model, its prompts or its guidance scale differ")


def run_calibration(
    cls, model, counts, config, sample_shape, num_trajectories, teacher_steps, batch_size, prompts, guidance_scale,
    generator, device, cache, progress,
) -> AtlasMultistepScheduler:  # fmt: skip
    """:meth:`AtlasMultistepScheduler.calibrate`."""
    if num_trajectories < FEWEST or not counts or min(counts) < 2 or teacher_steps < 2 * max(counts):
        raise ValueError(
            f"expected num_trajectories of at least {FEWEST}, step counts of at least 2, and twice as many teacher_steps, got "
            f"{num_trajectories}, {list(counts)} and {teacher_steps}"
        )
    if callable(model) and not hasattr(model, "unet"):
        if sample_shape is None or config is None:
            raise ValueError("a function as model needs sample_shape and config")
        predict, device = (lambda sample, timestep, rows: model(sample, timestep)), device or "cpu"
    else:
        if guidance_scale is None:
            guidance_scale = model.config.get("default_guidance_scale", 1.0)
        predict, sample_shape, home = pipeline_predictions(model, prompts, guidance_scale, num_trajectories, sample_shape)
        device = device or home
        config = model.scheduler.config if config is None else config
    plain = cls.from_config({**config, "calibration": None})
    noise = randn_tensor((num_trajectories, *sample_shape), generator=generator, device=torch.device(device))
    calibration, report = calibrate(
        predict, plain, noise, counts, teacher_steps, batch_size or num_trajectories, guidance_scale,
        None if cache is None else Path(cache), progress,
    )  # fmt: skip
    scheduler = cls.from_config(plain.config, calibration=calibration.to_config())
    scheduler.calibration_report = report
    return scheduler
