"""
Entropic optimal transport between points, and through kernel operators.

One convention: ``P_ij = a_i b_j exp((f_i + g_j − C_ij)/ε)`` with potentials f, g in the unit of the cost C, which is the
squared distance (no ½) between points.
"""

from .hierarchical import pair_one_to_one
from .potentials import extrapolate_potentials
from .sinkhorn import entropic_transport, sinkhorn
from .sinkhorn_output import SinkhornOutput
from .transport_maps import RichardsonMap, debiased_map, richardson_map, sinkhorn_divergence

__all__ = [
    "RichardsonMap",
    "SinkhornOutput",
    "debiased_map",
    "entropic_transport",
    "extrapolate_potentials",
    "pair_one_to_one",
    "richardson_map",
    "sinkhorn",
    "sinkhorn_divergence",
]
