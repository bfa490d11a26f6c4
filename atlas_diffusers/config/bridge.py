"""The bridge's part of a pipeline call."""

from typing import Literal

from pydantic import Field, model_validator

from .training import StrictModel


class BridgeConfig(StrictModel):
    """How references steer sampling; ``AtlasPipeline(..., references=..., bridge=BridgeConfig())``."""

    mode: Literal["replace", "correct"] = Field(
        default="replace",
        description="replace: the projection instead of the network; correct: the network moved by the bridge",
    )
    gate: float = Field(
        default=10.0,
        ge=1,
        allow_inf_nan=False,
        description="the bridge ends once the median of the effective references is below",
    )
    steps: int | None = Field(
        default=None,
        ge=1,
        description="bridge steps of its own above the gate, the network's steps then all lie below it; null: none",
    )
    strength: float = Field(default=1.0, ge=0, le=1, description="weight of the correction in mode correct")
    epsilon: float = Field(
        default=1.0, gt=0, allow_inf_nan=False, description="multiplies the squared bandwidth; above 1 blurs"
    )
    rho: float | None = Field(
        default=None, gt=0, description="weight of the reference marginal; null: exact, but relaxed for few particles"
    )
    tolerance: float = Field(default=1e-3, gt=0, lt=1, description="L1 error of the reference marginal")
    max_iterations: int = Field(default=1000, ge=1)
    solver_type: Literal["auto", "direct", "nystrom", "rff"] = Field(
        default="auto", description="kernel operator; auto is direct, for very many points nystrom where that is accurate"
    )
    caption_temperature: float = Field(
        default=0.05, gt=0, description="of the softmax over cosine similarities that weights references by their captions"
    )

    @model_validator(mode="after")
    def _mode_fits(self) -> "BridgeConfig":
        if self.steps is not None and self.mode != "replace":
            raise ValueError(f"steps={self.steps} needs mode='replace'; {self.mode!r} calls the network at every step")
        if self.mode == "replace":
            self.refuse(["strength"], "in mode='replace'")
        return self
