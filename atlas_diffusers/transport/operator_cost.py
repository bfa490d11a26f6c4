"""The cost of a kernel operator."""

from collections.abc import Callable

import torch

from ..kernels import GridKernel, KernelOperator
from .costs import DEFAULT_MAX_BYTES, Cost, Reduction, Result
from .split_costs import PointCost


class OperatorCost(Cost):
    """
    ``C_ij = −ε log K_ij`` of a positive kernel operator K of shape (n, m), as a batch of one; grids in float64.

    Args:
        operator: K.
        epsilon: (1,), float64.
    """

    def __init__(self, operator: KernelOperator, epsilon: torch.Tensor):
        self.operator, self.epsilon, self.max_bytes = operator, epsilon, DEFAULT_MAX_BYTES
        self.shape = (1, *operator.shape)
        self.dtype = torch.float64 if isinstance(operator, GridKernel) else operator.dtype
        self._of_points = None
        if operator.has_squared_distances and operator.points is not None:
            x, y = (z[None].to(self.dtype) for z in operator.points)
            self._of_points = PointCost(x, y, epsilon)

    def each(self, function: Reduction[Result], phi: torch.Tensor, psi: torch.Tensor) -> list[Result]:
        """Over the blocks of the points, or the dense kernel as one."""
        if self._of_points is not None:
            return self._of_points.each(function, phi, psi)
        kernel = self.operator.dense().to(phi.dtype)
        exponents = kernel.clamp(min=torch.finfo(kernel.dtype).tiny).log() + phi[..., None] + psi[:, None]
        return [function(exponents, slice(None))]

    def log_rows(self, psi: torch.Tensor) -> torch.Tensor:
        return self._log_product(self.operator.logmatvec, psi)

    def log_columns(self, phi: torch.Tensor) -> torch.Tensor:
        return self._log_product(self.operator.rlogmatvec, phi)

    def _log_product(self, product: Callable[[torch.Tensor], torch.Tensor], potential: torch.Tensor) -> torch.Tensor:
        """In the dtype of the operator but for the largest potential, which goes past it."""
        top = potential.amax()
        return (product((potential[0] - top).to(self.dtype)).to(potential.dtype) + top)[None]

    def project(self, psi: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        weights = (psi[0] - psi[0].amax()).exp().to(self.dtype)[:, None]
        sums = self.operator.matvec(torch.cat((weights, weights * values[0].to(self.dtype)), 1))
        means = sums[:, 1:] / sums[:, :1]
        return means[None] if bool(means.isfinite().all()) else super().project(psi, values)
