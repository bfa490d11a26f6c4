"""Which noise (or source sample) a training sample is paired with."""

from collections.abc import Callable

import torch
import torch.distributed as dist

from ..bridges import MixtureBridge
from ..transport import entropic_transport
from ..transport.column_shares import over_processes, transport_column_share

BLUR = 0.1  # of σ


def sinkhorn_pairs(
    source: torch.Tensor,
    target: torch.Tensor,
    epsilon: float,
    generator: torch.Generator | None = None,
    relative: bool = False,
    tolerance: float = 1e-2,
    split: bool = False,
) -> torch.Tensor:
    r"""
    For every target sample an index of the source, drawn from the entropic transport plan of the two batches:

        P = argmin_P ⟨P, C⟩ + ε KL(P | 1/nm),    C_ij = |x_i − y_j|²,    i(j) ~ P_ij m

    Over many batches each source sample is drawn equally often, so the marginals of training stay what they were; paths
    become straighter the smaller ε is, and for ``ε = 2σ²`` the pairs are those of the Schrödinger bridge whose reference is
    Brownian motion of scale σ. Pooladian et al. 2023 (arXiv 2304.14772); Tong et al. 2023 (arXiv 2302.00482).

    Args:
        source: (n, ...).
        target: (m, ...), with the same shape of one sample.
        epsilon: ε in the unit of the squared distance, or with ``relative`` times the mean cost.
        generator: draws the pairs.
        relative: see ``epsilon``.
        tolerance: L1 error of the plan's source marginal.
        split: the targets are those of this process of several, each of which has as many, the same source and a generator
            in the same state; the pairs are then those of one process with all targets.

    Returns:
        (m,) int64 indices into ``source``.

    Raises:
        ValueError: for shapes that do not fit, or ε that is not positive.
    """
    x, y = source.flatten(1).float(), target.flatten(1).float()
    rank, world = (dist.get_rank(), dist.get_world_size()) if split else (0, 1)
    if relative:
        epsilon = epsilon * _mean_cost(x, y, split)
    transport = transport_column_share if split else entropic_transport
    cumulative = transport(x, y, epsilon, tolerance=tolerance).plan.mT.cumsum(1)
    levels = torch.rand(world * len(y), 1, generator=generator)[rank * len(y) :][: len(y)].to(cumulative) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, levels)[:, 0].clamp(max=len(x) - 1)


def _mean_cost(x: torch.Tensor, y: torch.Tensor, split: bool) -> float:
    x, y = x.double(), y.double()
    moments = torch.cat((y.mean(0), y.square().sum(1).mean()[None]))
    moments = over_processes(moments) / dist.get_world_size() if split else moments
    return (x.square().sum(1).mean() + moments[-1] - 2 * x.mean(0) @ moments[:-1]).item()


class PlanSampler:
    r"""
    Pairs from the entropic transport plan between two pools of samples, which serves many batches before it is solved again.

    A plan of a pool is nearer to that of the distributions than plans of batches are, and its cost is shared by ``refresh``
    batches. ε as in :func:`sinkhorn_pairs`.

    Args:
        source, target: functions that draw n samples, ``(n, ...)``.
        epsilon: ε, in the unit of the squared distance.
        pool: samples in each pool.
        refresh: batches that are drawn from one plan.
        generator: draws the pairs.
        tolerance: L1 error of the plan's source marginal.

    Raises:
        ValueError: for ε that is not positive, and a pool or number of batches below 1.
    """

    def __init__(
        self,
        source: Callable[[int], torch.Tensor],
        target: Callable[[int], torch.Tensor],
        epsilon: float,
        pool: int = 1024,
        refresh: int = 16,
        generator: torch.Generator | None = None,
        tolerance: float = 1e-2,
    ):
        if pool < 1 or refresh < 1:
            raise ValueError(f"pool={pool}, refresh={refresh}; expected at least 1")
        self.source, self.target, self.epsilon, self.tolerance = source, target, epsilon, tolerance
        self.pool, self.refresh, self.generator, self.drawn = pool, refresh, generator, 0

    def __call__(self, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """n pairs, ``(n, ...)`` each."""
        if self.drawn % self.refresh == 0:
            self._solve()
        self.drawn += 1
        levels = torch.rand(n, generator=self.generator).to(self._cumulative) * self._cumulative[-1]
        pairs = torch.searchsorted(self._cumulative, levels).clamp(max=self.pool**2 - 1)
        return self._x[pairs // self.pool], self._y[pairs % self.pool]

    def _solve(self) -> None:
        self._x, self._y = self.source(self.pool), self.target(self.pool)
        x, y = self._x.flatten(1).float(), self._y.flatten(1).float()
        plan = entropic_transport(x, y, self.epsilon, tolerance=self.tolerance).plan
        self._cumulative = plan.flatten().double().cumsum(0)


class MixtureCoupling:
    r"""
    Pairs (x, y) with y drawn given x from a :class:`~atlas_diffusers.bridges.MixtureBridge` fitted to all samples, so that y
    are samples of the fit, not of the data. Coordinates that are constant in the data stay so; the others are blurred by
    ``BLUR σ`` for the fit, as components of pixels that seldom vary would be singular.

    Args:
        source, target: samples, (n, ...) and (m, ...).
        sigma: σ, in the unit of the data.
        seed: of blur and fit.
    """

    def __init__(self, source: torch.Tensor, target: torch.Tensor, sigma: float, seed: int = 0):
        x, y = source.flatten(1).double(), target.flatten(1).double()
        self.constant, self.varies = y[0], y.amax(0) > y.amin(0)
        y = y[:, self.varies]
        blurred = y + BLUR * sigma * torch.randn(y.shape, generator=torch.Generator().manual_seed(seed), dtype=y.dtype)
        self.bridge = MixtureBridge(seed=seed).fit(x[:, self.varies], blurred, sigma**2)

    def __call__(self, source: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """y for every x, like ``source``, (n, ...)."""
        x = source.flatten(1).double().cpu()
        y = self.constant.repeat(len(x), 1)
        y[:, self.varies] = self.bridge.sample(x[:, self.varies], generator)
        return y.view(source.shape).to(source)
