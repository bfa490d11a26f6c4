"""Where a few network calls are best spent along a teacher's trajectories."""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from .teacher import Trajectories

STRIDES = (8, 4, 2, 1)
STARTS = ((1.0, -2.0), (2.5, -2.6))  # log σ̂ of the first and the last node


class Placement:
    """
    Nodes by coordinate descent on teacher-forced residuals: what is left of a teacher's state at the next node after a
    ridge regression on its states and velocities at all nodes so far. One Gram matrix, no network calls.

    Args:
        teacher: the trajectories.
        from_top: whether the first node must be the noisiest.
    """

    def __init__(self, teacher: Trajectories, from_top: bool = False):
        self.size, self.from_top = len(teacher.sigmas), from_top
        rows = torch.cat((teacher.states, teacher.velocities, teacher.ends[None])).flatten(1).double()
        self.gram = (rows @ rows.mT / rows.shape[1]).cpu().numpy()
        self._residuals: dict[tuple, float] = {}
        self.logs = [math.log(sigma) for sigma in teacher.sigmas]

    def residual(self, nodes: tuple[int, ...], target: int, ridge: float) -> float:
        """Root mean square at ``target`` (the end for ``size``), from the nodes so far."""
        key = nodes, target, ridge
        if key not in self._residuals:
            self._residuals[key] = self._residual(*key)
        return self._residuals[key]

    def _residual(self, nodes: tuple[int, ...], target: int, ridge: float) -> float:
        gram, size, last = self.gram, self.size, nodes[-1]
        target = 2 * size if target == size else target
        known = [last, *(size + node for node in nodes)]
        wanted = gram[known, target] - gram[known, last]
        square = gram[target, target] - 2 * gram[target, last] + gram[last, last]
        matrix = gram[np.ix_(known, known)]
        norms = np.sqrt(matrix.diagonal()).clip(1e-30)
        matrix, wanted = matrix / norms / norms[:, None], wanted / norms
        found = np.linalg.solve(matrix + ridge * np.eye(len(known)), wanted)
        left = square - 2 * found @ wanted + found @ matrix @ found + ridge * found @ found
        return math.sqrt(max(left, 1e-14))

    def skipped(self, node: int) -> float:
        """Residual of a start at ``node`` by a scalar multiple of the start noise."""
        gram = self.gram
        return math.sqrt(max(gram[node, node] - gram[0, node] ** 2 / gram[0, 0], 0.0))

    def loss(self, nodes: list[int], weight: float, ridge: float) -> float:
        """Of the start and the end, and ``weight`` times those between."""
        inner = [self.residual(tuple(nodes[: n + 1]), nodes[n + 1], ridge) for n in range(len(nodes) - 1)]
        return self.skipped(nodes[0]) + weight * sum(inner) + self.residual(tuple(nodes), self.size, ridge)

    def start(self, count: int, high: float, low: float) -> list[int]:
        """Nodes even in log σ̂ between two ends."""
        high, low = min(high, self.logs[0]), max(low, self.logs[-1])
        wanted = [high + (low - high) * k / (count - 1) for k in range(count)]
        nodes = [min(range(self.size), key=lambda i: abs(self.logs[i] - value)) for value in wanted]
        nodes[0] *= not self.from_top
        for k in range(1, count):
            nodes[k] = max(nodes[k], nodes[k - 1] + 1)
        return [min(node, self.size - count + k) for k, node in enumerate(nodes)]

    def place(self, count: int, weight: float, ridge: float) -> list[int]:
        """The best of descents from two starts."""
        found = [self._descend(self.start(count, *ends), weight, ridge) for ends in STARTS]
        return min(found)[1]

    def _descend(self, nodes: list[int], weight: float, ridge: float) -> tuple[float, list[int]]:
        best = self.loss(nodes, weight, ridge)
        for stride in STRIDES:
            moved = True
            while moved:
                moved = False
                for candidate in self._neighbours(nodes, stride):
                    value = self.loss(candidate, weight, ridge)
                    if value < best * (1 - 1e-6):
                        best, nodes, moved = value, candidate, True
                        break
        return best, nodes

    def _neighbours(self, nodes: list[int], stride: int) -> Iterator[list[int]]:
        """One node moved, or all from one on."""
        for k in range(len(nodes)):
            for step in (-stride, stride):
                for end in (k + 1, len(nodes)):
                    moved = self.moved(nodes, slice(k, end), step)
                    if moved is not None:
                        yield moved

    @staticmethod
    def moves(count: int) -> Iterator[tuple[slice, int]]:
        """Node and step of local moves, from coarse to fine, first those of the last and the first node."""
        for stride in (4, 2, 1):
            for node in (count - 1, 0, *range(1, count - 1)):
                yield slice(node, node + 1), stride
                yield slice(node, node + 1), -stride

    def moved(self, nodes: Sequence[int], which: slice, step: int) -> list[int] | None:
        """Nodes with some of them moved, if they stay in order."""
        moved = list(nodes)
        moved[which] = [node + step for node in moved[which]]
        inside = 0 <= moved[0] <= (0 if self.from_top else self.size) and moved[-1] < self.size
        return moved if inside and all(a < b for a, b in zip(moved, moved[1:])) else None
