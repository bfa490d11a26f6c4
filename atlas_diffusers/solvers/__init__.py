"""
Solvers on top of kernels and schedules.

Entropic optimal transport, in one convention: ``P_ij = a_i b_j exp((f_i + g_j − C_ij)/ε)`` with potentials f, g in the unit of
the cost C, which is the squared distance (no ½) between points.
"""

from .dynamic_bridge import DynamicBridge
from .hierarchical import AdvancedHierarchicalDiffusionSampler
from .potentials import extrapolate_potentials
from .resolution import lift, split_steps
from .schrodinger_bridge import BridgeCoupling, BridgeState, SchrodingerBridgeSolver
from .sinkhorn import entropic_transport, sinkhorn
from .sinkhorn_output import SinkhornOutput
from .transport_maps import RichardsonMap, debiased_map, richardson_map, sinkhorn_divergence

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
