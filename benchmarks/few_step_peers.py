"""Peers of ``few_step.py`` on betas: the deterministic schedulers of Diffusers with their options."""

import inspect
import itertools
import math
from dataclasses import dataclass, field

import diffusers
import torch
from diffusers.schedulers import AysSchedules
from few_step_problems import Network, Problem

REFUSALS = (ValueError, NotImplementedError, IndexError, ZeroDivisionError, torch.linalg.LinAlgError)
DEFAULTS = ("DPMSolverMultistep linspace", "DPMSolverMultistep trailing", "UniPCMultistep linspace", "UniPCMultistep trailing")

LINSPACE, TRAILING, LEADING = SPACED = (
    {"timestep_spacing": "linspace"},
    {"timestep_spacing": "trailing"},
    {"timestep_spacing": "leading", "steps_offset": 1},
)
CURVED = ({"use_karras_sigmas": True}, {"use_exponential_sigmas": True}, {"use_beta_sigmas": True})
TO_MINIMUM = {"final_sigmas_type": "sigma_min"}
FULL_ORDER = {"lower_order_final": False}


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


def beta_peers() -> list[Peer]:
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
    scaled = getattr(scheduler, "scale_model_input", lambda x, t: x)  # which Diffusers' flows have not
    for t in scheduler.timesteps:
        x = scheduler.step(network(scaled(x, t), t), t, x, **step).prev_sample
    return x


def error(x: torch.Tensor, truth: torch.Tensor) -> float:
    return float((x.double() - truth).square().mean(1).sqrt().mean())


def run_peer(peer: Peer, scheduler, problem: Problem, noise: torch.Tensor):
    """The samples and the network calls that they took."""
    network = called = problem.network()
    if peer.scheduler.startswith("EDM"):
        called = EDMNetwork(network, scheduler.config.sigma_data)
    elif peer.scheduler == "IPNDMScheduler":
        called = VelocityNetwork(network)
    return sample(scheduler, called, first_sample(scheduler, problem, noise), **peer.step), network.calls


def compare_peers(peers: list[Peer], problem: Problem, noise, truth: torch.Tensor, calls: int, known: dict) -> dict:
    """
    Errors by label, and how many peers were left out and why. Those that come to the same steps are run once.

    ``known`` holds, and is given, what was found by steps: shifts of one flow have most of their peers in common.
    """
    errors, seen = {}, set()
    left = dict.fromkeys(("refused", "other numbers of calls", "the same as others", "not finite"), 0)
    for peer in peers:
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
            if key not in known:
                x, made = run_peer(peer, scheduler, problem, noise)
                known[key] = error(x, truth), made
        except REFUSALS:
            left["refused"] += 1
            continue
        found, made = known[key]
        if made != calls:
            left["other numbers of calls"] += 1
        elif math.isfinite(found):
            errors[peer.label] = found
        else:
            left["not finite"] += 1
    return {"errors": errors, "left": left}
