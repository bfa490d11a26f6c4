"""Random features: an unbiased estimate of the kernel as a scalar product."""

import math
from collections.abc import Sequence

import torch

from .functions import KernelFunction, ScaledKernel
from .low_rank import LowRankKernel, check_flat_points, features_by_rows
from .operator import register_kernel_operator

FEATURES = ("positive", "cosine")


def gaussian_rows(count: int, dim: int, orthogonal: bool, generator: torch.Generator) -> torch.Tensor:
    """
    ``count`` vectors, each N(0, I) in ``dim`` dimensions; orthogonal within blocks of ``dim`` rows if so asked.

    Uniform directions from a QR decomposition with positive diagonal, lengths drawn on their own from χ_dim: without these
    the estimate is biased. Yu et al. 2016, "Orthogonal random features" (arXiv 1610.09072).

    Returns:
        float64 ``(count, dim)``.
    """
    settings = {"dtype": torch.float64, "device": generator.device, "generator": generator}
    if not orthogonal:
        return torch.randn(count, dim, **settings)
    blocks = []
    for start in range(0, count, dim):
        rows = min(dim, count - start)
        q, r = torch.linalg.qr(torch.randn(dim, rows, **settings))
        lengths = torch.randn(rows, dim, **settings).norm(dim=1, keepdim=True)
        blocks.append((q * r.diagonal().sign()).mT * lengths)
    return torch.cat(blocks)


def positive_width(x: torch.Tensor, y: torch.Tensor, epsilon: float) -> float:
    """
    The t = ε² / 8τ² in (0, ½] for which anchors ``N(0, τ²)`` estimate the gaussian kernel with the least variance.

    The second moment of the estimate of ``k(x, y)`` is ``k² (4t(1−t))^{−d/2} exp(|x+y|² t / ((1−t) ε²))``; with the mean of
    ``|x+y|²`` in the exponent, κ = 2 mean|x+y|² / (d ε²), the minimum solves ``2t² − (3+κ)t + 1 = 0``. t = ½ are the
    features of Performer. Scetbon & Cuturi 2020 (arXiv 2006.07057); Likhosherstov et al. 2022 (arXiv 2205.15317).

    Args:
        x: points relative to the common centre, ``(n, d)``.
        y: likewise, ``(m, d)``.
        epsilon: bandwidth.
    """
    square = x.square().sum(1).mean() + y.square().sum(1).mean() + 2 * (x.mean(0) @ y.mean(0))
    b = 3 + 2 * float(square) / (x.shape[1] * epsilon**2)
    return 2 / (b + math.sqrt(b * b - 8))


@register_kernel_operator("rff")
class RandomFeatureKernel(LowRankKernel):
    """
    ``k(x, y) ≈ φ(x)·φ(y)``, unbiased, with error ``∝ 1/√num_features``.

    ========  ================================================================================  ============
    features  φ, two of each frequency                                                          entries
    ========  ================================================================================  ============
    positive  exp(±x·z/(ε√(2t)) − |x|²/ε² − |z|²(1−2t)/8t − (d/4) log 2t) / √2F, z ~ N(0, I)    positive
    cosine    cos(w·x)/√F and sin(w·x)/√F, w from the spectral density of the kernel            either sign
    ========  ================================================================================  ============

    Positive features (gaussian kernel only) have a logarithmic product; t is that of :func:`positive_width` and x relative
    to the centre of both clouds. Cosine features serve regression: a scaling such as Sinkhorn's breaks on the negative
    entries, so ``is_positive`` is false. Rahimi & Recht 2007; Scetbon & Cuturi 2020 (arXiv 2006.07057).

    Args:
        x: points, ``(n, d)``.
        y: points, ``(m, d)``.
        kernel: registered name.
        epsilon: bandwidth, in the unit of the points.
        scale_factors: average the kernel over bandwidths ``scale_factor · epsilon``; these share the frequencies out.
        num_features: number F of frequencies.
        features: `positive` or `cosine`.
        orthogonal: draw orthogonal frequencies, which lowers the variance.
        generator: source of the frequencies; by default a new one with seed 0.

    Raises:
        ValueError: for wrong points, kernel, epsilon, factors or features, fewer frequencies than factors, or positive
            features of another kernel than the gaussian.
    """

    options = ("num_features", "features", "orthogonal", "generator")

    def __init__(
        self,
        x: torch.Tensor,
        y: torch.Tensor,
        kernel: str = "gaussian",
        epsilon: float = 1.0,
        scale_factors: Sequence[float] | None = None,
        num_features: int = 1024,
        features: str = "positive",
        orthogonal: bool = True,
        generator: torch.Generator | None = None,
    ):
        check_flat_points(x, y, type(self))
        scaled = ScaledKernel.named(kernel, epsilon, scale_factors)
        self._check_features(scaled, num_features, features)
        generator = generator or torch.Generator().manual_seed(0)
        scales = len(scaled.bandwidths)
        centre = (x.mean(0) + y.mean(0)) / 2
        clouds = x - centre, y - centre
        parts = []
        for index, bandwidth in enumerate(scaled.bandwidths):
            count = num_features // scales + (index < num_features % scales)
            z = gaussian_rows(count, x.shape[1], orthogonal, generator)
            if features == "cosine":
                z = z * _spectral_scale(scaled.function, count, generator)[:, None]
            z = z.to(x.device)
            compute = _log_positive if features == "positive" else _cosine
            parts.append(compute(*clouds, z, bandwidth, scales))
        left, right = (torch.cat(part, 1) for part in zip(*parts))
        self._logs = (left, right) if features == "positive" else None
        factors = (left, right) if self._logs is None else (left.exp(), right.exp())
        super().__init__(*factors, scaled.cost_unit, (x, y))
        self.x, self.y, self.kernel, self.epsilon, self.scale_factors = x, y, kernel, epsilon, scale_factors

    @staticmethod
    def _check_features(scaled: ScaledKernel, num_features: int, features: str) -> None:
        name = scaled.function.name
        if features not in FEATURES:
            raise ValueError(f"features={features!r} is unknown; allowed are {FEATURES}")
        if features == "positive" and name != "gaussian":
            raise ValueError(f"features='positive' exist for the gaussian kernel only, not for {name!r}; use 'cosine'")
        if num_features < len(scaled.bandwidths):
            raise ValueError(f"num_features={num_features} must be at least {len(scaled.bandwidths)}, one for each scale")

    @property
    def is_positive(self) -> bool:
        """False for cosine features."""
        return self._logs is not None

    def logmatvec(self, f: torch.Tensor) -> torch.Tensor:
        if self._logs is None:
            return super().logmatvec(f)
        self._check(f, self.shape[1], columns=False)
        left, right = self._logs
        return torch.logsumexp(left + torch.logsumexp(right + f[:, None], 0), 1)

    def rlogmatvec(self, g: torch.Tensor) -> torch.Tensor:
        if self._logs is None:
            return super().rlogmatvec(g)
        self._check(g, self.shape[0], columns=False)
        left, right = self._logs
        return torch.logsumexp(right + torch.logsumexp(left + g[:, None], 0), 1)


def _spectral_scale(function: KernelFunction, count: int, generator: torch.Generator) -> torch.Tensor:
    if function.spectral_scale is None:
        raise ValueError(f"kernel {function.name!r} was registered without a spectral density; cosine features need one")
    return function.spectral_scale(count, generator)


def _cosine(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor, epsilon: float, scales: int) -> list[torch.Tensor]:
    """``[cos(w·x), sin(w·x)] / √(count · scales)`` with ``w = z/ε``, of both clouds."""

    def features(points: torch.Tensor) -> torch.Tensor:
        phase = points @ (z.mT / epsilon)
        return torch.cat([phase.cos(), phase.sin()], 1) / math.sqrt(len(z) * scales)

    return [features_by_rows(features, points, 2 * len(z)) for points in (x, y)]


def _log_positive(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor, epsilon: float, scales: int) -> list[torch.Tensor]:
    """Logarithms of the positive features of both clouds, the two maxima of each feature balanced against overflow."""
    t = positive_width(x.detach(), y.detach(), epsilon)
    constant = -z.square().sum(1) * (1 - 2 * t) / (8 * t) - z.shape[1] / 4 * math.log(2 * t)
    constant = constant - math.log(2 * len(z) * scales) / 2

    def features(points: torch.Tensor) -> torch.Tensor:
        points = points / epsilon
        projection = points @ z.mT / math.sqrt(2 * t)
        separable = constant - points.square().sum(1, keepdim=True)
        return torch.cat([separable + projection, separable - projection], 1)

    left, right = (features_by_rows(features, points, 2 * len(z)) for points in (x, y))
    shift = (left.detach().amax(0) - right.detach().amax(0)) / 2
    return [left - shift, right + shift]
