"""The Schrödinger-bridge step inside the sampling loop, for any scheduler."""

import copy
from dataclasses import dataclass, field

import torch
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils import logging

from ..bridges import BridgeState, SchrodingerBridgeSolver
from ..schedules import NoiseLevel, data_coefficients, output_coefficients
from ..schedules.predictions import check_prediction_type

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


@dataclass
class AtlasPipelineOutput(ImagePipelineOutput):
    """``images``, and ``bridge``: the :class:`BridgeReport` of a call with references."""

    bridge: BridgeReport | None = None


def noise_level(scheduler, timestep: torch.Tensor) -> NoiseLevel:
    """
    α and σ of a scheduler's sample ``x = α x_0 + σ ε`` at one of its timesteps, in its own coordinates.

    Read from ``add_noise``, the one thing that all schedulers agree on.
    """
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64, device=timestep.device)
    zero, at = torch.zeros_like(one), timestep.reshape(1)
    return NoiseLevel(scheduler.add_noise(one, zero, at).item(), scheduler.add_noise(zero, one, at).item())


class BridgeRun:
    """
    The bridge of one call: groups of samples that are coupled together, each with references of its own weights.

    Args:
        config: a :class:`~atlas_diffusers.config.BridgeConfig`.
        groups: indices of the samples of each group, ``(n,)`` each.
        solvers: one a group.
        scheduler: converts data predictions to its own prediction type.

    Raises:
        ValueError: for a scheduler whose prediction type is none of ours.
    """

    def __init__(self, config, groups: list[torch.Tensor], solvers: list[SchrodingerBridgeSolver], scheduler):
        self.config, self.groups, self.solvers, self.scheduler = config, groups, solvers, scheduler
        self.prediction_type = scheduler.config.get("prediction_type", "epsilon")
        check_prediction_type(self.prediction_type)
        if any(len(rows) == 1 for rows in groups):
            logger.warning("a group of one sample: the bridge has nothing to balance, its projection is the posterior mean")
        self.states = [BridgeState() for _ in groups]
        self.open, self._shut_from = [True] * len(groups), None
        self.report = BridgeReport(gate_log_snr=[None] * len(groups), effective_references=[[] for _ in groups])

    def timesteps(self, network_steps: int) -> list[int]:
        """
        ``config.steps`` timesteps above the gate, then ``network_steps`` from the gate on, each part evenly spaced.

        The gate is where a sample of the references themselves would have ``config.gate`` effective references, in the first
        of all groups.
        """
        levels = copy.deepcopy(self.scheduler)
        levels.set_timesteps(LEVELS)
        first, low, high = levels.timesteps[0].item(), 0, len(levels.timesteps) - 1
        while low < high:
            middle = (low + high) // 2
            level = noise_level(levels, levels.timesteps[middle])
            shut = min(solver.posterior_size(*level) for solver in self.solvers) < self.config.gate
            low, high = (low, middle) if shut else (middle + 1, high)
        self._shut_from = gate = levels.timesteps[low].item()
        above = [first + (gate - first) * step / self.config.steps for step in range(self.config.steps)]
        below = [gate * (1 - step / network_steps) for step in range(network_steps)]
        return list(dict.fromkeys(round(t) for t in above + below))

    def couplings(self, latents: torch.Tensor, timestep: torch.Tensor) -> dict[int, torch.Tensor]:
        """Couplings of the groups whose gate is open, by group; closes gates for good."""
        if not any(self.open):
            return {}
        self.level, found = noise_level(self.scheduler, timestep), {}
        for index, (rows, solver) in enumerate(zip(self.groups, self.solvers)):
            if not self.open[index]:
                continue
            coupling = solver.couple(latents[rows], *self.level, self.states[index])
            self.states[index] = coupling.state
            self.report.kernel_applications += coupling.kernel_applications
            spread = coupling.median_effective_references
            self.report.effective_references[index].append(spread)
            self.open[index] = spread >= self.config.gate and (self._shut_from is None or timestep > self._shut_from)
            if self.open[index]:
                found[index] = coupling
            else:
                self.report.gate_log_snr[index] = self.level.log_snr
        return found

    def network_rows(self, batch: int, couplings: dict, device) -> torch.Tensor:
        """Indices of the samples that need the network at this step, and the count of calls."""
        replaced = set()
        if self.config.mode == "replace":
            replaced = {row for index in couplings for row in self.groups[index].tolist()}
        self.report.network_calls += 1 - len(replaced) / batch
        self.report.network_calls_saved += len(replaced) / batch
        return torch.tensor([row for row in range(batch) if row not in replaced], dtype=torch.long, device=device)

    def apply(self, prediction: torch.Tensor, latents: torch.Tensor, couplings: dict) -> torch.Tensor:
        """The prediction of every sample, replaced or corrected where there is a coupling."""
        for index, coupling in couplings.items():
            rows, data = self.groups[index], coupling.data
            x = latents[rows]
            if self.config.mode == "correct":
                a, b = data_coefficients(self.prediction_type, *self.level)
                data = coupling.correct(a * x + b * prediction[rows], self.config.strength)
            on_noise, on_data = output_coefficients(self.prediction_type, *self.level)
            noise = (x - self.level.alpha * data) / self.level.sigma
            prediction[rows] = (on_noise * noise + on_data * data).to(prediction.dtype)
        return prediction

    def finish(self, latents: torch.Tensor) -> BridgeReport:
        """The report, with the distances of the finished samples to their references."""
        nearest = torch.empty(len(latents), dtype=torch.float32, device=latents.device)
        for rows, solver in zip(self.groups, self.solvers):
            nearest[rows] = solver.nearest_reference(latents[rows]).to(nearest)
        self.report.nearest_reference = nearest
        return self.report
