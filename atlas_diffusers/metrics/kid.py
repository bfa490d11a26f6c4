"""Kernel distance between two sets of features."""

from typing import NamedTuple

import torch

from .points import checked_points, row_blocks


class KernelDistance(NamedTuple):
    """An estimate of MMD² (not multiplied by 1000) and its standard error."""

    mean: float
    standard_error: float


def kid(
    features_a: torch.Tensor,
    features_b: torch.Tensor,
    subsets: int | None = None,
    subset_size: int = 1000,
    generator: torch.Generator | None = None,
) -> KernelDistance:
    """
    Unbiased squared maximum mean discrepancy (MMD²) with the kernel ``k(x, y) = (xᵀy/d + 1)³``.

        MMD² = Σ_{i≠j} k(a_i, a_j) / m(m−1) + Σ_{i≠j} k(b_i, b_j) / n(n−1) − 2 Σ_{ij} k(a_i, b_j) / mn

    The formula of the "kernel inception distance", Binkowski et al. 2018 (arXiv 1801.01401). The package computes it on
    EfficientNet-Lite0 features (:func:`efficientnet_features`), not on Inception's: report it as "KID (EfficientNet-Lite0)".
    Its values cannot be compared with Inception KIDs of papers, and it is not FID. Near 0 an estimate may be negative.

    By default all pairs are used, at a cost that grows with m², and the standard error is the jackknife's, which leaves out
    one point at a time: right for different distributions, up to √2 too large for equal ones (Efron & Stein 1981). For
    large sets ``subsets`` disjoint random blocks of each set are estimated independently (Zaremba et al. 2013, arXiv
    1307.1954): the mean over blocks, and its standard error from their spread. Unlike the overlapping subsets of other
    programs, more blocks cannot make that error look smaller than it is.

    Args:
        features_a: ``(m, d)``, m at least 3.
        features_b: ``(n, d)``, n at least 3.
        subsets: number of blocks, at least 2; ``None`` for all pairs.
        subset_size: points of each set in a block, at least 3.
        generator: chooses the blocks; by default a new one with seed 0.

    Raises:
        ValueError: for wrong points (see :func:`checked_points`), or too few of them for the blocks.
    """
    a, b = checked_points(3, features_a=features_a, features_b=features_b)
    if subsets is None:
        return _all_pairs(a, b)
    total = subsets * subset_size
    if subsets < 2 or subset_size < 3 or total > min(len(a), len(b)):
        raise ValueError(
            f"subsets={subsets} of subset_size={subset_size} from {len(a)} and {len(b)} points; "
            "expected at least 2 subsets, of at least 3 points, that are disjoint"
        )
    generator = generator or torch.Generator().manual_seed(0)
    chosen = [torch.randperm(len(z), generator=generator, device=generator.device)[:total] for z in (a, b)]
    blocks = [z[index.to(z.device)].split(subset_size) for z, index in zip((a, b), chosen)]
    means = torch.tensor([_all_pairs(x, y).mean for x, y in zip(*blocks)], dtype=torch.float64)
    return KernelDistance(float(means.mean()), float(means.std()) / subsets**0.5)


def _all_pairs(a: torch.Tensor, b: torch.Tensor) -> KernelDistance:
    """MMD² of all pairs, and its jackknife standard error from the row sums of the three kernel matrices."""
    cross_sums = _kernel_sums(a, b)
    cross = cross_sums[0].sum()
    value, variance = -2 * cross / (len(a) * len(b)), torch.zeros_like(cross)
    for points, others, sums in ((a, b, cross_sums[0]), (b, a, cross_sums[1])):
        n = len(points)
        own_sums = _kernel_sums(points, points)[0] - _kernel(points.square().sum(1), points.shape[1])
        own = own_sums.sum()
        value += own / (n * (n - 1))
        left_out = (own - 2 * own_sums) / ((n - 1) * (n - 2)) - 2 * (cross - sums) / ((n - 1) * len(others))
        variance += (n - 1) * left_out.var(correction=0)
    return KernelDistance(float(value), float(variance.sqrt()))


def _kernel(products: torch.Tensor, d: int) -> torch.Tensor:
    """``(xᵀy/d + 1)³`` from the products ``xᵀy``."""
    return (products / d + 1) ** 3


def _kernel_sums(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and column sums, (n,) and (m,), of the kernel matrix between ``(n, d)`` and ``(m, d)``."""
    rows, columns = x.new_empty(len(x)), x.new_zeros(len(y))
    for block in row_blocks(len(x), len(y)):
        kernel = _kernel(x[block] @ y.T, x.shape[1])
        rows[block] = kernel.sum(1)
        columns += kernel.sum(0)
    return rows, columns
