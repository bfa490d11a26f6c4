"""Nyström: the kernel through a few landmarks."""

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch

from .direct import DirectKernel
from .distances import squared_distances
from .functions import ScaledKernel
from .low_rank import LowRankKernel, check_flat_points, features_by_rows
from .operator import register_kernel_operator

PROBE_TOLERANCE = 0.01  # relative error of rows; entropic maps are then right to 1e-4 of their variance on pictures


class KernelProbe(NamedTuple):
    """How a kernel operator compares with the true kernel on some rows."""

    relative_error: float
    """Root mean square over the rows of ``|row − true row| / |true row|``; infinite if a true row underflows."""
    min_entry: float
    """Smallest entry of these rows."""

    @property
    def is_good(self) -> bool:
        """Whether the operator may stand for the kernel in transport."""
        return self.relative_error <= PROBE_TOLERANCE and self.min_entry >= 0


def jittered_cholesky(matrix: torch.Tensor) -> torch.Tensor:
    """
    Lower factor of ``matrix + δI`` for the first δ of 1e-12, 1e-11, ... 0.1 with which it exists.

    Raises:
        ValueError: if the matrix is not positive semi-definite to that accuracy.
    """
    for exponent in range(-12, 0):
        jitter = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device) * 10.0**exponent
        factor, info = torch.linalg.cholesky_ex(matrix + jitter)
        if not bool(info):
            return factor
    raise ValueError("the kernel matrix of the landmarks is not positive semi-definite; Nyström needs such a kernel")


@register_kernel_operator("nystrom")
class NystromKernel(LowRankKernel):
    """
    ``K ≈ K_xz (K_zz + δI)⁻¹ K_zy = A Bᵀ`` with ``A = K_xz L⁻ᵀ``, ``B = K_yz L⁻ᵀ``, ``L Lᵀ = K_zz + δI``.

    Accurate to many digits while the kernel is broad (its spectrum decays within ``num_landmarks``), wrong and negative
    once it is narrow: see :meth:`probe`. Computed in float64, kept in the dtype of the points. Williams & Seeger 2001,
    "Using the Nyström method to speed up kernel machines"; for transport Altschuler et al. 2019 (arXiv 1812.05189).

    Args:
        x: points, ``(n, d)``.
        y: points, ``(m, d)``.
        kernel: registered name of a positive definite kernel.
        epsilon: bandwidth, in the unit of the points.
        scale_factors: average the kernel over bandwidths ``scale_factor · epsilon``.
        num_landmarks: points z, drawn uniformly from both clouds without replacement.
        generator: draws them; by default a new one with seed 0.

    Raises:
        ValueError: for wrong points, kernel, epsilon or factors, or a number of landmarks outside ``[1, n + m]``.
    """

    options = ("num_landmarks", "generator")

    def __init__(
        self,
        x: torch.Tensor,
        y: torch.Tensor,
        kernel: str = "gaussian",
        epsilon: float = 1.0,
        scale_factors: Sequence[float] | None = None,
        num_landmarks: int = 256,
        generator: torch.Generator | None = None,
    ):
        check_flat_points(x, y, type(self))
        n, m = len(x), len(y)
        if not 1 <= num_landmarks <= n + m:
            raise ValueError(f"num_landmarks={num_landmarks} must lie in [1, {n + m}], the number of points")
        scaled = ScaledKernel.named(kernel, epsilon, scale_factors)
        generator = generator or torch.Generator().manual_seed(0)
        chosen = torch.randperm(n + m, generator=generator, device=generator.device)[:num_landmarks].to(x.device)
        self.landmarks = torch.cat([x[chosen[chosen < n]], y[chosen[chosen >= n] - n]])
        z = self.landmarks.double()
        factor = jittered_cholesky(scaled(squared_distances(z, z)))

        def features(points: torch.Tensor) -> torch.Tensor:
            return torch.linalg.solve_triangular(factor, scaled(squared_distances(z, points)), upper=False).mT

        of_x, of_y = (features_by_rows(features, points, num_landmarks) for points in (x, y))
        super().__init__(of_x, of_y, scaled.cost_unit, (x, y))
        self.x, self.y, self.kernel, self.epsilon, self.scale_factors = x, y, kernel, epsilon, scale_factors

    @torch.no_grad()
    def probe(self, num_rows: int = 64, generator: torch.Generator | None = None) -> KernelProbe:
        """
        Compare random rows with the true kernel.

        Args:
            num_rows: rows to compute, all there are if fewer.
            generator: chooses them; by default a new one with seed 0.
        """
        generator = generator or torch.Generator().manual_seed(0)
        rows = torch.randperm(self.shape[0], generator=generator, device=generator.device)[:num_rows].to(self.device)
        true = DirectKernel(self.x[rows], self.y, self.kernel, self.epsilon, self.scale_factors).dense()
        approximate = self.left[rows] @ self.right.mT
        errors = (approximate - true).norm(dim=1) / true.norm(dim=1)
        return KernelProbe(float(errors.square().mean().sqrt().nan_to_num(torch.inf)), float(approximate.min()))

    @property
    def is_positive(self) -> bool:
        """Whether a probe of 64 rows finds no negative entry."""
        return self._first_probe.min_entry >= 0

    @cached_property
    def _first_probe(self) -> KernelProbe:
        return self.probe()
