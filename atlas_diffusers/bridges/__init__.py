"""Schrödinger bridges: between the particles being sampled and references, and between two data sets."""

from .dynamic_bridge import DynamicBridge
from .gate import GatedBridge
from .mixture_bridge import MixtureBridge
from .reference_shards import ReferenceShards
from .schrodinger_bridge import BridgeCoupling, BridgeState, SchrodingerBridgeSolver

__all__ = [
    "BridgeCoupling",
    "BridgeState",
    "DynamicBridge",
    "GatedBridge",
    "MixtureBridge",
    "ReferenceShards",
    "SchrodingerBridgeSolver",
]
