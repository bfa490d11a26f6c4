"""Optimal transport of Gaussian noise to a whole data set, fitted once and asked for every batch."""

import math
import zlib
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.data import Sampler

from ..config import TrainingConfig
from ..pipelines.latents import normalise_latents
from .data import Annotated, PictureDataset
from .fingerprints import data_fingerprint, fingerprint
from .processes import in_shares, place, together

NOISE_SEED = 0x5DEECE66D  # what tells the noise of a picture from its other random numbers
SAMPLES_OF_POINT, LARGEST_BATCH, FIRST_STEP, STEADY, LARGEST_EXCESS = 400, 4096, 0.5, 10, 5.0
BLOCK = 16_384  # points that a batch is compared with at a time
CAPTION_WIDTH = 128


class SemidiscreteCoupling:
    r"""
    Which of N points each noise goes to: of those that split the noise into N parts of equal mass, the map of least
    ``E |x − y|²``, or greatest ``E x·y``, has one potential a point,

        j(x, i) = argmax_j  x·y_j + w s c_i·c_j + g_j,    g = argmin  E max_j (x·y_j + w s c_i·c_j + g_j) − mean(g)

    with, for conditions c, a point i drawn at random, whose condition j is to be like; s is the deviation of ``x·y_j``. Genevay
    et al. 2016 (arXiv 1605.08527) for the ascent, An et al. 2021 (arXiv 2103.07066) and Mousavi-Hosseini et al. 2025 (arXiv
    2509.25519) for couplings with the data set of a generative model, Cheng & Schwing 2025 (arXiv 2503.10636) for conditions.

    Args:
        points: y, (N, d), or a sequence of such that are one set, such as mapped files.
        potentials: g, (N,).
        conditions: c, (N, k), unit vectors; ``None`` for none.
        weight: w.
    """

    def __init__(
        self,
        points: torch.Tensor | Sequence[torch.Tensor],
        potentials: torch.Tensor | None = None,
        conditions: torch.Tensor | None = None,
        weight: float = 0.0,
    ):
        self.parts = [points] if isinstance(points, torch.Tensor) else list(points)
        self.count, self.dimension = sum(map(len, self.parts)), self.parts[0].shape[1]
        self.potentials = torch.zeros(self.count) if potentials is None else potentials
        self.conditions, self.weight = conditions, weight

    def _blocks(self) -> Iterator[tuple[slice, torch.Tensor]]:
        starts = accumulate(map(len, self.parts[:-1]), initial=0)
        for start, part in zip(starts, self.parts):
            for first in range(0, len(part), BLOCK):
                block = part[first : first + BLOCK].float()
                yield slice(start + first, start + first + len(block)), block

    def pair(self, noise: torch.Tensor, asked: torch.Tensor | None = None) -> torch.Tensor:
        """
        The points of noises.

        Args:
            noise: x, (n, d).
            asked: i, (n,), whose conditions the points are to be like; needed where there are conditions.

        Returns:
            (n,) int64.
        """
        best, chosen = torch.full((len(noise),), -math.inf), torch.zeros(len(noise), dtype=torch.int64)
        for places, block in self._blocks():
            scores = torch.addmm(self.potentials[places], noise, block.mT)
            if self.conditions is not None:
                scores.addmm_(self.conditions[asked], self.conditions[places].mT, alpha=self.weight * self.unit)
            top, where = scores.max(1)
            chosen = torch.where(top > best, where + places.start, chosen)
            best = torch.maximum(top, best)
        return chosen

    @property
    def unit(self) -> float:
        """s, of points about their mean."""
        if not hasattr(self, "_unit"):
            total, squares = torch.zeros(self.dimension, dtype=torch.float64), 0.0
            for _, block in self._blocks():
                total += block.sum(0, dtype=torch.float64)
                squares += float(block.double().square().sum())
            self._unit = math.sqrt(max(squares / self.count - float((total / self.count).square().sum()), 0.0))
        return self._unit

    def fit(self, seed: int = 0, samples: int | None = None) -> "SemidiscreteCoupling":
        """
        Find the potentials by stochastic ascent on the dual, in steps that would halve an excess, averaged over the later half.

        Several processes, which must all ask for it, share the noise of each step and get the potentials of one.

        Args:
            seed: of the noise.
            samples: noises a point, by default 400; the mass that a point gets is off by about one over their root.
        """
        generator, batch = torch.Generator().manual_seed(seed), min(LARGEST_BATCH, max(256, self.count))
        steps = math.ceil((samples or SAMPLES_OF_POINT) * self.count / batch)
        gap = self.unit / math.sqrt(2 * math.log(max(self.count, 2)))
        total = torch.zeros(self.count, dtype=torch.float64)
        for step in range(steps):
            excess = self.masses(batch, generator) * self.count - 1
            rate = FIRST_STEP * gap / math.sqrt(1 + step / STEADY)
            self.potentials = self.potentials - rate * excess.clamp(max=LARGEST_EXCESS)
            if step >= steps // 2:
                total += self.potentials
        self.potentials = (total / (steps - steps // 2)).float()
        self.potentials -= self.potentials.mean()
        return self

    def masses(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """The shares of ``count`` noises that points get, (N,)."""
        rank, world = place()
        noise = torch.randn(count, self.dimension, generator=generator)
        asked = torch.randint(self.count, (count,), generator=generator)
        found = torch.bincount(self.pair(noise[rank::world], asked[rank::world]), minlength=self.count).float()
        if world > 1:
            dist.all_reduce(found)
        return found / count

    def save(self, file: Path) -> None:
        """Write points, potentials and conditions, safetensors."""
        tensors = {"points": torch.cat(self.parts), "potentials": self.potentials}
        if self.conditions is not None:
            tensors["conditions"] = self.conditions
        partial = file.with_suffix(".partial")
        save_file(tensors, partial, {"weight": repr(self.weight)})
        partial.replace(file)

    @classmethod
    def load(cls, file: Path) -> "SemidiscreteCoupling":
        """What :meth:`save` wrote; points are mapped, not read."""
        with safe_open(file, framework="pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}
            return cls(tensors["points"], tensors["potentials"], tensors.get("conditions"), float(stored.metadata()["weight"]))


def coupled_noise(draws: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
    """(n, *shape): the noise that belongs to each picture's place in the run."""
    generators = [torch.Generator().manual_seed(int(draw) ^ NOISE_SEED) for draw in draws]
    return torch.stack([torch.randn(*shape, generator=generator) for generator in generators])


class SemidiscreteSampler(Sampler):
    """The batches of another sampler with, in each place, the picture that the noise of the place goes to."""

    def __init__(self, order: Sampler, coupling: SemidiscreteCoupling):
        self.order, self.coupling = order, coupling

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for batch in self.order:
            asked, draws = zip(*batch)
            noise = coupled_noise(draws, (self.coupling.dimension,))
            yield list(zip(self.coupling.pair(noise, torch.tensor(asked)).tolist(), draws))


def couple_data(
    config: TrainingConfig, dataset: PictureDataset | Annotated, vae: torch.nn.Module | None, folder: Path
) -> SemidiscreteCoupling:
    """
    The coupling of a recipe's data, pixels or latents, fitted unless ``folder`` has it.

    Raises:
        ValueError: for an autoencoder whose latents are not cached.
    """
    if vae is not None and not config.cache_latents:
        raise ValueError("coupling: semidiscrete pairs noise with latents, which must be known: give cache_latents: true")
    networks = () if vae is None else (vae,)
    parts = config.dataset.model_dump_json(), data_fingerprint(dataset), str(config.coupling_condition_weight)
    file = folder / f"semidiscrete-{fingerprint(*parts, networks=networks)}.safetensors"
    if not all(together(file.exists)):
        points = in_shares(len(dataset), lambda places: torch.stack([_point(dataset[i, 0], vae) for i in places]))
        conditions = _conditions(config, dataset)
        coupling = SemidiscreteCoupling(points, None, conditions, config.coupling_condition_weight).fit(config.seed)
        folder.mkdir(parents=True, exist_ok=True)
        together(lambda: coupling.save(file) if place()[0] == 0 else None)
    return SemidiscreteCoupling.load(file)


def _point(item: dict[str, Any], vae: torch.nn.Module | None) -> torch.Tensor:
    if vae is None:
        return item["pixels"].flatten()
    latents = item["latents"] if "latents" in item else item["moments"].chunk(2)[0]
    return normalise_latents(vae, latents[None].to(vae.device)).flatten().cpu()


def _conditions(config: TrainingConfig, dataset: PictureDataset | Annotated) -> torch.Tensor | None:
    """Unit vectors of labels, or else of the words of captions."""
    d = config.dataset
    rows: Any = getattr(getattr(dataset, "pictures", dataset), "data")  # noqa: B009
    if not config.coupling_condition_weight:
        return None
    if d.label_column is not None:
        return F.one_hot(torch.tensor(rows[d.label_column])).float()
    if d.caption_column is not None and config.text_encoder is not None:
        return torch.stack([_words(text) for text in rows[d.caption_column]])
    return None


def _words(text: str) -> torch.Tensor:
    """The direction of a sum of fixed random vectors, one a word."""
    seeds = [zlib.crc32(word.encode()) for word in text.lower().split()] or [0]
    vectors = [torch.randn(CAPTION_WIDTH, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return F.normalize(torch.stack(vectors).sum(0), dim=0)
