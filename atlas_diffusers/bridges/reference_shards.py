"""References past memory: safetensors files, read in blocks."""

import copy
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open

from ..kernels.distances import PairDistances
from ..transport import SinkhornOutput, entropic_transport
from ..transport.split_costs import MatrixCost, SplitCost
from .references import ReferenceSet, shares

BLOCK_BYTES = 2**26


class ReferenceShards(ReferenceSet):
    """
    References in safetensors files, whose tensors of one name, (m_k, ...), are one set in the order of the files.

    Files are mapped and read in blocks: once when this is made, for the mean and the norms, and twice a coupling, for the
    squared distances (n, m) and for the projections. Memory holds a few matrices (n, m), and not the references.

    Args:
        files: of equal points, float32 or float64.
        name: of the tensor.
        device: that blocks are moved to and computed on.
        split: each process of `torch.distributed` reads a share of the blocks; all must hold the same particles and couple
            them together, and all get the result of one.
        prune: leave out references of the smallest weights, of at most this mass together, and do not read blocks of only
            such: projections are then off by at most ``prune`` times the diameter of the references.

    Raises:
        ValueError: for no file, a file without the tensor, shapes or dtypes that differ, values that are NaN or infinite, and
            ``prune`` outside [0, 1).
    """

    def __init__(
        self,
        files: Sequence[str | Path],
        name: str = "references",
        device: torch.device | str = "cpu",
        split: bool = False,
        prune: float = 0.0,
    ):
        if not files:
            raise ValueError("expected at least one safetensors file")
        if not 0 <= prune < 1:
            raise ValueError(f"prune={prune} must be in [0, 1)")
        self._name, self._files, self.device = name, [Path(file) for file in files], torch.device(device)
        self._split, self._prune = split, prune
        found = [self._describe(file) for file in self._files]
        if len({(shape, dtype) for _, shape, dtype in found}) != 1 or found[0][2] not in (torch.float32, torch.float64):
            listed = ", ".join(f"{file.name}: {dtype} {shape}" for file, (_, shape, dtype) in zip(self._files, found))
            raise ValueError(f"references must have one shape and dtype, float32 or float64; got {listed}")
        self._counts = [count for count, *_ in found]
        self.shape = (sum(self._counts), *found[0][1])
        self.dtype = found[0][2]
        # of every column, and how many values are not finite
        total = torch.zeros(math.prod(self.shape[1:]) + 1, dtype=torch.float64, device=self.device)
        for _, block in self._blocks():
            total[:-1] += block.sum(0, dtype=torch.float64)
            total[-1] += (~block.isfinite()).sum()
        total = self._over_processes(total)
        if wrong := int(total[-1]):
            raise ValueError(f"references contain {wrong} values that are NaN or infinite")
        self._centre = (total[:-1] / len(self)).to(self.dtype)
        self._norms = torch.zeros(len(self), dtype=self.dtype, device=self.device)
        for columns, block in self._blocks():
            self._norms[columns] = (block - self._centre).square().sum(1)
        self._norms = self._over_processes(self._norms)

    def to(self, device: torch.device | str) -> "ReferenceShards":
        """The same references, computed with on another device."""
        moved = copy.copy(self)
        moved.device = torch.device(device)
        moved._centre, moved._norms = self._centre.to(device), self._norms.to(device)
        return moved

    def _over_processes(self, tensor: torch.Tensor, operation: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> torch.Tensor:
        """What the processes have of a sum, or of another reduction, put together."""
        if self._split:
            dist.all_reduce(tensor, op=operation)
        return tensor

    def _describe(self, file: Path) -> tuple[int, tuple[int, ...], torch.dtype]:
        with safe_open(file, framework="pt") as stored:
            if self._name not in (names := list(stored.keys())):
                raise ValueError(f"{file} has tensors {names}; expected `{self._name}`")
            rows = stored.get_slice(self._name)
            count, *shape = rows.get_shape()
            return count, tuple(shape), rows[:1].dtype

    def _blocks(self, used: torch.Tensor | None = None) -> Iterator[tuple[slice, torch.Tensor]]:
        """Ranges of references, and these, (rows, d): this process's, and of those only blocks that hold a used one, (m,)."""
        start, number = 0, 0
        rank, world = (dist.get_rank(), dist.get_world_size()) if self._split else (0, 1)
        for file, count in zip(self._files, self._counts):
            with safe_open(file, framework="pt") as stored:
                rows = stored.get_slice(self._name)
                step = max(1, BLOCK_BYTES // (rows[:1].numel() * self.dtype.itemsize))
                for first in range(0, count, step):
                    columns, number = slice(start + first, start + min(first + step, count)), number + 1
                    if number % world == rank and (used is None or bool(used[columns].any())):
                        yield columns, rows[first : first + step].flatten(1).to(self.device)
            start += count

    def take(self, indices: torch.Tensor) -> torch.Tensor:
        found = torch.empty(len(indices), self._centre.numel(), dtype=self.dtype)
        start = 0
        for file, count in zip(self._files, self._counts):
            with safe_open(file, framework="pt") as stored:
                rows = stored.get_slice(self._name)
                for place in ((indices >= start) & (indices < start + count)).nonzero()[:, 0].tolist():
                    row = int(indices[place]) - start
                    found[place] = rows[row : row + 1].flatten()
            start += count
        return found.to(self.device)

    def _squared_distances(self, x: torch.Tensor) -> torch.Tensor:
        """(n, m), in the dtype of the references."""
        centred = x - self._centre
        distances = torch.zeros(len(x), len(self), dtype=self.dtype, device=self.device)
        for columns, block in self._blocks():
            distances[:, columns] = centred @ (block - self._centre).mT
        distances = self._over_processes(distances)
        distances.mul_(-2).add_(centred.square().sum(1)[:, None]).add_(self._norms)
        return distances.clamp_(min=0)

    def transport(self, x: torch.Tensor, epsilon: float, max_bytes: int, **options: Any) -> SinkhornOutput:
        return entropic_transport(cost=self._squared_distances(x), epsilon=epsilon, max_bytes=max_bytes, **options)

    def cost(self, x: torch.Tensor, epsilon: float, max_bytes: int) -> MatrixCost:
        width = torch.tensor([epsilon], dtype=torch.float64, device=self.device)
        return MatrixCost(self._squared_distances(x)[None], width, max_bytes=max_bytes)

    def average(self, cost: SplitCost, psi: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        none = torch.zeros(cost.shape[:2], dtype=psi.dtype, device=psi.device), psi.new_zeros(1, len(self))
        weights, sizes = zip(*cost.each(lambda exponents, rows: shares(exponents, psi), *none))
        rows, used = torch.cat(weights, 1).to(self.dtype), None
        if self._prune:
            # what is below an even share of the mass sums to less than it
            rows = rows.where(rows >= self._prune / len(self), 0)
            rows, used = rows / rows.sum(-1, keepdim=True), rows.flatten(0, 1).any(0)
        means = torch.zeros(*rows.shape[:2], self._centre.numel(), dtype=self.dtype, device=self.device)
        for columns, block in self._blocks(used):
            means += rows[..., columns] @ (block - self._centre)
        return self._over_processes(means) + self._centre, torch.cat(sizes, 1)

    def nearest(self, x: torch.Tensor) -> torch.Tensor:
        found = torch.full((len(x),), math.inf, dtype=self.dtype, device=self.device)
        for _, block in self._blocks():
            found = torch.minimum(found, PairDistances(x, block).rows(0, len(x)).amin(1))
        return self._over_processes(found, dist.ReduceOp.MIN).sqrt()
