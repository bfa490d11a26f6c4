"""Kernels as functions of the distance, with their spectral densities; a registry of them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class KernelFunction:
    """
    A kernel ``k(x, y) = κ(‖x − y‖² ; ε)`` with ``κ(0) = 1``.

    Args:
        name: what users call it.
        log_kernel: ``(squared distances, ε) -> log κ``, elementwise; finite or −inf, never NaN.
        spectral_scale: ``(count, generator) -> (count,)`` float64 draws of the factor s in the frequency ``w = s z / ε``,
            ``z ~ N(0, I)``, whose cosine ``cos(w·(x − y))`` has mean k: the kernel is a mixture of gaussians,
            ``κ = E exp(−s² r² / 2ε²)``. ``None`` if unknown; random features then refuse the kernel.
        is_separable: the kernel is the product of its values along the axes.
        cost_unit: ``ε -> c`` such that ``−c log κ`` is the cost that transport through this kernel should have. ``None`` if
            not said; transport then takes ``−log κ`` and warns.
    """

    name: str
    log_kernel: Callable[[torch.Tensor, float], torch.Tensor]
    spectral_scale: Callable[[int, torch.Generator], torch.Tensor] | None = None
    is_separable: bool = False
    cost_unit: Callable[[float], float] | None = None


KERNELS: dict[str, KernelFunction] = {}


def register_kernel(kernel: KernelFunction) -> KernelFunction:
    """
    Make ``kernel`` known to every operator under its name.

    Raises:
        ValueError: if the name is taken by another kernel.
    """
    if KERNELS.get(kernel.name, kernel) is not kernel:
        raise ValueError(f"kernel {kernel.name!r} is registered already")
    KERNELS[kernel.name] = kernel
    return kernel


def _over_square(squared: torch.Tensor, factor: float, epsilon: float) -> torch.Tensor:
    """``factor · squared / ε²``; zero stays zero where 1/ε² overflows."""
    return squared * min(factor / epsilon / epsilon, torch.finfo(squared.dtype).max)


def _laplacian(squared: torch.Tensor, epsilon: float) -> torch.Tensor:
    # r = r² / √r², so that the derivative where points coincide is 0, not NaN
    distance = squared / torch.where(squared > 0, squared, 1).sqrt()
    return distance * -min(1 / epsilon, torch.finfo(squared.dtype).max)


def _unit(count: int, generator: torch.Generator) -> torch.Tensor:
    return torch.ones(count, dtype=torch.float64, device=generator.device)


GAUSSIAN = register_kernel(
    KernelFunction(
        "gaussian",
        lambda squared, epsilon: -_over_square(squared, 0.5, epsilon),
        _unit,
        is_separable=True,
        cost_unit=lambda epsilon: 2 * epsilon**2,
    )
)
LAPLACIAN = register_kernel(
    KernelFunction(
        "laplacian",
        _laplacian,
        lambda count, generator: 1 / _unit(count, generator).normal_(generator=generator).abs(),
        cost_unit=lambda epsilon: epsilon,
    )
)
CAUCHY = register_kernel(
    KernelFunction(
        "cauchy",
        lambda squared, epsilon: -_over_square(squared, 1.0, epsilon).log1p(),
        lambda count, generator: (2 * _unit(count, generator).exponential_(generator=generator)).sqrt(),
        cost_unit=lambda epsilon: 1.0,
    )
)


@dataclass(frozen=True)
class ScaledKernel:
    """
    A kernel at given bandwidths, the mean over several: ``k(r²) = mean_s κ(r² ; ε_s)``.

    ==========  =====================  =============================================================================
    gaussian    exp(−r² / 2ε²)         frequencies N(0, I/ε²)
    laplacian   exp(−r / ε)            multivariate Cauchy: ``z / (|z_0| ε)`` (the inverse square root of a χ²_1)
    cauchy      1 / (1 + r²/ε²)        ``z √(2s) / ε`` with s ~ Exp(1), since 1/(1 + q) = ∫ e^{−s} e^{−s q} ds
    ==========  =====================  =============================================================================

    Rahimi & Recht 2007, "Random features for large-scale kernel machines", for the pairing of kernel and density.

    Args:
        function: the kernel of one bandwidth.
        bandwidths: lengths ε_s.
    """

    function: KernelFunction
    bandwidths: tuple[float, ...]

    @classmethod
    def named(cls, kernel: str, epsilon: float, scale_factors: Sequence[float] | None = None) -> "ScaledKernel":
        """
        The registered ``kernel`` at bandwidths ``scale_factor · epsilon``; at ``epsilon`` without factors.

        Raises:
            ValueError: for an unknown name, or an epsilon or factor that is not positive and finite.
        """
        if kernel not in KERNELS:
            raise ValueError(f"kernel {kernel!r} is unknown; registered are {sorted(KERNELS)}")
        factors = (1.0,) if scale_factors is None else tuple(float(factor) for factor in scale_factors)
        if not 0 < epsilon < math.inf:
            raise ValueError(f"epsilon={epsilon} must be a positive, finite length")
        if not factors or not all(0 < factor < math.inf for factor in factors):
            raise ValueError(f"scale_factors={scale_factors} must be positive, finite numbers, at least one")
        return cls(KERNELS[kernel], tuple(float(epsilon) * factor for factor in factors))

    @property
    def is_gaussian(self) -> bool:
        """Whether this is the gaussian kernel at one bandwidth."""
        return self.function is GAUSSIAN and len(self.bandwidths) == 1

    @property
    def cost_unit(self) -> float | None:
        """c of the transport cost ``−c log k``: 1 for several bandwidths."""
        if len(self.bandwidths) > 1:
            return 1.0
        return None if self.function.cost_unit is None else float(self.function.cost_unit(*self.bandwidths))

    def log(self, squared: torch.Tensor) -> torch.Tensor:
        """``log k`` of squared distances of any shape."""
        first, *others = self.bandwidths
        result = self.function.log_kernel(squared, first)
        for bandwidth in others:
            result = torch.logaddexp(result, self.function.log_kernel(squared, bandwidth))
        return result - math.log(len(self.bandwidths)) if others else result

    def __call__(self, squared: torch.Tensor) -> torch.Tensor:
        """``k`` of squared distances of any shape."""
        return self.log(squared).exp()
