"""References past memory: safetensors files, read in blocks."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
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

    Raises:
        ValueError: for no file, a file without the tensor, shapes or dtypes that differ, and values that are NaN or infinite.
    """

    def __init__(self, files: Sequence[str | Path], name: str = "references"):
        if not files:
            raise ValueError("expected at least one safetensors file")
        self._name, self._files, self.device = name, [Path(file) for file in files], torch.device("cpu")
        found = [self._describe(file) for file in self._files]
        if len({(shape, dtype) for _, shape, dtype in found}) != 1 or found[0][2] not in (torch.float32, torch.float64):
            listed = ", ".join(f"{file.name}: {dtype} {shape}" for file, (_, shape, dtype) in zip(self._files, found))
            raise ValueError(f"references must have one shape and dtype, float32 or float64; got {listed}")
        self._counts = [count for count, *_ in found]
        self.shape = (sum(self._counts), *found[0][1])
        self.dtype = found[0][2]
        total = torch.zeros(self.shape[1:], dtype=torch.float64).flatten()
        for _, block in self._blocks():
            if not bool(block.isfinite().all()):
                raise ValueError(f"references contain {int((~block.isfinite()).sum())} values that are NaN or infinite")
            total += block.sum(0, dtype=torch.float64)
        self._centre = (total / len(self)).to(self.dtype)
        self._norms = torch.cat([(block - self._centre).square().sum(1) for _, block in self._blocks()])

    def _describe(self, file: Path) -> tuple[int, tuple[int, ...], torch.dtype]:
        with safe_open(file, framework="pt") as stored:
            if self._name not in (names := list(stored.keys())):
                raise ValueError(f"{file} has tensors {names}; expected `{self._name}`")
            rows = stored.get_slice(self._name)
            count, *shape = rows.get_shape()
            return count, tuple(shape), rows[:1].dtype

    def _blocks(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Ranges of references, and these, (rows, d)."""
        start = 0
        for file, count in zip(self._files, self._counts):
            with safe_open(file, framework="pt") as stored:
                rows = stored.get_slice(self._name)
                step = max(1, BLOCK_BYTES // (rows[:1].numel() * self.dtype.itemsize))
                for first in range(0, count, step):
                    block = rows[first : first + step].flatten(1)
                    yield slice(start + first, start + first + len(block)), block
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
        return found

    def _squared_distances(self, x: torch.Tensor) -> torch.Tensor:
        """(n, m), in the dtype of the references."""
        centred = x - self._centre
        distances = torch.empty(len(x), len(self), dtype=self.dtype)
        for columns, block in self._blocks():
            distances[:, columns] = centred @ (block - self._centre).mT
        distances.mul_(-2).add_(centred.square().sum(1)[:, None]).add_(self._norms)
        return distances.clamp_(min=0)

    def transport(self, x: torch.Tensor, epsilon: float, max_bytes: int, **options: Any) -> SinkhornOutput:
        return entropic_transport(cost=self._squared_distances(x), epsilon=epsilon, max_bytes=max_bytes, **options)

    def cost(self, x: torch.Tensor, epsilon: float, max_bytes: int) -> MatrixCost:
        width = torch.tensor([epsilon], dtype=torch.float64)
        return MatrixCost(self._squared_distances(x)[None], width, max_bytes=max_bytes)

    def average(self, cost: SplitCost, psi: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        none = torch.zeros(cost.shape[:2], dtype=psi.dtype), psi.new_zeros(1, len(self))
        weights, sizes = zip(*cost.each(lambda exponents, rows: shares(exponents, psi), *none))
        rows = torch.cat(weights, 1).to(self.dtype)
        means = torch.zeros(*rows.shape[:2], self._centre.numel(), dtype=self.dtype)
        for columns, block in self._blocks():
            means += rows[..., columns] @ (block - self._centre)
        return means + self._centre, torch.cat(sizes, 1)

    def nearest(self, x: torch.Tensor) -> torch.Tensor:
        distances = [PairDistances(x, block).rows(0, len(x)).amin(1) for _, block in self._blocks()]
        return torch.stack(distances).amin(0).sqrt()
