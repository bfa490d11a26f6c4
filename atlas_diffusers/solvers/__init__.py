"""The original toolkit's import path: names of ``transport``, ``bridges``, ``denoising``, ``originals``."""

from ..bridges import BridgeCoupling, BridgeState, DynamicBridge, SchrodingerBridgeSolver
from ..denoising import lift, split_steps
from ..originals import AdvancedHierarchicalDiffusionSampler
from ..transport import (
    RichardsonMap,
    SinkhornOutput,
    debiased_map,
    entropic_transport,
    extrapolate_potentials,
    richardson_map,
    sinkhorn,
    sinkhorn_divergence,
)

__all__ = [
    "AdvancedHierarchicalDiffusionSampler",
    "BridgeCoupling",
    "BridgeState",
    "DynamicBridge",
    "RichardsonMap",
    "SchrodingerBridgeSolver",
    "SinkhornOutput",
    "debiased_map",
    "entropic_transport",
    "extrapolate_potentials",
    "lift",
    "richardson_map",
    "sinkhorn",
    "sinkhorn_divergence",
    "split_steps",
]
