"""
``few_step.py --process flow``: the same problems seen as a flow ``x = (1 − s) x_0 + s ε`` by a network that predicts
``v = ε − x_0`` at times ``1000 s``, under the shifts of pipelines, and Diffusers' schedulers of flows as peers.
"""

import math
from dataclasses import dataclass

import diffusers
import numpy as np
import torch
from few_step_peers import CURVED, FULL_ORDER, Peer, crossed, each
from few_step_problems import Network, Problem

MU = 1.15
SHIFTS = {"shift 1": 1.0, "shift 3": 3.0, "dynamic": math.exp(MU)}
IN_HINDSIGHT = (1.0, 2.0, 3.0, 5.0)
DEFAULTS = ("UniPCMultistep", "DPMSolverMultistep")
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
LARGEST, SMALLEST_TIME = 1000.0, 1e-6


class FlowProblem(Problem):
    """``dynamic`` is the shift ``e^μ`` that comes by ``set_timesteps(mu=...)``; tables are made for it as a shift."""

    largest = LARGEST  # σ/α where the reference starts, from the point there that noise at σ/α = ∞ flows to

    def set_process(self) -> None:
        self.shift, self.reference_name = SHIFTS[self.variant], "flow"
        self.process = self.calibrated = {"shift": self.shift}
        if self.variant == "dynamic":
            self.process, self.steps = {"use_flow_sigmas": True, "use_dynamic_shifting": True}, {"mu": MU}

    def network(self) -> "FlowNetwork":
        return FlowNetwork(self)

    def start(self, noise: torch.Tensor) -> torch.Tensor:
        far = self.largest * noise
        return far + self.denoise(far, self.largest)


class FlowNetwork(Network):
    """``v(x, t) = (x − x_0)/s`` at any t in [0, 1000]; counts its calls."""

    def __call__(self, x: torch.Tensor, t) -> torch.Tensor:
        self.calls += 1
        s = max(float(torch.as_tensor(t).flatten()[0]) / 1000, SMALLEST_TIME)
        alpha = max(1 - s, SMALLEST_TIME)
        return ((x.double() - self.problem.denoise(x.double() / alpha, s / alpha)) / s).to(x.dtype)


@dataclass(frozen=True)
class FlowPeer(Peer):
    """A peer at a shift in hindsight, or at the problem's; with ``even``, it is given sigmas from 1 to 1/N, as by Flux."""

    shift: float | None = None
    even: bool = False

    @property
    def label(self) -> str:
        given = ["sigmas"] if self.even else []
        return " ".join([super().label, *given, *([f"shift={self.shift:g}"] if self.shift else [])])

    def prepare(self, problem: FlowProblem, calls: int):
        shift = self.shift or problem.shift
        process = {"shift": shift} if self.scheduler.startswith("FlowMatch") else {**FLOW, "flow_shift": shift}
        scheduler = getattr(diffusers, self.scheduler)(**process, **self.method, **self.schedule)
        for steps in (calls, calls - 1, (calls + 1) // 2):
            sigmas = {"sigmas": np.linspace(1, 1 / steps, steps)} if self.even else {}
            scheduler.set_timesteps(num_inference_steps=steps, **sigmas)
            if len(scheduler.timesteps) == calls:
                return scheduler
        return None


def flow_peers() -> list[FlowPeer]:
    ends, curves = [{}, FULL_ORDER], [{}, *CURVED]
    unipc = crossed(
        [{}, {"solver_type": "bh1"}], [{}, {"solver_order": 3}], ends, each("disable_corrector", [], [0], list(range(10)))
    )
    second = [{}, {"solver_type": "heun"}, {"solver_order": 3}]
    dpm = crossed(second, ends) + crossed(second[:1], [{"euler_at_final": True}])
    families = [
        ("FlowMatchEulerDiscreteScheduler", [{}], curves, (False, True)),
        ("FlowMatchHeunDiscreteScheduler", [{}], [{}], (False,)),
        ("UniPCMultistepScheduler", unipc, [{}], (False, True)),
        ("UniPCMultistepScheduler", unipc, CURVED, (False,)),
        ("DPMSolverMultistepScheduler", dpm, curves, (False,)),
        ("DPMSolverSinglestepScheduler", crossed(second, ends), curves, (False,)),
    ]
    return [
        FlowPeer(scheduler, method, grid, shift=shift, even=even)
        for scheduler, methods, grids, given in families
        for method in methods
        for grid in grids
        for even in given
        for shift in (None, *IN_HINDSIGHT)
    ]
