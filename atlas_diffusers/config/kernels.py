"""Kernel operators in a recipe."""

from itertools import chain
from typing import Annotated, Any

from pydantic import Field, model_validator

from .training import StrictModel

PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]

# what only some operators have
READ_BY = {
    "auto": ["n_landmarks"],
    "direct": [],
    "fft": [],
    "rff": ["rff_features", "orthogonal"],
    "nystrom": ["n_landmarks"],
}


class KernelConfig(StrictModel):
    """Which kernel operator: ``make_kernel_operator(x, y, **config.arguments())``."""

    kernel_type: str = Field(default="gaussian", description="gaussian, laplacian, cauchy, or a registered kernel of your own")
    epsilon: PositiveFloat = Field(default=1.0, description="bandwidth, a length in the unit of the points")
    adaptive_epsilon: bool = Field(default=False, description="epsilon is in units of the median distance instead")
    solver_type: str = Field(
        default="auto", description="auto, direct, fft, rff, nystrom, or a registered operator of your own"
    )
    rff_features: int = Field(default=1024, ge=1, description="frequencies of the random features; each gives two features")
    n_landmarks: int = Field(default=256, ge=1, description="landmarks of nystrom")
    orthogonal: bool = Field(default=True, description="random features: orthogonal frequencies")
    multi_scale: bool = Field(default=False, description="average the kernel over the bandwidths scale_factor · epsilon")
    scale_factors: list[PositiveFloat] = Field(default=[0.5, 1.0, 2.0], min_length=1)
    max_kernel_cache_size: int = Field(
        default=1024, ge=1, description="largest kernel matrix, or its factors, in memory, in MiB"
    )

    @model_validator(mode="after")
    def _is_read(self) -> "KernelConfig":
        if not self.multi_scale:
            self.refuse(["scale_factors"], "without multi_scale")
        if self.solver_type in READ_BY:
            unread = sorted({*chain(*READ_BY.values())} - {*READ_BY[self.solver_type]})
            self.refuse(unread, f"by solver_type={self.solver_type!r}")
        return self

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of ``atlas_diffusers.kernels.make_kernel_operator``."""
        return {
            "kernel_type": self.kernel_type,
            "epsilon": self.epsilon,
            "adaptive_epsilon": self.adaptive_epsilon,
            "solver_type": self.solver_type,
            "num_features": self.rff_features,
            "num_landmarks": self.n_landmarks,
            "orthogonal": self.orthogonal,
            "scale_factors": self.scale_factors if self.multi_scale else None,
            "max_bytes": self.max_kernel_cache_size * 2**20,
        }
