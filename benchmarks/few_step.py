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

``--process flow`` asks the same of a flow under three shifts of its grid: 1, 3 and a dynamic one of μ = 1.15. Peers are
FlowMatchEuler, FlowMatchHeun, UniPC and DPM-Solver++ on all grids, each at the problem's shift and at 1, 2, 3 and 5, so that
"best" is also the best shift in hindsight; "2M / UniPC" are the two with their defaults at the problem's shift.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import itertools
import json
import math
import statistics
import warnings
from pathlib import Path
from time import perf_counter

import diffusers
import torch
from few_step_flow import DEFAULTS as FLOW_DEFAULTS
from few_step_flow import SHIFTS, FlowProblem, flow_peers
from few_step_peers import DEFAULTS, beta_peers, compare_peers, error, sample
from few_step_problems import BETAS, CALIBRATION_LABEL_SEED, PROBLEMS, Network, Problem, reference

PROCESSES = {"betas": (Problem, BETAS, beta_peers, DEFAULTS), "flow": (FlowProblem, SHIFTS, flow_peers, FLOW_DEFAULTS)}
HEADER = (
    "problem | process | calls | best peer | which | 2M / UniPC | ours | calibrated | "
    "ours / best | calibrated / best | ours / (2M, UniPC) | s"
)
TITLES = ("ours / best peer", "calibrated / best peer", "ours / (2M, UniPC)")


# ---- ours ---------------------------------------------------------------------------------------------------------------


def calibration_network(problem: Problem, arguments) -> Network:
    """The network with labels that are not those of the test."""
    other = type(problem)(problem.name, problem.variant, arguments.cache)
    other.labels = other.draw_labels(CALIBRATION_LABEL_SEED)
    return other.network()


def calibrated_scheduler(problem: Problem, seed: int, arguments):
    """The scheduler, and a line on what it cost."""
    from atlas_diffusers import AtlasMultistepScheduler

    start = perf_counter()
    network = calibration_network(problem, arguments)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        scheduler = AtlasMultistepScheduler.calibrate(
            network,
            num_inference_steps=tuple(arguments.calls),
            num_trajectories=arguments.trajectories,
            teacher_steps=arguments.teacher_steps,
            budget=arguments.budget,
            sample_shape=(problem.size,),
            config=dict(problem.calibrated),
            generator=torch.Generator().manual_seed(seed),
            progress=False,
        )
    reported, seconds = scheduler.calibration_report.network_calls, perf_counter() - start
    notes = [f"{reported} network calls reported, in {network.calls} batches, {seconds:.0f} s", *map(warning_text, caught)]
    scheduler = AtlasMultistepScheduler(**problem.process, calibration=scheduler.config.calibration)
    return scheduler, f"{problem.name}, {problem.variant}, seed {seed}: {'; '.join(notes)}"


def warning_text(warning) -> str:
    return str(warning.message)


def our_error(scheduler, problem: Problem, noise: torch.Tensor, truth: torch.Tensor, calls: int) -> float:
    network = problem.network()
    scheduler.set_timesteps(calls, **problem.steps)
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

    network = calibration_network(problem, arguments)
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


def row(problem: Problem, calls: int, peers: dict, defaults: tuple, ours: dict[str, float], seconds: float) -> dict[str, float]:
    """Prints the line of a cell and returns its ratios by title."""
    best = min(peers, key=peers.get)
    ordinary = min(peers[label] for label in defaults if label in peers)
    ratios = {f"{name} / best peer": own / peers[best] for name, own in ours.items()}
    if "ours" in ours:
        ratios["ours / (2M, UniPC)"] = ours["ours"] / ordinary
    numbers = [f"{ours[name]:.4f}" if name in ours else "" for name in ("ours", "calibrated")]
    numbers += [f"{ratios[title]:.3f}" if title in ratios else "" for title in TITLES]
    cells = [problem.name, problem.variant, str(calls), f"{peers[best]:.4f}", best, f"{ordinary:.4f}", *numbers]
    print(f"| {' | '.join(cells)} | {seconds:.0f} |", flush=True)
    return ratios


def geometric_mean(ratios) -> float:
    return math.exp(statistics.fmean(map(math.log, ratios)))


def summarise(rows: dict[tuple[str, int], list[dict[str, float]]]) -> None:
    """Geometric means over processes for each problem and number of calls, and over everything."""
    for (name, calls), ratios in rows.items():
        means = (f"{title} {geometric_mean(row[title] for row in ratios):.3f}" for title in ratios[0])
        print(f"{name}, {calls} calls: {', '.join(means)}")
    cells = [row for group in rows.values() for row in group]
    for title in cells[0]:
        found = [row[title] for row in cells]
        print(f"{title:24s} geometric mean {geometric_mean(found):.3f}   greatest {max(found):.3f}   of {len(found)} cells")


def run(arguments) -> None:
    kept, rows, notes, counts, left, spread, learned = PeersFile(arguments.peers), {}, [], [], {}, [], []
    of_steps: dict[tuple, dict] = {}
    make_problem, variants, make_peers, defaults = PROCESSES[arguments.process]
    all_peers = [peer for peer in make_peers() if not arguments.quick or peer.label in defaults]
    print(f"| {HEADER} |\n{'|---' * (HEADER.count('|') + 1)}|")
    for name, variant in itertools.product(arguments.problems, arguments.variants or variants):
        problem = make_problem(name, variant, arguments.cache)
        count = arguments.count or (128 if name.startswith("patches") else 256)
        noise = problem.noise(count)
        truth = reference(problem, noise, arguments.reference_steps, arguments.cache)
        ours = []
        if not (arguments.peers_only or arguments.plain):
            found = [calibrated_scheduler(problem, seed, arguments) for seed in arguments.seeds]
            ours, notes = [scheduler for scheduler, _ in found], [*notes, *(note for _, note in found)]
        teacher = teacher_of(problem, arguments) if arguments.learned else None
        for calls in arguments.calls:
            start = perf_counter()
            key = f"{name}, {variant}, {calls} calls, {count} samples, {arguments.reference_steps} steps"
            known = of_steps.setdefault((name, problem.reference_name, calls), {})
            found = kept.cell(key, lambda: compare_peers(all_peers, problem, noise, truth, calls, known))  # noqa: B023
            errors = {}
            if not arguments.peers_only:
                errors["ours"] = our_error(uncalibrated_scheduler(problem), problem, noise, truth, calls)
            if ours:
                of_seeds = [our_error(scheduler, problem, noise, truth, calls) for scheduler in ours]
                errors["calibrated"] = geometric_mean(of_seeds)
                spread.append(max(of_seeds) / errors["calibrated"])
            ratios = row(problem, calls, found["errors"], defaults, errors, perf_counter() - start)
            rows.setdefault((name, calls), []).append(ratios)
            if teacher is not None:
                trained = learned_errors(problem, teacher, noise, truth, calls, arguments)
                ratio = errors["calibrated"] / min(trained.values())
                learned.append(ratio)
                notes.append(f"{name}, {variant}, {calls} calls, learned: {trained}, calibrated / best of them {ratio:.3f}")
            counts.append(len(found["errors"]))
            left = {reason: max(number, left.get(reason, 0)) for reason, number in found["left"].items()}
    print(f"\npeers a cell: {min(counts)} to {max(counts)} of {len(all_peers)} configurations; left out at most:", end=" ")
    print(", ".join(f"{number} {reason}" for reason, number in left.items()))
    summarise(rows)
    if notes:
        print(f"worst seed over the mean of {len(arguments.seeds)}: {geometric_mean(spread):.3f}, greatest {max(spread):.3f}")
        if learned:
            print(f"calibrated / best learned peer at {arguments.learned:g} times its calls: {geometric_mean(learned):.3f}")
        print("\ncalibrations:", *notes, sep="\n  ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--process", default="betas", choices=list(PROCESSES))
    parser.add_argument("--problems", nargs="*", default=list(PROBLEMS), choices=list(PROBLEMS))
    parser.add_argument("--variants", nargs="*", choices=[*BETAS, *SHIFTS], help="tables of betas, or shifts of a flow")
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
    parser.add_argument("--quick", action="store_true", help="no peers but DPM-Solver++(2M) and UniPC with their defaults")
    parser.add_argument("--plain", action="store_true", help="ours as it is constructed, without calibration")
    parser.add_argument("--peers", type=Path, metavar="FILE", help="JSON that peers' errors are kept in and taken from")
    parser.add_argument("--cache", type=Path, metavar="FOLDER", help="keeps fitted mixtures and references")
    arguments = parser.parse_args()
    unknown = set(arguments.variants or ()) - set(PROCESSES[arguments.process][1])
    if unknown or (arguments.learned and arguments.process == "flow"):
        parser.error(f"--process {arguments.process} has no {', '.join(unknown) or 'learned peers'}")
    torch.set_num_threads(1)
    diffusers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    with torch.no_grad():
        run(arguments)


if __name__ == "__main__":
    main()
