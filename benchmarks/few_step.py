"""
How close few network calls come to the exact probability flow: ``python benchmarks/few_step.py [--peers peers.json]``.

Data are mixtures of Gaussians, of which the denoiser is known exactly: a ring of eight, a checkerboard, digits (64-D), digits
guided towards a class at scale 3, and patches of photographs (192-D and 768-D). Every sampler starts from the same noise at
t = 999. The reference is the end of the probability flow at σ = 0 from there, by Runge-Kutta in float64, for samplers that
stop at the least σ of the table as well. The error is the root mean square over dimensions, averaged over samples.

Peers are the deterministic schedulers of Diffusers with their options, at exactly as many network calls, counted. The best of
them is chosen anew, with hindsight, for each problem, table of betas and number of calls. "2M / UniPC" is the least error of
DPM-Solver++(2M) and UniPC with their defaults, with linspace and with trailing timesteps. Peers that are in variance-exploding
coordinates start from the exact x_T if they start at t = 999, and otherwise from noise times their ``init_noise_sigma``, as in
pipelines. iPNDM is given the levels of other schedulers, and EDM's schedulers the denoiser that they expect. Ratios are errors
over errors of peers: below 1 ours is closer. Ours is measured as it is constructed, and calibrated, once for all numbers of
calls, on noise and labels of other seeds. With ``--learned`` solvers that are trained by back-propagation are peers as well, at
as many network calls as a calibration of one number of calls has (``--learned 100``: a hundred times as many).
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import inspect
import itertools
import json
import math
import statistics
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

import diffusers
import torch
from diffusers.schedulers import AysSchedules
from few_step_problems import BETAS, CALIBRATION_LABEL_SEED, PROBLEMS, Network, Problem, reference

HEADER = (
    "problem | betas | calls | best peer | which | 2M / UniPC | ours | calibrated | "
    "ours / best | calibrated / best | ours / (2M, UniPC) | s"
)
DEFAULTS = ("DPMSolverMultistep linspace", "DPMSolverMultistep trailing", "UniPCMultistep linspace", "UniPCMultistep trailing")
REFUSALS = (ValueError, NotImplementedError, IndexError, ZeroDivisionError, torch.linalg.LinAlgError)

LINSPACE, TRAILING, LEADING = SPACED = (
    {"timestep_spacing": "linspace"},
    {"timestep_spacing": "trailing"},
    {"timestep_spacing": "leading", "steps_offset": 1},
)
CURVED = ({"use_karras_sigmas": True}, {"use_exponential_sigmas": True}, {"use_beta_sigmas": True})
TO_MINIMUM = {"final_sigmas_type": "sigma_min"}
FULL_ORDER = {"lower_order_final": False}


# ---- peers --------------------------------------------------------------------------------------------------------------


def crossed(*axes) -> list[dict]:
    """The union of one dict from each axis, in all ways."""
    return [{key: value for part in parts for key, value in part.items()} for parts in itertools.product(*axes)]


def each(name: str, *values) -> list[dict]:
    return [{name: value} for value in values]


@dataclass(frozen=True)
class Peer:
    """A scheduler, options that change its steps, options or a published grid that change its timesteps, arguments of steps."""

    scheduler: str
    method: dict = field(default_factory=dict)
    schedule: dict = field(default_factory=dict)
    grid: str = ""
    step: dict = field(default_factory=dict)

    @property
    def label(self) -> str:
        shown = [self.scheduler.removesuffix("Scheduler")]
        ordinary = inspect.signature(getattr(diffusers, self.scheduler)).parameters
        for key, value in (self.schedule | self.method | self.step).items():
            if key == "timestep_spacing":
                shown.append(value)
            elif not callable(value) and (key not in ordinary or value != ordinary[key].default):
                short = key.removeprefix("use_").removesuffix("_sigmas").removesuffix("_type")
                value = "all" if isinstance(value, list) and len(value) > 1 else value
                shown.append(short if value is True else f"{short}={value}")
        return " ".join([*shown, f"AYS {self.grid}"] if self.grid else shown)

    def build(self, problem: Problem):
        kind = getattr(diffusers, self.scheduler)
        if self.scheduler.startswith("EDM"):
            return kind(sigma_min=problem.smallest, sigma_max=problem.largest, **self.method, **self.schedule)
        if self.scheduler == "IPNDMScheduler":
            return kind()
        return kind(**problem.process, **self.method, **self.schedule)

    def prepare(self, problem: Problem, calls: int):
        """The scheduler with its timesteps set, or None if it cannot make that many calls."""
        scheduler = self.build(problem)
        if self.grid:
            scheduler.set_timesteps(**{self.grid.removeprefix("XL").lower(): AysSchedules[f"StableDiffusion{self.grid}"]})
            return scheduler if len(scheduler.timesteps) == calls else None
        for steps in (calls, calls - 1, (calls + 1) // 2):
            scheduler.set_timesteps(steps)
            if len(scheduler.timesteps) == calls:
                break
        else:
            return None
        if self.scheduler == "IPNDMScheduler":
            levels = diffusers.DPMSolverMultistepScheduler(**problem.process, **self.schedule)
            levels.set_timesteps(calls)
            scheduler = type(scheduler)(trained_betas=(levels.sigmas / (1 + levels.sigmas**2).sqrt()).tolist())
            scheduler.set_timesteps(calls)
        return scheduler


def dpm_multistep() -> list[Peer]:
    second = [{}, {"solver_type": "heun"}]
    ends = [TO_MINIMUM, TO_MINIMUM | FULL_ORDER]
    third = [*ends, TO_MINIMUM | FULL_ORDER | {"euler_at_final": True}]
    data = crossed(second, [{}, *ends]) + crossed([{"solver_order": 3}], [{}, FULL_ORDER, *third])
    noise = [{"algorithm_type": "dpmsolver"}]
    noise = crossed(noise, second, ends) + crossed(noise, [{"solver_order": 3}], third)
    schedules = (*SPACED, *CURVED, {"use_lu_lambdas": True}, *crossed(SPACED[:2], [{"lambda_min_clipped": -5.1}]))
    peers = [Peer("DPMSolverMultistepScheduler", method, schedule) for method in data + noise for schedule in schedules]
    grids = ("Timesteps", "XLTimesteps")
    return peers + [Peer("DPMSolverMultistepScheduler", method, {}, grid) for method in data + noise for grid in grids]


def dpm_singlestep() -> list[Peer]:
    ends = [FULL_ORDER, {"lower_order_final": True}]
    orders = [{}, {"solver_type": "heun"}, {"solver_order": 3}]
    methods = crossed(orders, ends, [{}, TO_MINIMUM])
    methods += crossed(orders, ends, [TO_MINIMUM | {"algorithm_type": "dpmsolver"}])
    schedules = ({}, *CURVED, {"lambda_min_clipped": -5.1})
    peers = [Peer("DPMSolverSinglestepScheduler", method, schedule) for method in methods for schedule in schedules]
    return peers + [Peer("DPMSolverSinglestepScheduler", method, {}, "Timesteps") for method in methods]


def unipc() -> list[Peer]:
    correctors = each("disable_corrector", [], [0], list(range(10)))
    basic = crossed([{}, {"solver_type": "bh1"}], [{}, {"solver_order": 3}], correctors)
    ends = [{}, TO_MINIMUM, TO_MINIMUM | FULL_ORDER]
    methods = crossed(basic, ends) + crossed(basic, [{"predict_x0": False}], ends[1:])
    return [Peer("UniPCMultistepScheduler", method, schedule) for method in methods for schedule in (*SPACED, *CURVED)]


def multistep() -> list[Peer]:
    orders = each("solver_order", 1, 2, 3)
    deis = crossed(orders, [{}, FULL_ORDER])
    exact = crossed(each("predictor_order", 2, 3), each("corrector_order", 1, 2, 3), [{}, FULL_ORDER], [{"tau_func": no_noise}])
    peers = [Peer("DEISMultistepScheduler", method, schedule) for method in deis for schedule in (*SPACED, *CURVED)]
    peers += [Peer("SASolverScheduler", method, schedule) for method in exact for schedule in (*SPACED, *CURVED)]
    levels = (*SPACED, *CURVED, {"use_lu_lambdas": True})
    return peers + [Peer("IPNDMScheduler", {}, schedule) for schedule in crossed(levels, [{}, TO_MINIMUM])]


def no_noise(t) -> float:
    return 0.0


def first_order_and_exploding() -> list[Peer]:
    grids = crossed(SPACED, [{}, *CURVED])
    ddim = crossed([{"clip_sample": False}], each("set_alpha_to_one", True, False))
    pndm = crossed([{"skip_prk_steps": True}], each("set_alpha_to_one", True, False))
    peers = [Peer("DDIMScheduler", method, schedule) for method in ddim for schedule in SPACED]
    peers += [Peer("PNDMScheduler", method, schedule) for method in pndm for schedule in SPACED]
    peers += [Peer("EulerDiscreteScheduler", end, schedule) for end in ({}, TO_MINIMUM) for schedule in grids]
    published = ("Timesteps", "XLTimesteps", "Sigmas", "XLSigmas")
    peers += [Peer("EulerDiscreteScheduler", {}, {}, grid) for grid in published]
    peers.append(Peer("EulerDiscreteScheduler", {}, {"interpolation_type": "log_linear"}))
    peers += [Peer(name, {}, schedule) for name in ("HeunDiscreteScheduler", "KDPM2DiscreteScheduler") for schedule in grids]
    orders = each("order", 2, 3, 4)
    return peers + [Peer("LMSDiscreteScheduler", {}, schedule, "", order) for order in orders for schedule in grids]


def edm() -> list[Peer]:
    curves = each("sigma_schedule", "karras", "exponential")
    ends = [{}, TO_MINIMUM, TO_MINIMUM | FULL_ORDER]
    methods = crossed([{}, {"solver_type": "heun"}, {"solver_order": 3}], ends)
    peers = [Peer("EDMDPMSolverMultistepScheduler", method, curve) for method in methods for curve in curves]
    return peers + [Peer("EDMEulerScheduler", end, curve) for end in ends[:2] for curve in curves]


def all_peers() -> list[Peer]:
    groups = (dpm_multistep, unipc, dpm_singlestep, multistep, first_order_and_exploding, edm)
    return [peer for group in groups for peer in group()]


# ---- sampling -----------------------------------------------------------------------------------------------------------


class EDMNetwork:
    """EDM's preconditioned network, of inputs ``y / sqrt(s² + d²)`` at times ``log(s) / 4``."""

    def __init__(self, network: Network, deviation: float):
        self.network, self.deviation = network, deviation

    def __call__(self, x: torch.Tensor, t) -> torch.Tensor:
        s, variance = math.exp(4 * float(t)), self.deviation**2
        total = s * s + variance
        y = x * total**0.5
        data = y - s * self.network.at(y / (1 + s * s) ** 0.5, s)
        return (data - variance / total * y) * (total / variance) ** 0.5 / s


class VelocityNetwork:
    """``α ε − σ x_0`` at times ``2/π arctan(σ/α)``, as iPNDM expects."""

    def __init__(self, network: Network):
        self.network = network

    def __call__(self, x: torch.Tensor, t) -> torch.Tensor:
        angle = float(t) * math.pi / 2
        alpha, sigma = math.cos(angle), math.sin(angle)
        return (self.network.at(x, sigma / alpha) - sigma * x) / alpha


def first_sample(scheduler, problem: Problem, noise: torch.Tensor) -> torch.Tensor:
    scale = float(getattr(scheduler, "init_noise_sigma", 1.0))
    if scale == 1:
        return noise
    first = float(scheduler.sigmas[0])
    at_the_end = abs(first / problem.largest - 1) < 1e-3
    return noise * (math.hypot(problem.largest, 1) if at_the_end else scale)


def sample(scheduler, network, x: torch.Tensor, **step) -> torch.Tensor:
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    for t in scheduler.timesteps:
        x = scheduler.step(network(scheduler.scale_model_input(x, t), t), t, x, **step).prev_sample
    return x


def error(x: torch.Tensor, truth: torch.Tensor) -> float:
    return float((x.double() - truth).square().mean(1).sqrt().mean())


def run_peer(peer: Peer, scheduler, problem: Problem, noise: torch.Tensor):
    """The samples and the network calls that they took."""
    network = called = Network(problem)
    if peer.scheduler.startswith("EDM"):
        called = EDMNetwork(network, scheduler.config.sigma_data)
    elif peer.scheduler == "IPNDMScheduler":
        called = VelocityNetwork(network)
    return sample(scheduler, called, first_sample(scheduler, problem, noise), **peer.step), network.calls


def compare_peers(problem: Problem, noise: torch.Tensor, truth: torch.Tensor, calls: int) -> dict:
    """Errors by label, and how many peers were left out and why. Those that come to the same steps are run once."""
    errors, seen = {}, set()
    left = dict.fromkeys(("refused", "other numbers of calls", "the same as others", "not finite"), 0)
    for peer in all_peers():
        try:
            scheduler = peer.prepare(problem, calls)
            if scheduler is None:
                left["other numbers of calls"] += 1
                continue
            levels = getattr(scheduler, "betas" if peer.scheduler == "IPNDMScheduler" else "sigmas", torch.empty(0))
            key = (peer.scheduler, repr((peer.method, peer.step)), *scheduler.timesteps.tolist(), *levels.tolist())
            if key in seen:
                left["the same as others"] += 1
                continue
            seen.add(key)
            x, made = run_peer(peer, scheduler, problem, noise)
        except REFUSALS:
            left["refused"] += 1
            continue
        if made != calls:
            left["other numbers of calls"] += 1
        elif x.isfinite().all():
            errors[peer.label] = error(x, truth)
        else:
            left["not finite"] += 1
    return {"errors": errors, "left": left}


# ---- ours ---------------------------------------------------------------------------------------------------------------


class CalibrationNetwork(Network):
    """The network with labels that are not those of the test."""

    def __init__(self, name: str, betas: str, folder: Path | None):
        problem = Problem(name, betas, folder)
        problem.labels = problem.draw_labels(CALIBRATION_LABEL_SEED)
        super().__init__(problem)


def calibrated_scheduler(problem: Problem, seed: int, arguments):
    """The scheduler, and a line on what it cost."""
    from atlas_diffusers import AtlasMultistepScheduler

    start = perf_counter()
    network = CalibrationNetwork(problem.name, problem.betas, arguments.cache)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        scheduler = AtlasMultistepScheduler.calibrate(
            network,
            num_inference_steps=tuple(arguments.calls),
            num_trajectories=arguments.trajectories,
            teacher_steps=arguments.teacher_steps,
            budget=arguments.budget,
            sample_shape=(problem.size,),
            config=dict(problem.process),
            generator=torch.Generator().manual_seed(seed),
            progress=False,
        )
    reported, seconds = scheduler.calibration_report.network_calls, perf_counter() - start
    notes = [f"{reported} network calls reported, in {network.calls} batches, {seconds:.0f} s", *map(warning_text, caught)]
    return scheduler, f"{problem.name}, {problem.betas}, seed {seed}: {'; '.join(notes)}"


def warning_text(warning) -> str:
    return str(warning.message)


def our_error(scheduler, problem: Problem, noise: torch.Tensor, truth: torch.Tensor, calls: int) -> float:
    network = Network(problem)
    scheduler.set_timesteps(calls)
    x = sample(scheduler, network, noise * scheduler.init_noise_sigma)
    if network.calls != calls:
        raise SystemExit(f"ours took {network.calls} network calls for {calls}")
    return error(x, truth)


def uncalibrated_scheduler(problem: Problem):
    from atlas_diffusers import AtlasMultistepScheduler

    return AtlasMultistepScheduler(**problem.process)


def teacher_of(problem: Problem, arguments):
    """Training labels, start noise and ends of a calibration's teacher; what its trajectories cost."""
    from atlas_diffusers import AtlasMultistepScheduler
    from atlas_diffusers.schedulers.calibration.model import FunctionModel
    from atlas_diffusers.schedulers.calibration.teacher import run_teacher, teacher_sigmas

    network = CalibrationNetwork(problem.name, problem.betas, arguments.cache)
    scheduler = AtlasMultistepScheduler(**problem.process)
    count = arguments.trajectories
    model = FunctionModel(network, scheduler, (problem.size,), range(count), count, "cpu")
    grid = teacher_sigmas(scheduler.process.ends[1].sigma_hat, model.top, arguments.teacher_steps)
    teacher = run_teacher(model, grid)
    return network.problem, model.noise.double(), teacher.ends.double(), count * len(grid)


def learned_errors(problem: Problem, teacher, noise, truth, calls: int, arguments) -> dict[str, float]:
    """Errors of solvers trained at as many network calls as a calibration of one step count has."""
    from few_step_learned import KINDS, learned_error

    training, start, ends, cost = teacher
    scheduler = uncalibrated_scheduler(problem)
    scheduler.set_timesteps(calls)
    sigmas = [level.sigma_hat for level in scheduler.levels]
    share = int(arguments.learned * (arguments.budget - cost) / len(arguments.calls))
    return {kind: learned_error(kind, problem, training, sigmas, start, ends, noise, truth, share) for kind in KINDS}


# ---- the table ----------------------------------------------------------------------------------------------------------


class PeersFile:
    """Peers' errors by cell, in a JSON file if there is a path."""

    def __init__(self, path: Path | None):
        self.path = path
        self.cells = json.loads(path.read_text()) if path is not None and path.exists() else {}

    def cell(self, key: str, compute) -> dict:
        if key not in self.cells:
            self.cells[key] = compute()
            if self.path is not None:
                fresh = self.path.with_suffix(".partial")
                fresh.write_text(json.dumps(self.cells, indent=1))
                fresh.replace(self.path)
        return self.cells[key]


def row(problem: Problem, calls: int, peers: dict, ours: list[float], seconds: float) -> list[float]:
    """Prints the line of a cell and returns its ratios."""
    best = min(peers, key=peers.get)
    ordinary = min(peers[label] for label in DEFAULTS if label in peers)
    ratios = [own / peers[best] for own in ours] + [own / ordinary for own in ours[:1]]
    numbers = [f"{value:.4f}" for value in ours] + [f"{value:.3f}" for value in ratios] or ["", "", "", "", ""]
    cells = [problem.name, problem.betas, str(calls), f"{peers[best]:.4f}", best, f"{ordinary:.4f}", *numbers, f"{seconds:.0f}"]
    print(f"| {' | '.join(cells)} |", flush=True)
    return ratios


def geometric_mean(ratios) -> float:
    return math.exp(statistics.fmean(map(math.log, ratios)))


def summarise(rows: dict[tuple[str, int], list[list[float]]]) -> None:
    """Geometric means over betas for each problem and number of calls, and over everything."""
    titles = ("ours / best peer", "calibrated / best peer", "ours / (2M, UniPC)")
    for (name, calls), ratios in rows.items():
        means = (f"{title} {geometric_mean(column):.3f}" for title, column in zip(titles, zip(*ratios)))
        print(f"{name}, {calls} calls: {', '.join(means)}")
    for title, ratios in zip(titles, zip(*(row for group in rows.values() for row in group))):
        print(f"{title:24s} geometric mean {geometric_mean(ratios):.3f}   greatest {max(ratios):.3f}   of {len(ratios)} cells")


def run(arguments) -> None:
    kept, rows, notes, counts, left, spread, learned = PeersFile(arguments.peers), {}, [], [], {}, [], []
    print(f"| {HEADER} |\n{'|---' * (HEADER.count('|') + 1)}|")
    for name, betas in itertools.product(arguments.problems, arguments.betas):
        problem = Problem(name, betas, arguments.cache)
        count = arguments.count or (128 if name.startswith("patches") else 256)
        noise = problem.noise(count)
        truth = reference(problem, noise, arguments.reference_steps, arguments.cache)
        ours = []
        if not arguments.peers_only:
            found = [calibrated_scheduler(problem, seed, arguments) for seed in arguments.seeds]
            ours, notes = [scheduler for scheduler, _ in found], [*notes, *(note for _, note in found)]
        teacher = teacher_of(problem, arguments) if arguments.learned else None
        for calls in arguments.calls:
            start = perf_counter()
            key = f"{name}, {betas}, {calls} calls, {count} samples, {arguments.reference_steps} steps"
            found = kept.cell(key, lambda: compare_peers(problem, noise, truth, calls))  # noqa: B023
            errors = [our_error(scheduler, problem, noise, truth, calls) for scheduler in ours]
            if ours:
                spread.append(max(errors) / geometric_mean(errors))
                errors = [our_error(uncalibrated_scheduler(problem), problem, noise, truth, calls), geometric_mean(errors)]
            ratios = row(problem, calls, found["errors"], errors, perf_counter() - start)
            rows.setdefault((name, calls), []).append(ratios)
            if teacher is not None:
                trained = learned_errors(problem, teacher, noise, truth, calls, arguments)
                ratio = errors[1] / min(trained.values())
                learned.append(ratio)
                notes.append(f"{name}, {betas}, {calls} calls, learned: {trained}, calibrated / best of them {ratio:.3f}")
            counts.append(len(found["errors"]))
            left = {reason: max(number, left.get(reason, 0)) for reason, number in found["left"].items()}
    print(f"\npeers a cell: {min(counts)} to {max(counts)} of {len(all_peers())} configurations; left out at most:", end=" ")
    print(", ".join(f"{number} {reason}" for reason, number in left.items()))
    summarise(rows)
    if notes:
        print(f"worst seed over the mean of {len(arguments.seeds)}: {geometric_mean(spread):.3f}, greatest {max(spread):.3f}")
        if learned:
            print(f"calibrated / best learned peer at {arguments.learned:g} times its calls: {geometric_mean(learned):.3f}")
        print("\ncalibrations:", *notes, sep="\n  ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", nargs="*", default=list(PROBLEMS), choices=list(PROBLEMS))
    parser.add_argument("--betas", nargs="*", default=list(BETAS), choices=list(BETAS))
    parser.add_argument("--calls", type=int, nargs="*", default=[5, 6, 8, 10])
    parser.add_argument("--count", type=int, help="samples, instead of 256, and 128 for patches")
    parser.add_argument("--trajectories", type=int, default=64, help="of the calibration")
    parser.add_argument("--teacher-steps", type=int, default=36, help="of the calibration")
    parser.add_argument("--budget", type=int, default=15_000, help="network calls of the calibration")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of calibrations; errors are their geometric mean")
    parser.add_argument(
        "--learned", type=float, nargs="?", const=1.0, help="also train LD3, BNS and GS, at so many times a calibration's calls"
    )
    parser.add_argument("--reference-steps", type=int, default=500)
    parser.add_argument("--peers-only", action="store_true")
    parser.add_argument("--peers", type=Path, metavar="FILE", help="JSON that peers' errors are kept in and taken from")
    parser.add_argument("--cache", type=Path, metavar="FOLDER", help="keeps fitted mixtures and references")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    diffusers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    with torch.no_grad():
        run(arguments)


if __name__ == "__main__":
    main()
