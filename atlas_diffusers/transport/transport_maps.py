"""Transport maps and costs between point clouds with less entropic bias."""

from functools import reduce
from typing import Any, NamedTuple

import torch

from .arrays import in_kind
from .sinkhorn import entropic_transport

MINIMUM_EFFECTIVE_SIZE = 50.0


class RichardsonMap(NamedTuple):
    """Mapped points (..., k, d), whether they are extrapolated, and the median effective size that decided it."""

    points: torch.Tensor
    extrapolated: bool
    effective_size: float


@in_kind
def debiased_map(
    x: torch.Tensor, y: torch.Tensor, epsilon: float | torch.Tensor, points: torch.Tensor | None = None, **options: Any
) -> torch.Tensor:
    r"""
    Entropic map without its shrinkage, ``D(z) = z + T_xy(z) − T_xx(z)``.

    T_xx, the entropic map of the cloud onto itself, shrinks by what T_xy shrinks. Between Gaussians at ε = 0.05 mean cost the
    relative error of the map falls from 1.3e-2 to 1.0e-5. Pooladian, Cuturi & Niles-Weed 2022 (arXiv 2202.08919).

    Args:
        x: (..., n, d).
        y: (..., m, d).
        epsilon: ε.
        points: z, (k, d); by default x.
        options: of :func:`entropic_transport`; ``a`` weighs x in both problems.

    Raises:
        ValueError: as :func:`entropic_transport`.
    """
    to_itself = {**options, "b": options.get("a"), "init": None}
    z = x if points is None else points
    there = entropic_transport(x, y, epsilon, **options).barycentric_map(points)
    return z + there - entropic_transport(x, x, epsilon, **to_itself).barycentric_map(points)


@in_kind
def richardson_map(
    x: torch.Tensor,
    y: torch.Tensor,
    epsilon: float,
    points: torch.Tensor | None = None,
    minimum_effective_size: float = MINIMUM_EFFECTIVE_SIZE,
    **options: Any,
) -> RichardsonMap:
    r"""
    Entropic map extrapolated to ε = 0, ``R(z) = 2 T_ε(z) − T_{2ε}(z)``, where the samples allow it.

    The bias of T_ε is linear in ε, so that R's is quadratic: between Gaussians at ε = 0.05 mean cost 4.4e-4 for 1.3e-2.
    On samples it helps only while bias dominates noise, and doubles the noise after that. So T_ε itself is returned unless
    the rows of its plan spread over enough points: median effective size at least ``minimum_effective_size``.
    Chizat et al. 2020 (arXiv 2006.08172), Pooladian & Niles-Weed 2021 (arXiv 2109.12004).

    Args:
        x: (..., n, d).
        y: (..., m, d).
        epsilon: ε.
        points: z, (k, d); by default x.
        minimum_effective_size: the gate; 0 opens it.
        options: of :func:`entropic_transport`.

    Raises:
        ValueError: as :func:`entropic_transport`.
    """
    wide = entropic_transport(x, y, 2 * epsilon, **options)
    narrow = entropic_transport(x, y, epsilon, **{**options, "init": wide.potentials})
    size = float(narrow.effective_size.median())
    mapped = narrow.barycentric_map(points)
    if size < minimum_effective_size:
        return RichardsonMap(mapped, False, size)
    return RichardsonMap(2 * mapped - wide.barycentric_map(points), True, size)


@in_kind
def sinkhorn_divergence(
    x: torch.Tensor,
    y: torch.Tensor,
    epsilon: float | torch.Tensor,
    a: torch.Tensor | None = None,
    b: torch.Tensor | None = None,
    extrapolate: bool = False,
    **options: Any,
) -> torch.Tensor:
    r"""
    Sinkhorn divergence, (...), which estimates the squared 2-Wasserstein distance:

        S_ε(a, b) = OT_ε(a, b) − ½ OT_ε(a, a) − ½ OT_ε(b, b)

    Zero for equal measures, positive otherwise. Genevay et al. 2018 (arXiv 1706.00292), Feydy et al. 2019
    (arXiv 1810.08278). Its bias is of order ε², which ``2 S_ε − S_{√2 ε}`` removes; the weights of the plain cost,
    ``2 S_ε − S_{2ε}``, would add to it. Chizat et al. 2020 (arXiv 2006.08172).

    Args:
        x: (..., n, d).
        y: (..., m, d).
        epsilon: ε.
        a, b: weights.
        extrapolate: return ``2 S_ε − S_{√2 ε}``.
        options: of :func:`entropic_transport` but ``init`` and ``rho``.

    Raises:
        ValueError: as :func:`entropic_transport`.
    """
    sides = (x, y, a, b, 1.0), (x, x, a, a, -0.5), (y, y, b, b, -0.5)
    costs = (factor * entropic_transport(p, q, epsilon, v, w, **options).cost for p, q, v, w, factor in sides)
    total = reduce(torch.add, costs)
    if not extrapolate:
        return total
    return 2 * total - sinkhorn_divergence(x, y, 2**0.5 * epsilon, a, b, **options)
