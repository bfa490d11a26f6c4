"""Which pictures a batch has: an order that depends only on the seed and the number of the batch."""

import copy
from collections import deque
from collections.abc import Iterator
from itertools import count, islice
from typing import Any

import torch
from torch.utils.data import Sampler

from ..config import DatasetConfig
from ..image_files import decode
from .sources import rows_of

SEED_STRIDE = 1_000_003


class StepSampler(Sampler):
    """
    Endless shuffled passes over ``length`` items as lists of ``(index, draw)``, starting at batch ``start``.

    Batch k holds positions k·batch_size onwards of the passes laid end to end; each pass has its own permutation. Of
    ``world`` processes each gets its contiguous share of every batch, ``batch_size / world`` items.
    """

    def __init__(self, length: int, batch_size: int, seed: int, start: int = 0, rank: int = 0, world: int = 1):
        self.length, self.batch_size, self.seed, self.start = length, batch_size, seed, start
        self.rank, self.share = rank, batch_size // world

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order, current = [], -1
        for number in count(self.start):
            first, batch = number * self.batch_size + self.rank * self.share, []
            for place in range(first, first + self.share):
                epoch, offset = divmod(place, self.length)
                if epoch != current:
                    order, current = permutation(self.length, self.seed * SEED_STRIDE + epoch), epoch
                batch.append((order[offset], self.seed * SEED_STRIDE + place))
            yield batch


class StreamSampler(Sampler):
    """
    Endless passes over one process's part of a stream as lists of ``(row, draw)``, starting at batch ``start``.

    Files come in an order of the seed and the pass, dealt to the processes where their number divides that of the files, and
    row by row in turn otherwise. Rows are read and shuffled a block at a time. A block depends on where the stream stood when
    it began, which :meth:`state` gives, so a run that resumes reads at most one block again.

    Args:
        data: a ``datasets.IterableDataset``.
        config: of the data; ``shuffle_buffer`` is the length of a block.
        batch_size, rank, world: rows of a batch over all processes, of which this one gets ``batch_size / world``.
        seed, start: of the run.
        state: what :meth:`state` gave for batch ``start``; not needed for 0.

    Raises:
        ValueError: if the stream is empty.
    """

    def __init__(
        self,
        data: Any,
        config: DatasetConfig,
        batch_size: int,
        seed: int,
        start: int = 0,
        rank: int = 0,
        world: int = 1,
        state: Any = None,
    ):
        from datasets.distributed import split_dataset_by_node

        self.data = split_dataset_by_node(data, rank, world) if world > 1 else data
        self.config, self.batch_size, self.seed, self.start = config, batch_size, seed, start
        self.rank, self.share = rank, batch_size // world
        begin = {"place": 0, "epoch": 0, "block": 0, "stream": None, "skipped": 0, "files": "shuffled"}
        self.blocks = deque([state or begin])
        self.skipped = self.blocks[0].get("skipped", 0)

    def state(self, batch: int) -> dict:
        """Where the stream stood when the block that batch number ``batch`` begins in was read; JSON numbers and texts."""
        while len(self.blocks) > 1 and self.blocks[1]["place"] <= batch * self.share:
            self.blocks.popleft()
        return self.blocks[0]

    def __iter__(self) -> Iterator[list[tuple[dict, int]]]:
        rows = islice(self._rows(), self.start * self.share - self.blocks[0]["place"], None)
        for number in count(self.start):
            first = self.seed * SEED_STRIDE + number * self.batch_size + self.rank * self.share
            yield [(next(rows), first + i) for i in range(self.share)]

    def _rows(self) -> Iterator[dict]:
        mark = dict(self.blocks[0])
        while True:
            data = copy.deepcopy(self.data)
            if "files" in mark:  # checkpoints from before have files in the order of the source
                data.set_epoch(1 + (self.seed * SEED_STRIDE + mark["epoch"]) % 2**31)
            if mark["stream"] is not None:
                data.load_state_dict(mark["stream"])
            source, begun = self._readable(rows_of(data, self.config)), mark["place"]
            while block := list(islice(source, self.config.shuffle_buffer)):
                generator = (self.seed * SEED_STRIDE + mark["epoch"]) * SEED_STRIDE + mark["block"]
                for index in permutation(len(block), generator % 2**63):
                    yield block[index]
                read = {"place": mark["place"] + len(block), "block": mark["block"] + 1, "skipped": self.skipped}
                mark = mark | read | {"stream": data.state_dict()}
                self.blocks.append(mark)
            if mark["place"] == begun and mark["block"] == 0:
                raise ValueError(f"dataset {self.config.name!r}: process {self.rank} finds no pictures in the stream")
            mark = mark | {"epoch": mark["epoch"] + 1, "block": 0, "stream": None}
            self.blocks.append(mark)

    def _readable(self, rows: Iterator[dict]) -> Iterator[dict]:
        """All rows, or with ``skip_bad_images`` those whose picture can be read."""
        for row in rows:
            if self.config.skip_bad_images:
                try:
                    decode(row[self.config.image_column])
                except OSError:
                    self.skipped += 1
                    continue
            yield row


def permutation(length: int, seed: int) -> list[int]:
    """The order of a pass over ``length`` items."""
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed)).tolist()
