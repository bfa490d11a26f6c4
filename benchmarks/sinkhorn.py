"""
Entropic transport against POT, geomloss, ott-jax and a plain log-domain Sinkhorn: ``python benchmarks/sinkhorn.py [--quick]``.

Every candidate starts from the points and ends with potentials, on one thread; times are CPU seconds, medians of repeats in
which the candidates take turns. Peers that iterate plainly are told the number of iterations that reaches the tolerance, found
beforehand, so that they neither check too often nor run too long; ott's stop themselves. Afterwards the L1 error of both
marginals of every result is measured in float64 from its potentials. A result over 1.1 times the tolerance is listed as a
failure and is no measure of speed. The ratio is the time of the fastest valid peer over ours. Tolerance 1e-3 is computed in
float32, 1e-6 in float64, by all. A peer that at a smaller size took far longer than ours is not run unless it was one of the
two fastest, and one that does so in its first run is timed once. POT's greenkhorn and epsilon scaling are left out at 4096
points, where one run takes minutes; at 256 and 1024 they are never the fastest.

Problems: eight Gaussians to two moons (d = 2), digits 0-4 to 5-9 (d = 64), patches of one photograph to another's (d = 3072);
the last two need scikit-learn, and are otherwise Gaussian clouds whose spectrum decays.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")

import argparse
import importlib.util
import math
import statistics
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from time import process_time

import numpy as np
import torch

from atlas_diffusers.kernels import GridKernel
from atlas_diffusers.transport import entropic_transport, extrapolate_potentials, sinkhorn

EPSILONS = (0.5, 0.1, 0.05, 0.01)
TOLERANCES = (1e-3, 1e-6)
PATIENCE, FORESIGHT = 5.0, 15.0
SLOW = ("POT greenkhorn", "POT sinkhorn_epsilon_scaling")


# ---- problems ---------------------------------------------------------------------------------------------------------


def clouds(n: int, d: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Two clouds of n points in d dimensions, float64."""
    random = np.random.default_rng([seed, n, d])
    if d == 2:
        angle = random.integers(0, 8, n) * math.pi / 4
        ring = 5 * np.stack([np.cos(angle), np.sin(angle)], 1) + 0.3 * random.normal(size=(n, 2))
        turn, lower = random.uniform(0, math.pi, n), random.integers(0, 2, n)[:, None]
        upper_moon, lower_moon = np.stack([np.cos(turn), np.sin(turn)], 1), np.stack([1 - np.cos(turn), 0.5 - np.sin(turn)], 1)
        return ring, 3 * (np.where(lower, lower_moon, upper_moon) + 0.2 * random.normal(size=(n, 2))) - 1
    if importlib.util.find_spec("sklearn") and d == 64:
        from sklearn.datasets import load_digits

        data = load_digits()
        halves = (data.data[data.target < 5] / 8 - 1, data.data[data.target >= 5] / 8 - 1)
        x, y = (half[random.integers(0, len(half), n)] + 0.25 * random.normal(size=(n, d)) for half in halves)
        return x, y
    if importlib.util.find_spec("sklearn") and d == 3072:
        from sklearn.datasets import load_sample_images

        x, y = (patches(picture / 127.5 - 1, n, random) for picture in load_sample_images().images)
        return x, y
    spectrum = 1 / np.sqrt(1 + np.arange(d))
    return random.normal(size=(n, d)) * spectrum, 0.7 * random.normal(size=(n, d)) * spectrum + 0.1


def patches(picture: np.ndarray, n: int, random: np.random.Generator) -> np.ndarray:
    tops, lefts = random.integers(0, picture.shape[0] - 32, n), random.integers(0, picture.shape[1] - 32, n)
    return np.stack([picture[top : top + 32, left : left + 32].ravel() for top, left in zip(tops, lefts)])


def mean_cost(x: np.ndarray, y: np.ndarray) -> float:
    return float((x**2).sum(1).mean() + (y**2).sum(1).mean() - 2 * x.mean(0) @ y.mean(0))


@dataclass
class Problem:
    """Points in the precision of the cell, and the number of plain iterations that it takes."""

    x: np.ndarray
    y: np.ndarray
    epsilon: float
    tolerance: float
    iterations: int = 0

    @property
    def dtype(self):
        return np.float32 if self.tolerance > 1e-5 else np.float64

    def points(self) -> tuple[np.ndarray, np.ndarray]:
        return self.x.astype(self.dtype), self.y.astype(self.dtype)

    def marginal_error(self, phi: np.ndarray, psi: np.ndarray) -> float:
        """L1 errors of both marginals of ``exp(φ_i + ψ_j − C_ij/ε)`` with uniform weights, in float64."""
        x, y = self.x, self.y
        rows, columns = [], 0
        for start in range(0, len(x), 1024):
            block = x[start : start + 1024]
            squared = (block**2).sum(1)[:, None] + (y**2).sum(1) - 2 * block @ y.T
            with np.errstate(over="ignore", invalid="ignore"):
                plan = np.exp(phi[start : start + 1024, None] + psi - np.maximum(squared, 0) / self.epsilon)
            rows.append(plan.sum(1))
            columns = columns + plan.sum(0)
        return float(np.abs(np.concatenate(rows) - 1 / len(x)).sum() + np.abs(columns - 1 / len(y)).sum())


def plain_iterations(x: np.ndarray, y: np.ndarray, epsilon: float, limit: int = 5000) -> dict[float, int]:
    """Iterations of plain Sinkhorn from u = 1 until the column error is at most each tolerance, float64, re-absorbed."""
    cost = torch.cdist(torch.from_numpy(x), torch.from_numpy(y)).square().div_(-epsilon)
    psi = -cost.amax(0)
    psi -= (cost + psi).amax(1).amax()
    kernel, found = (cost + psi).exp_(), {}
    phi = torch.zeros(len(x), dtype=kernel.dtype)
    u = torch.ones_like(phi)
    for iteration in range(1, limit + 1):
        v = (1 / len(y)) / (kernel.mT @ u)
        u = (1 / len(x)) / (kernel @ v)
        if iteration < 20 or iteration % 5 == 0:
            error = float((v * (kernel.mT @ u) * len(y) - 1).abs().mean())
            found |= {t: iteration for t in TOLERANCES if error <= t and t not in found}
            if len(found) == len(TOLERANCES):
                break
        if max(float(u.max()), float(v.max())) > 1e100:
            phi, psi = phi + u.log(), psi + v.log()
            kernel, u = (cost + psi + phi[:, None]).exp_(), torch.ones_like(u)
    return {t: found.get(t, limit) for t in TOLERANCES}


# ---- candidates: problem -> (phi, psi), or None if they have no answer -------------------------------------------------


def ours(problem: Problem):
    x, y = (torch.from_numpy(z) for z in problem.points())
    result = entropic_transport(x, y, problem.epsilon, tolerance=problem.tolerance)
    sides = (result.f, x), (result.g, y)
    return tuple(potential.numpy() / problem.epsilon - math.log(points.shape[-2]) for potential, points in sides)


def plain_torch(problem: Problem):
    x, y = (torch.from_numpy(z) for z in problem.points())
    cost = torch.cdist(x, y).square().div_(-problem.epsilon)
    psi = torch.zeros(len(y), dtype=x.dtype)
    for _ in range(problem.iterations + 1):
        phi = -math.log(len(x)) - torch.logsumexp(cost + psi, 1)
        psi = -math.log(len(y)) - torch.logsumexp(cost + phi[:, None], 0)
    return phi.double().numpy(), psi.double().numpy()


def pot(method: str, backend: str = "numpy"):
    import ot

    def solve(problem: Problem):
        x, y = problem.points()
        weights = np.full(len(x), 1 / len(x), x.dtype)
        if backend == "torch":
            x, y, weights = (torch.from_numpy(z) for z in (x, y, weights))
        limits = {"numItermax": problem.iterations + 1, "stopThr": 0.0}
        if method == "greenkhorn":
            limits = {"numItermax": min(2 * len(x) * problem.iterations, 200_000), "stopThr": problem.tolerance}
        if method == "sinkhorn_epsilon_scaling":
            limits = {"numItermax": 100, "numInnerItermax": 100, "stopThr": problem.tolerance / 10}
        result = ot.sinkhorn(weights, weights, ot.dist(x, y), problem.epsilon, method=method, log=True, warn=False, **limits)[1]
        if "logu" in result:
            scalings = result["logu"], result["logv"]
        elif "log_u" in result:
            scalings = result["log_u"], result["log_v"]
        elif "alpha" in result:
            scalings = (result["alpha"] / problem.epsilon, result["beta"] / problem.epsilon)
        else:
            scalings = (np.log(np.asarray(result[name], dtype=np.float64)) for name in "uv")
        phi, psi = (np.asarray(scaling, dtype=np.float64) for scaling in scalings)
        return phi, psi

    return solve


def geomloss(problem: Problem):
    """Annealed symmetric updates; a slower schedule until the error is small enough."""
    from geomloss import SamplesLoss

    x, y = (torch.from_numpy(z) for z in problem.points())
    for scaling in (0.5, 0.9, 0.99):
        options = {"p": 2, "blur": (problem.epsilon / 2) ** 0.5, "scaling": scaling, "debias": False, "potentials": True}
        f, g = SamplesLoss("sinkhorn", backend="tensorized", **options)(x, y)
        scale = 2 / problem.epsilon
        phi, psi = (z.double().flatten().numpy() * scale - math.log(z.numel()) for z in (f, g))
        if problem.marginal_error(phi, psi) <= problem.tolerance:
            break
    return phi, psi


def ott(**options):
    import jax
    from ott.geometry import pointcloud
    from ott.problems.linear import linear_problem
    from ott.solvers.linear import acceleration
    from ott.solvers.linear import sinkhorn as solver

    if "momentum" in options:
        options["momentum"] = acceleration.Momentum(start=options["momentum"])
    if "anderson" in options:
        options["anderson"] = acceleration.AndersonAcceleration(memory=options["anderson"])

    def scalings(x, y, epsilon, tolerance):
        geometry = pointcloud.PointCloud(x, y, epsilon=epsilon)
        method = solver.Sinkhorn(threshold=0.85 * tolerance, max_iterations=20000, **options)
        result = method(linear_problem.LinearProblem(geometry))
        return result.f / epsilon, result.g / epsilon

    single = jax.jit(scalings, static_argnums=(2, 3))
    many = jax.jit(jax.vmap(scalings, in_axes=(0, 0, None, None)), static_argnums=(2, 3))

    def solve(problem: Problem):
        x, y = problem.points()
        jax.config.update("jax_enable_x64", problem.dtype == np.float64)
        arrays = jax.numpy.asarray(x), jax.numpy.asarray(y)
        phi, psi = (many if x.ndim == 3 else single)(*arrays, problem.epsilon, problem.tolerance)
        return np.asarray(phi, dtype=np.float64), np.asarray(psi, dtype=np.float64)

    return solve


OTT = {
    "ott lse": {},
    "ott scaling, momentum": {"lse_mode": False, "momentum": 20},
    "ott lse, momentum": {"momentum": 20},
    "ott lse, Anderson": {"anderson": 5},
}


def peers() -> dict:
    found = {"plain torch log": plain_torch}
    if importlib.util.find_spec("ot"):
        methods = ("sinkhorn", "sinkhorn_log", "sinkhorn_stabilized", "sinkhorn_epsilon_scaling", "greenkhorn")
        found |= {f"POT {method}": pot(method) for method in methods} | {"POT sinkhorn, torch": pot("sinkhorn", "torch")}
    if importlib.util.find_spec("geomloss"):
        found["geomloss"] = geomloss
    if importlib.util.find_spec("ott") and importlib.util.find_spec("jax"):
        found |= {name: ott(**options) for name, options in OTT.items()}
    return found



# ---- measurements -----------------------------------------------------------------------------------------------------


def seconds(solve, problem) -> float:
    start = process_time()
    solve(problem)
    return process_time() - start


@dataclass
class Cell:
    """Medians in seconds of all who are right, times of their first run, the best peer over ours, and failures."""

    times: dict[str, float]
    first: dict[str, float]
    ratio: float
    best: str
    failures: dict[str, str]


def compare(problem, candidates: dict, repeats: int, expected: dict, error) -> Cell:
    """
    Args:
        problem: what ``candidates``, ``ours`` the first of them, are called with.
        repeats: rounds in which all take their turn that are not far behind.
        expected: seconds by name, where they are known to be many.
        error: of a candidate's result, against ``problem.tolerance``.
    """
    first, failures = {}, {}
    promising = sorted((name for name in expected if name != "ours"), key=expected.get)[:2]
    for name, solve in candidates.items():
        if first and expected.get(name, 0) > FORESIGHT * first["ours"] and name not in promising:
            continue
        try:
            start = process_time()
            result = solve(problem)
            first[name] = process_time() - start
        except (ValueError, RuntimeError, ArithmeticError) as failure:
            failures[name] = f"{type(failure).__name__}: {failure}"[:80]
            continue
        if name == "ours" or name.startswith("ott"):  # the first call warms up or compiles
            first[name] = seconds(solve, problem)
        reached = error(*result)
        if not reached <= 1.1 * problem.tolerance:
            failures[name] = f"error {reached:.0e} in {first[name]:.2g} s"
    if "ours" in failures:
        raise SystemExit(f"ours is wrong: {failures['ours']}")
    times = {name: value for name, value in first.items() if name not in failures}
    rounds = {name: [] for name, value in times.items() if value <= PATIENCE * first["ours"]}
    for _ in range(repeats):
        for name, values in rounds.items():
            values.append(seconds(candidates[name], problem))
    times |= {name: statistics.median(values) for name, values in rounds.items()}
    best = min((name for name in times if name != "ours"), key=times.get, default="none")
    ratio = times.get(best, math.nan) / times["ours"]
    if best in rounds:
        ratio = statistics.median(theirs / own for theirs, own in zip(rounds[best], rounds["ours"]))
    return Cell(times, first, ratio, best, failures)


def report(label: str, cell: Cell, note: str = "") -> None:
    fastest = f"{cell.times[cell.best]:9.4f} s {cell.best}" if cell.best in cell.times else "no valid peer"
    own = f"ours {cell.times['ours']:8.4f} s"
    print(f"{label:36s} {note:>10s} {own}  best peer {fastest:36s} ratio {cell.ratio:6.2f}", flush=True)


def summarise(title: str, ratios: list[float]) -> None:
    ratios = [ratio for ratio in ratios if not math.isnan(ratio)]
    if ratios:
        mean = math.exp(statistics.fmean(map(math.log, ratios)))
        print(f"{title:40s} geometric mean {mean:6.2f}   least {min(ratios):6.2f}   of {len(ratios)} cells")


def run_points(candidates: dict, sizes, dimensions, epsilons) -> None:
    failures, ratios, before = {}, {}, {}
    for n in sizes:
        for d in dimensions:
            x, y = clouds(n, d)
            for relative in epsilons:
                epsilon = relative * mean_cost(x, y)
                counts = plain_iterations(x, y, epsilon)
                for tolerance in TOLERANCES:
                    problem = Problem(x, y, epsilon, tolerance, counts[tolerance])
                    key = (d, relative, tolerance)
                    repeats = {256: 25, 1024: 9}.get(n, 3)
                    expected = {name: value * (n / size) ** 2 for name, (size, value) in before.get(key, {}).items()}
                    racing = {name: solve for name, solve in candidates.items() if n < 4096 or name not in SLOW}
                    cell = compare(problem, racing, repeats, expected, problem.marginal_error)
                    before.setdefault(key, {}).update({name: (n, value) for name, value in cell.first.items()})
                    report(f"n={n} d={d} eps={relative} tol={tolerance:.0e}", cell, f"plain {counts[tolerance]}")
                    ratios.setdefault((n, tolerance), []).append(cell.ratio)
                    for name, what in cell.failures.items():
                        failures.setdefault(name, []).append(f"n={n} d={d} eps={relative} tol={tolerance:.0e}: {what}")
    print()
    for (n, tolerance), values in ratios.items():
        summarise(f"n={n} tol={tolerance:.0e}", values)
    print("\nwithout a valid result:")
    for name, cells in failures.items():
        print(f"  {name}: {len(cells)} cells, such as {cells[0]}")


# ---- batches, grids, paths, memory ------------------------------------------------------------------------------------


@dataclass
class Batch(Problem):
    """The same for (batch, n, d) points; the error is the worst."""

    def members(self) -> list[Problem]:
        return [Problem(x, y, self.epsilon, self.tolerance, self.iterations) for x, y in zip(self.x, self.y)]

    def marginal_error(self, phi: np.ndarray, psi: np.ndarray) -> float:
        return max(member.marginal_error(f, g) for member, f, g in zip(self.members(), phi, psi))


def one_by_one(solve):
    return lambda batch: tuple(np.stack(side) for side in zip(*map(solve, batch.members())))


def pot_batch(batch: Batch):
    from ot.batch import dist_batch, solve_batch

    x, y = (torch.from_numpy(z) for z in batch.points())
    costs = dist_batch(x, y)
    limits = {"max_iter": batch.iterations + 1, "tol": 0.0, "reg_type": "entropy", "grad": "detach"}
    f, g = solve_batch(costs, reg=batch.epsilon, method="sinkhorn", **limits).potentials
    return f.double().numpy(), g.double().numpy()


def run_batches(candidates: dict, dimensions, epsilons, count: int = 16, n: int = 256) -> None:
    loops = {f"{name}, one by one": one_by_one(solve) for name, solve in candidates.items() if name.startswith("POT sinkhorn")}
    batched = {name: solve for name, solve in candidates.items() if name.startswith("ott") or name == "ours"}
    if importlib.util.find_spec("ot"):
        batched["POT solve_batch"] = pot_batch
    ratios = {tolerance: [] for tolerance in TOLERANCES}
    for d in dimensions:
        x, y = (np.stack(side) for side in zip(*(clouds(n, d, seed) for seed in range(count))))
        for relative in epsilons:
            epsilon = relative * statistics.fmean(map(mean_cost, x, y))
            counts = [plain_iterations(p, q, epsilon) for p, q in zip(x, y)]
            for tolerance in TOLERANCES:
                most = max(found[tolerance] for found in counts)
                batch = Batch(x, y, epsilon, tolerance, most)
                cell = compare(batch, batched | loops, 7, {}, batch.marginal_error)
                report(f"{count}x{n}x{n} d={d} eps={relative} tol={tolerance:.0e}", cell, f"plain {most}")
                ratios[tolerance].append(cell.ratio)
    print()
    for tolerance, values in ratios.items():
        summarise(f"{count}x{n}x{n} tol={tolerance:.0e}", values)


@dataclass
class Pictures:
    """Two pictures as measures on the pixels of the unit square."""

    a: np.ndarray
    b: np.ndarray
    epsilon: float
    tolerance: float

    @classmethod
    def blobs(cls, size: int, epsilon: float, tolerance: float) -> "Pictures":
        random = np.random.default_rng(size)
        axis = np.linspace(0, 1, size)
        both = []
        for _ in range(2):
            centres, widths = random.uniform(0.1, 0.9, (6, 2)), random.uniform(0.03, 0.15, 6)
            distances = [(axis[:, None] - c[0]) ** 2 + (axis - c[1]) ** 2 for c in centres]
            picture = sum(np.exp(-r / (2 * w * w)) for r, w in zip(distances, widths)) + 1e-3
            both.append((picture / picture.sum()).ravel())
        return cls(*both, epsilon, tolerance)

    def marginal_error(self, phi: np.ndarray, psi: np.ndarray) -> float:
        """From potentials over ε, the weights included, in the log domain axis by axis."""
        size = math.isqrt(len(self.a))
        axis = torch.linspace(0, 1, size, dtype=torch.float64)
        log_kernel = -(axis[:, None] - axis).square() / self.epsilon

        def smooth(potential: torch.Tensor) -> torch.Tensor:
            columns = torch.logsumexp(log_kernel[:, :, None] + potential.view(1, size, size), 1)
            return torch.logsumexp(columns[:, None] + log_kernel, 2).flatten()

        phi, psi = torch.from_numpy(phi), torch.from_numpy(psi)
        rows, columns = (phi + smooth(psi)).exp().numpy(), (psi + smooth(phi)).exp().numpy()
        return float(np.abs(rows - self.a).sum() + np.abs(columns - self.b).sum())


def ours_on_grid(pictures: Pictures):
    size = math.isqrt(len(pictures.a))
    operator = GridKernel((size, size), epsilon=(pictures.epsilon / 2) ** 0.5, spacing=1 / (size - 1), dtype=torch.float64)
    weights = torch.from_numpy(pictures.a), torch.from_numpy(pictures.b)
    result = sinkhorn(operator, *weights, tolerance=pictures.tolerance)
    return (result.f / result.epsilon).numpy() + np.log(pictures.a), (result.g / result.epsilon).numpy() + np.log(pictures.b)


def ott_grid():
    import jax
    from ott.geometry import grid
    from ott.problems.linear import linear_problem
    from ott.solvers.linear import sinkhorn as solver

    def scalings(a, b, size, epsilon, tolerance):
        geometry = grid.Grid(x=[jax.numpy.linspace(0, 1, size)] * 2, epsilon=epsilon)
        result = solver.Sinkhorn(threshold=tolerance, max_iterations=4000)(linear_problem.LinearProblem(geometry, a, b))
        return result.f / epsilon, result.g / epsilon

    compiled = jax.jit(scalings, static_argnums=(2, 3, 4))

    def solve(pictures: Pictures):
        size = math.isqrt(len(pictures.a))
        jax.config.update("jax_enable_x64", True)
        phi, psi = compiled(pictures.a, pictures.b, size, pictures.epsilon, pictures.tolerance)
        return np.array(phi), np.array(psi)

    return solve


def run_grids(sizes, epsilons) -> None:
    candidates = {"ours": ours_on_grid}
    if importlib.util.find_spec("ott") and importlib.util.find_spec("jax"):
        candidates["ott Grid"] = ott_grid()
    ratios = []
    for size in sizes:
        for epsilon in epsilons:
            for tolerance in TOLERANCES:
                pictures = Pictures.blobs(size, epsilon, tolerance)
                cell = compare(pictures, candidates, 3, {}, pictures.marginal_error)
                report(f"grid {size}x{size} eps={epsilon} tol={tolerance:.0e}", cell)
                ratios.append(cell.ratio)
    print()
    summarise("grids", ratios)


def run_path(dimensions, steps: int = 50, n: int = 512, tolerance: float = 1e-3) -> None:
    """Kernel applications a step along ``x_t = α x_0 + σ z`` to fixed y at ε = 0.05 mean cost, α = cos(πt/2)."""
    for d in dimensions:
        x, y = (torch.from_numpy(z).float() for z in clouds(n, d))
        noise = torch.randn(n, d, generator=torch.Generator().manual_seed(0)) * x.std()
        for start in ("cold", "last potentials", "extrapolated in α"):
            history, positions, applications = [], [], 0
            for t in np.linspace(1, 0, steps + 1):
                alpha, sigma = math.cos(t * math.pi / 2), math.sin(t * math.pi / 2)
                points = alpha * x + sigma * noise
                epsilon = 0.05 * mean_cost(points.numpy(), y.numpy())
                kept = {"cold": 0, "last potentials": 1}.get(start, 2)
                g = extrapolate_potentials(history[-kept:], positions[-kept:], alpha) if kept and history else None
                init = None if g is None else (None, g)
                result = entropic_transport(points, y, epsilon, tolerance=tolerance, init=init)
                history, positions = [*history, result.g], [*positions, alpha]
                applications += result.kernel_applications
            mean = applications / (steps + 1)
            print(f"path of {steps} steps, d={d}, tol={tolerance:.0e}, {start:18s} {mean:5.1f} kernel applications a step")


def peak_memory(name: str, n: int = 4096, d: int = 64) -> float:
    """Megabytes that a float32 problem adds to a process that has solved a small one."""
    solve = {"ours": ours, **peers()}[name]
    problems = [Problem(x, y, 0.05 * mean_cost(x, y), 1e-3, 10) for x, y in (clouds(64, d), clouds(n, d))]
    solve(problems[0])
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident("VmRSS")
    solve(problems[1])
    return resident("VmHWM") - before


def resident(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


def run_memory(names) -> None:
    for name in names:
        output = subprocess.run([sys.executable, __file__, "--memory", name], capture_output=True, text=True, check=True).stdout
        print(f"peak memory at n=4096, d=64, float32: {name:28s} {float(output.split()[-1]):6.0f} MB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, two epsilons")
    parser.add_argument("--sizes", type=int, nargs="*", default=[256, 1024, 4096])
    parser.add_argument("--dimensions", type=int, nargs="*", default=[2, 64, 3072])
    parser.add_argument("--epsilons", type=float, nargs="*", default=EPSILONS, help="in units of the mean cost")
    parser.add_argument("--parts", nargs="*", default=["points", "batches", "grids", "path", "memory"])
    parser.add_argument("--memory", metavar="NAME", help="print the peak memory of one candidate")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if arguments.memory:
        print(peak_memory(arguments.memory))
        return
    sizes, dimensions, epsilons = arguments.sizes, arguments.dimensions, arguments.epsilons
    if arguments.quick:
        sizes, dimensions, epsilons = [256, 512], [2, 64], (0.5, 0.05)
    candidates = {"ours": ours, **peers()}
    print(f"torch {torch.__version__}, one thread; peers: {', '.join(list(candidates)[1:])}\n")
    parts = {
        "points": lambda: run_points(candidates, sizes, dimensions, epsilons),
        "batches": lambda: run_batches(candidates, dimensions[:2], epsilons),
        "grids": lambda: run_grids(*(([32], [0.01]) if arguments.quick else ([64, 128], [0.01, 0.002, 0.0005]))),
        "path": lambda: run_path(dimensions),
        "memory": lambda: run_memory(name for name in candidates if name in ("ours", "POT sinkhorn", "plain torch log")),
    }
    for part in arguments.parts:
        parts[part]()
        print()


if __name__ == "__main__":
    main()
