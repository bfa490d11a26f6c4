"""A denoiser whose batch is coupled with references by a Schrödinger bridge, for any scheduler."""

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.utils import logging

from ..bridges import BridgeCoupling, GatedBridge, SchrodingerBridgeSolver
from ..schedules import NoiseLevel
from .denoiser import Denoiser
from .process import is_flow, noise_level

logger = logging.get_logger(__name__)
LEVELS = 250  # of the noise process among which the gate is looked for


@dataclass
class BridgeReport:
    """
    What the bridge did in one call.

    Args:
        network_calls: samples that went through the network, summed over steps and divided by the batch.
        network_calls_saved: the same of those that did not have to.
        gate_log_snr: log-SNR of the first step after the gate, one a group; ``None`` where it stayed open.
        effective_references: their median at every step that was coupled, one list a group.
        kernel_applications: products with the kernel, over all steps.
        nearest_reference: distance of every sample to its nearest reference at the end, ``(batch,)``.
    """

    network_calls: float = 0.0
    network_calls_saved: float = 0.0
    gate_log_snr: list[float | None] = field(default_factory=list)
    effective_references: list[list[float]] = field(default_factory=list)
    kernel_applications: int = 0
    nearest_reference: torch.Tensor | None = None


class ReferenceCoupling:
    """
    The couplings of one call: groups of samples, each with references of its own weights.

    Args:
        groups: indices of the samples of each group, ``(n,)`` each.
        bridges: one a group.
        strength: of the correction of a network's prediction; ``None`` replaces the prediction, without a network call.
    """

    def __init__(self, groups: list[torch.Tensor], bridges: list[GatedBridge], strength: float | None = None):
        if any(len(rows) == 1 for rows in groups):
            logger.warning("a group of one sample: the bridge has nothing to balance, its projection is the posterior mean")
        self.groups, self.bridges, self.strength = groups, bridges, strength
        self.report = BridgeReport(gate_log_snr=[None] * len(groups))

    @property
    def is_open(self) -> bool:
        """Whether any group is still coupled."""
        return any(bridge.is_open for bridge in self.bridges)

    def at(self, x: torch.Tensor, level: NoiseLevel) -> list[tuple[torch.Tensor, BridgeCoupling]]:
        """Rows and coupling of every group whose gate is open."""
        found = []
        for index, (rows, bridge) in enumerate(zip(self.groups, self.bridges)):
            was_open = bridge.is_open
            if (coupling := bridge.couple(x[rows], *level)) is not None:
                found.append((rows, coupling))
            elif was_open:
                self.report.gate_log_snr[index] = level.log_snr
        return found

    def network_rows(self, x: torch.Tensor, couplings: list[tuple[torch.Tensor, BridgeCoupling]]) -> torch.Tensor:
        """Indices of the samples that need the network at this step, which the report counts."""
        needed = torch.ones(len(x), dtype=torch.bool, device=x.device)
        if self.strength is None:
            for rows, _ in couplings:
                needed[rows] = False
        rows = needed.nonzero()[:, 0]
        self.report.network_calls += len(rows) / len(x)
        self.report.network_calls_saved += 1 - len(rows) / len(x)
        return rows

    def finish(self, samples: torch.Tensor) -> BridgeReport:
        """The report, with the distances of the finished samples to their references."""
        nearest = torch.empty(len(samples), dtype=torch.float32, device=samples.device)
        for rows, bridge in zip(self.groups, self.bridges):
            nearest[rows] = bridge.solver.nearest_reference(samples[rows]).to(nearest)
        self.report.nearest_reference = nearest
        self.report.effective_references = [bridge.effective_references for bridge in self.bridges]
        self.report.kernel_applications = sum(bridge.kernel_applications for bridge in self.bridges)
        return self.report


@dataclass(frozen=True)
class CoupledDenoiser:
    """
    A denoiser, replaced or corrected by the projection on references where the gate is open.

    Args:
        denoiser: of the same batch.
        coupling: of this call alone; it remembers the steps before.

    Raises:
        ValueError: for a scheduler whose prediction type is none of ours.
    """

    denoiser: Denoiser
    coupling: ReferenceCoupling

    def __post_init__(self):
        _ = self.denoiser.process.prediction_type

    def __call__(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The prediction for ``x``, (batch, ...), at timestep t, a scalar."""
        process = self.denoiser.process
        level = process.level(t) if self.coupling.is_open else None
        couplings = [] if level is None else self.coupling.at(x, level)
        rows = self.coupling.network_rows(x, couplings)
        if level is None or not couplings:
            return self.denoiser(x, t)
        prediction = torch.zeros_like(x)
        prediction[rows] = self.denoiser.part(rows)(x[rows], t)
        for rows, coupling in couplings:
            data = coupling.data
            if self.coupling.strength is not None:
                own = process.data(prediction[rows], x[rows], level)
                data = coupling.correct(own, self.coupling.strength)
            prediction[rows] = process.prediction(data, x[rows], level).to(prediction.dtype)
        return prediction


def gate_timestep(scheduler: Any, solvers: list[SchrodingerBridgeSolver], gate: float) -> tuple[float, float]:
    """
    The first timestep of a scheduler's process, and the one where the gate shuts: where a sample of the references themselves
    would have ``gate`` effective references, in the first of all groups. A flow's shift is taken from the scheduler, because
    timesteps that are chosen so are levels already.
    """
    levels = copy.deepcopy(scheduler)
    levels.set_timesteps(LEVELS)
    low, high = 0, len(levels.timesteps) - 1
    while low < high:
        middle = (low + high) // 2
        level = noise_level(levels, levels.timesteps[middle])
        shut = min(solver.posterior_size(*level) for solver in solvers) < gate
        low, high = (low, middle) if shut else (middle + 1, high)
    if is_flow(levels) and hasattr(scheduler, "set_shift"):
        scheduler.set_shift(1.0)
    return levels.timesteps[0].item(), levels.timesteps[low].item()


def bridge_timesteps(first: float, gate: float, bridge_steps: int, network_steps: int) -> list[int]:
    """``bridge_steps`` timesteps from the first one to the gate, then ``network_steps`` from there on, each part even."""
    above = [first + (gate - first) * step / bridge_steps for step in range(bridge_steps)]
    below = [gate * (1 - step / network_steps) for step in range(network_steps)]
    return list(dict.fromkeys(round(t) for t in above + below))
