"""The bridge of a call: references weighted for its prompts, and the steps that the bridge takes."""

from dataclasses import dataclass
from typing import Any

import torch

from ..bridges import GatedBridge, SchrodingerBridgeSolver
from ..conditioning import tokenize
from ..config import BridgeConfig
from ..config.reading import validate
from ..denoising import ReferenceCoupling, SchedulerProcess, bridge_timesteps, gate_timestep
from .base import AtlasPipelineBase
from .prompts import Prompts
from .references import read_references


def _caption_weights(
    tokenizer: Any, text_encoder: Any, captions: list[str], prompts: list[str], temperature: float
) -> torch.Tensor:
    """Softmax over references of cos(caption, prompt)/temperature in the text encoder's pooled states, ``(prompts, m)``."""

    def pooled(texts: list[str]) -> torch.Tensor:
        ids = tokenize(tokenizer, texts).to(text_encoder.device)
        states = text_encoder(ids).pooler_output
        return torch.nn.functional.normalize(states.to(torch.promote_types(states.dtype, torch.float32)), dim=-1)

    known = torch.cat([pooled(captions[i : i + 256]) for i in range(0, len(captions), 256)])
    return (pooled(prompts) @ known.T / temperature).softmax(-1)


@dataclass
class BridgePlan:
    """
    The bridge of a call, before its steps are chosen.

    Args:
        config: the call's options.
        groups: indices of the samples that are coupled together, ``(n,)`` each.
        solvers: one a group.
        gate_timestep: where bridge steps of their own end; ``None`` without such steps.
    """

    config: BridgeConfig
    groups: list[torch.Tensor]
    solvers: list[SchrodingerBridgeSolver]
    gate_timestep: int | None = None

    def choose_timesteps(self, scheduler: object, bridge_steps: int, network_steps: int) -> list[int]:
        """``bridge_steps`` timesteps above the gate, then those of the network."""
        first, gate = gate_timestep(scheduler, self.solvers, self.config.gate)
        self.gate_timestep = round(gate)
        return bridge_timesteps(first, gate, bridge_steps, network_steps)

    def coupling(self, process: SchedulerProcess, timesteps: torch.Tensor) -> ReferenceCoupling:
        """The coupling of the call whose steps these are."""
        until = 0.0
        if self.gate_timestep is not None:
            until = process.level(timesteps[timesteps <= self.gate_timestep][0]).sigma_hat
        bridges = [GatedBridge(solver, self.config.gate, until) for solver in self.solvers]
        strength = self.config.strength if self.config.mode == "correct" else None
        return ReferenceCoupling(self.groups, bridges, strength)


def plan_bridge(
    pipeline: AtlasPipelineBase,
    references: object,
    weights: torch.Tensor | None,
    bridge: BridgeConfig | dict | None,
    prompts: Prompts,
    height: int,
    width: int,
) -> BridgePlan | None:
    """The bridge of a call, samples of one prompt in one group; ``None`` for a call that has none."""
    if references is None and bridge is None:
        if weights is not None:
            raise ValueError("reference_weights were given without references")
        return None
    stored = pipeline.references
    if references is None and stored is None:
        raise ValueError("bridge was given, but neither the call nor the pipeline has references")
    channels = pipeline.unet.config.in_channels, pipeline.unet.config.out_channels
    if channels[0] != channels[1]:
        raise ValueError(f"the bridge needs a network with as many channels out as in, got {channels[1]} and {channels[0]}")
    config = bridge if isinstance(bridge, BridgeConfig) else validate(BridgeConfig, dict(bridge or {}))
    found = read_references(pipeline, stored if references is None else references, weights, height, width)
    values = found.values
    if isinstance(values, torch.Tensor):
        values = values.to(torch.promote_types(pipeline.unet.dtype, torch.float32))
    values = values.to(pipeline._execution_device)
    options = {name: getattr(config, name) for name in ("epsilon", "rho", "tolerance", "max_iterations", "solver_type")}
    if prompts.prompt is None or found.captions is None or pipeline.text_encoder is None:
        config.refuse(["caption_temperature"], "without captions of the references, a prompt and a text encoder")
        solver = SchrodingerBridgeSolver(values, found.weights, **options)
        return BridgePlan(config, [torch.arange(prompts.batch, device=values.device)], [solver])
    texts = [prompts.prompt] if isinstance(prompts.prompt, str) else prompts.prompt
    unique = list(dict.fromkeys(texts))
    similar = _caption_weights(pipeline.tokenizer, pipeline.text_encoder, found.captions, unique, config.caption_temperature)
    base = 1.0 if found.weights is None else found.weights.to(similar)
    solvers = [SchrodingerBridgeSolver(values, row * base, **options) for row in similar]
    of_sample = torch.tensor([unique.index(text) for text in texts], device=values.device)
    of_sample = of_sample.repeat_interleave(prompts.copies)
    return BridgePlan(config, [(of_sample == index).nonzero()[:, 0] for index in range(len(unique))], solvers)
