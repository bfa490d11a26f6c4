"""Entropic transport of one problem whose columns are split over the processes of `torch.distributed`."""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist

from .costs import DEFAULT_MAX_BYTES
from .fixed_point import FixedPoint, SinkhornMap
from .inputs import Marginals, Options, check_epsilon
from .solver import ANNEAL_BELOW, ANNEAL_FACTOR, SINGLE_TOLERANCE, UNIT_ROUNDOFF
from .split_costs import PointProducts
from .stabilised import SplitKernel


@dataclass(frozen=True)
class ColumnShare:
    """
    What a process has of a plan.

    Args:
        plan: its columns of P, (n, m / processes).
        row_error: L1 error of the row marginal of the whole plan.
        iterations: of Sinkhorn's algorithm.
    """

    plan: torch.Tensor
    row_error: float
    iterations: int


def transport_column_share(
    x: torch.Tensor,
    y: torch.Tensor,
    epsilon: float,
    *,
    tolerance: float = 1e-4,
    max_iterations: int = 2000,
    max_bytes: int = DEFAULT_MAX_BYTES,
) -> ColumnShare:
    r"""
    The columns of this process of the plan that :func:`~atlas_diffusers.transport.entropic_transport` has for uniform weights.

    Every process holds all rows, and as many columns as the others, so that memory and time are shared. Column potentials need
    no other process; row potentials need one all-reduce of ``log Σ_j`` an iteration, and come out the same everywhere.

    Args:
        x: (n, d), the same in every process.
        y: (m / processes, d), this process's columns.
        epsilon, tolerance, max_iterations: as of ``entropic_transport``.
        max_bytes: largest kernel that a process stores.

    Raises:
        ValueError: if processes hold different numbers of columns, and for options out of range.
    """
    options, (epsilon,) = Options(tolerance, max_iterations, 1, max_bytes), check_epsilon(epsilon, ())
    world, counts = dist.get_world_size(), torch.tensor([len(y), -len(y)], device=y.device)
    most, least = _over_processes(counts, dist.ReduceOp.MAX).tolist()
    if most != -least:
        raise ValueError(f"every process must hold as many columns as the others, got {-least} to {most}")
    x = (x - x.mean(0)).double()
    y = y.double() - over_processes(y.double().mean(0)) / world
    x_norm, y_norm = x.square().sum(1), y.square().sum(1)
    largest = x_norm.amax().sqrt() * _over_processes(y_norm.amax(), dist.ReduceOp.MAX).sqrt()
    sizes = torch.stack((largest, x_norm.mean(), over_processes(y_norm.mean()) / world)).tolist()
    reach, x_mean, y_mean = 2 * sizes[0] / epsilon, *sizes[1:]
    single = tolerance >= SINGLE_TOLERANCE and UNIT_ROUNDOFF * reach <= tolerance / 4
    dtype = torch.float32 if single else torch.float64
    uniform = [points.new_full((1, size), 1 / size) for points, size in ((x, len(x)), (y, world * len(y)))]
    marginals = Marginals(uniform[0], uniform[1].expand(1, world * len(y))[:, : len(y)])
    rungs = math.ceil(math.log(max(ANNEAL_BELOW * (x_mean + y_mean) / epsilon, 1), ANNEAL_FACTOR))
    slope = math.sqrt(y_mean / x_mean) if x_mean * y_mean else 0.0
    g, iterations = -y_norm[None] / (slope or 1.0), 0
    for rung in range(rungs, -1, -1):
        width = epsilon * ANNEAL_FACTOR**rung
        kernel = ColumnShareKernel(x, y, width, marginals, g / width, reach * epsilon / width, dtype, max_bytes)
        step = SinkhornMap(kernel, marginals.a)
        wanted = min(max(3 * tolerance, 3e-4), 3e-3) if rung else tolerance
        left = max(1, options.max_iterations - iterations)
        solution = FixedPoint(step, wanted, left, 1).solve(step.image(g / width), g / width)
        f, g, iterations = solution.phi * width, solution.psi * width, iterations + solution.iterations
    plan = (x @ (2 / epsilon * y.mT) + (f.mT + g) / epsilon).exp() * (marginals.a.mT * marginals.b)
    return ColumnShare(plan.to(dtype), float(solution.error), iterations)


def over_processes(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over all processes."""
    return _over_processes(tensor, dist.ReduceOp.SUM)


def _over_processes(tensor: torch.Tensor, operation: dist.ReduceOp.RedOpType) -> torch.Tensor:
    tensor = tensor.clone()
    dist.all_reduce(tensor, op=operation)
    return tensor


class ColumnShareProducts:
    """``M = 2 x·y``, of centred clouds."""

    def __init__(self, x: torch.Tensor, y: torch.Tensor):
        self.x, self.y, self.shape = x[None], y[None], (1, len(x), len(y))

    def products(self, dtype: torch.dtype) -> PointProducts:
        """As a kernel uses it."""
        return PointProducts(self.x.to(dtype), self.y.to(dtype))


class ColumnShareKernel(SplitKernel):
    """The kernel of this process's columns; what runs over columns runs over those of all processes."""

    def __init__(
        self,
        x: torch.Tensor,
        y: torch.Tensor,
        epsilon: float,
        marginals: Marginals,
        psi: torch.Tensor,
        reach: float,
        dtype: torch.dtype,
        max_bytes: int,
    ):
        super().__init__(ColumnShareProducts(x, y), [epsilon], marginals, psi, reach, dtype, dtype, max_bytes)

    def _times(self, v: torch.Tensor) -> torch.Tensor:
        return over_processes(super()._times(v))

    def _log_times(self, psi: torch.Tensor) -> torch.Tensor:
        own = super()._log_times(psi)
        top = self._most(own)
        return top + over_processes((own - top).exp()).log()

    def _most(self, of_columns: torch.Tensor) -> torch.Tensor:
        return _over_processes(of_columns, dist.ReduceOp.MAX)
