"""Measures of what a pipeline generates."""

from .energy import energy_distance
from .features import efficientnet_features
from .kid import KernelDistance, kid
from .manifold import ManifoldOverlap, manifold_overlap
from .nearest import nearest_neighbours
from .retrieval import Retrieval, measure_retrieval

__all__ = [
    "KernelDistance",
    "ManifoldOverlap",
    "Retrieval",
    "efficientnet_features",
    "energy_distance",
    "kid",
    "manifold_overlap",
    "measure_retrieval",
    "nearest_neighbours",
]
