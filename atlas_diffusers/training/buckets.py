"""Pictures of their own shape: sizes of about equal area, and batches of one size."""

import math
from collections.abc import Iterator
from itertools import count

import numpy as np
from torch.utils.data import Sampler

from .order import SEED_STRIDE, permutation

LONGEST = 2.0
GOLDEN = (math.sqrt(5) - 1) / 2


def bucket_sizes(resolution: int, multiple: int) -> list[tuple[int, int]]:
    """
    Heights and widths that ``multiple`` divides, of at most ``resolution``² pixels, one at most twice the other: for each width
    the largest height, and the reverse.
    """
    sides = range(multiple, int(resolution * math.sqrt(LONGEST)) + 1, multiple)
    pairs = {(side, resolution**2 // side // multiple * multiple) for side in sides}
    pairs |= {(width, height) for height, width in pairs}
    return sorted((h, w) for h, w in pairs if min(h, w) > 0 and max(h, w) <= LONGEST * min(h, w))


def nearest_size(width: int, height: int, sizes: list[tuple[int, int]]) -> tuple[int, int]:
    """The size whose ratio of sides is nearest; of equal ratios the largest."""
    return min(sizes, key=lambda size: (abs(math.log(size[0] * width / (size[1] * height))), -size[0]))


class BucketSampler(Sampler):
    """
    Endless batches of ``(index, draw)``, each of one bucket, starting at batch ``start``.

    Batch k is of the bucket in which ``(u + k·(√5 − 1)/2) mod 1`` falls, u from the seed, on an axis where a bucket has the
    share of its pictures: over many batches each picture is seen equally often, and k alone says how far every bucket is. In
    a bucket the batches are those of :class:`~.order.StepSampler`: passes laid end to end, each in an order of its own.

    Args:
        buckets: indices of the pictures of each.
        batch_size, seed, start, rank, world: as of ``StepSampler``.
    """

    def __init__(self, buckets: list[list[int]], batch_size: int, seed: int, start: int = 0, rank: int = 0, world: int = 1):
        self.buckets, self.batch_size, self.seed, self.start = buckets, batch_size, seed, start
        self.rank, self.share = rank, batch_size // world
        self._orders: dict[int, tuple[int, list[int]]] = {}
        self.ends = np.cumsum([len(bucket) for bucket in buckets]) / sum(len(bucket) for bucket in buckets)

    def bucket_of(self, numbers: np.ndarray) -> np.ndarray:
        """The bucket of each batch."""
        offset = np.random.default_rng(self.seed).random()
        places = np.searchsorted(self.ends, (offset + numbers * GOLDEN) % 1, side="right")
        return np.minimum(places, len(self.buckets) - 1)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        done = np.bincount(self.bucket_of(np.arange(self.start)), minlength=len(self.buckets)).tolist()
        for number in count(self.start):
            chosen = int(self.bucket_of(np.array([number]))[0])
            first = self.rank * self.share
            places = range(done[chosen] * self.batch_size + first, done[chosen] * self.batch_size + first + self.share)
            done[chosen] += 1
            draw = self.seed * SEED_STRIDE + number * self.batch_size + first
            yield [(self._picture(chosen, place), draw + i) for i, place in enumerate(places)]

    def _picture(self, bucket: int, place: int) -> int:
        pictures = self.buckets[bucket]
        epoch, offset = divmod(place, len(pictures))
        if self._orders.get(bucket, (None,))[0] != epoch:
            seed = ((self.seed * SEED_STRIDE + epoch) * SEED_STRIDE + bucket) % 2**63
            self._orders[bucket] = epoch, permutation(len(pictures), seed)
        return pictures[self._orders[bucket][1][offset]]
