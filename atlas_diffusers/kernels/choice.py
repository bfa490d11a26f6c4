"""One call for any kernel operator, chosen by the points if so asked."""

import logging
import math
from collections.abc import Sequence
from typing import TypeVar

import torch

from .direct import DirectKernel
from .distances import check_points, median_bandwidth
from .grid import GridKernel, find_grid
from .nystrom import PROBE_TOLERANCE, NystromKernel
from .operator import KERNEL_OPERATORS, KernelOperator

Operator = TypeVar("Operator", bound=KernelOperator)
logger = logging.getLogger(__name__)

DIRECT_LIMIT = 16384**2  # entries; beyond, landmarks are tried first


def make_kernel_operator(
    x: torch.Tensor,
    y: torch.Tensor,
    kernel_type: str = "gaussian",
    epsilon: float = 1.0,
    solver_type: str = "auto",
    *,
    adaptive_epsilon: bool = False,
    scale_factors: Sequence[float] | None = None,
    **options: object,
) -> KernelOperator:
    """
    The kernel operator between two clouds; ``operator.reason`` says why it is this one.

    ``auto`` takes the first that applies, and logs the reason:

    =========  ===========================================================================================
    fft        ``x`` and ``y`` are the same regular grid (and need no gradient)
    direct     the matrix fits ``max_bytes`` and has at most 16,384² entries
    nystrom    the factors fit ``max_bytes``, 64 random rows agree with the true kernel to 1% and are not negative
    direct     in blocks, unless it fits
    =========  ===========================================================================================

    Args:
        x: points, ``(n, d)``; ``(..., n, d)`` for the direct operator.
        y: points, ``(m, d)`` or ``(..., m, d)``.
        kernel_type: registered kernel: `gaussian`, `laplacian`, `cauchy`, or your own.
        epsilon: bandwidth, in the unit of the points.
        solver_type: `auto`, or a registered operator: `direct`, `fft`, `rff`, `nystrom`, or your own.
        adaptive_epsilon: ``epsilon`` is in units of :func:`median_bandwidth` instead.
        scale_factors: average the kernel over bandwidths ``scale_factor · epsilon``.
        options: arguments of the operators (``max_bytes``; ``num_landmarks``; ``num_features``, ``features``,
            ``orthogonal``; ``generator``); each operator takes its own and leaves the rest.

    Raises:
        ValueError: for an unknown solver_type or option, or what the operator refuses.
    """
    if solver_type != "auto" and solver_type not in KERNEL_OPERATORS:
        raise ValueError(f"solver_type={solver_type!r} is unknown; allowed are {['auto', *sorted(KERNEL_OPERATORS)]}")
    known = {option for operator in KERNEL_OPERATORS.values() for option in operator.options}
    if unknown := sorted(options.keys() - known):
        raise ValueError(f"options {unknown} are unknown; allowed are {sorted(known)}")
    check_points(x, y)
    if adaptive_epsilon:
        epsilon = epsilon * median_bandwidth(x.flatten(0, -2), y.flatten(0, -2))
    arguments = {"kernel": kernel_type, "epsilon": epsilon, "scale_factors": scale_factors}
    if solver_type == "auto":
        operator, reason = _choose(x, y, arguments, options)
        operator.reason = reason
        logger.info("%s: %s", type(operator).__name__, reason)
        return operator
    return _make(KERNEL_OPERATORS[solver_type], x, y, arguments, options)


def _make(cls: type[Operator], x: torch.Tensor, y: torch.Tensor, arguments: dict, options: dict) -> Operator:
    return cls.from_points(x, y, **arguments, **{name: options[name] for name in cls.options if name in options})


def _choose(x: torch.Tensor, y: torch.Tensor, arguments: dict, options: dict) -> tuple[KernelOperator, str]:
    """The operator that ``auto`` takes, and why."""
    n, m = x.shape[-2], y.shape[-2]
    if not (x.requires_grad or y.requires_grad) and (x is y or torch.equal(x, y)) and find_grid(x):
        operator = _make(GridKernel, x, y, arguments, options)
        how = "axis by axis" if operator.is_separable else "by FFT"
        return operator, f"the {n} points are a regular grid {operator.grid_shape}: {how}"
    direct = _make(DirectKernel, x, y, arguments, options)
    needed = direct.batch_shape.numel() * n * m * x.dtype.itemsize
    budget = f"{_megabytes(needed)} for {n} x {m}, of max_bytes {_megabytes(direct.max_bytes)}"
    if needed <= direct.max_bytes and n * m <= DIRECT_LIMIT:
        return direct, f"the kernel matrix fits: {budget}"
    if direct.batch_shape:
        return direct, f"the points are batched: {budget}"
    large = f"the kernel matrix is large ({budget})"
    landmarks = options.get("num_landmarks", 256)
    factors = (n + m) * landmarks * x.dtype.itemsize
    if landmarks > n + m or factors > direct.max_bytes:
        return direct, f"{large}, and so are the factors of {landmarks} landmarks ({_megabytes(factors)})"
    nystrom = _make(NystromKernel, x, y, arguments, options)
    probe = nystrom.probe()
    found = f"{landmarks} landmarks give relative error {probe.relative_error:.1e} and smallest entry {probe.min_entry:.1e}"
    if probe.is_good:
        return nystrom, f"{large}, and {found}"
    return direct, f"{large}, but {found}; the limits are {PROBE_TOLERANCE} and 0"


def _megabytes(count: int) -> str:
    return f"{math.ceil(count / 2**20)} MiB"
