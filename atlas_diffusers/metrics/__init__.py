"""Measures of what a pipeline generates."""

from .nearest import nearest_neighbours
from .retrieval import Retrieval, measure_retrieval

__all__ = ["Retrieval", "measure_retrieval", "nearest_neighbours"]
