"""The noise process and the sampling options of a pipeline of ``atlas_diffusers.system``."""

from enum import Enum
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from .._registration import NOISE_SCHEDULERS, SAMPLERS
from .training import StrictModel


class BetaSchedule(str, Enum):
    """Names of beta schedules: a member ``LINEAR`` for ``linear``, and so on."""

    _ignore_ = "members each"
    members = vars()
    for each in NOISE_SCHEDULERS:
        members[each.upper()] = each


class SamplingMethod(str, Enum):
    """Names of samplers: a member ``DDIM`` for ``ddim``, and so on."""

    _ignore_ = "members each"
    members = vars()
    for each in SAMPLERS:
        members[each.upper()] = each


class NoiseSchedulerConfig(StrictModel):
    """Fields and defaults as of the original noise scheduler system."""

    num_train_timesteps: int = Field(default=1000, ge=1, description="T, the timesteps that the network was trained with")
    beta_start: float = Field(default=0.0001, gt=0, lt=1)
    beta_end: float = Field(default=0.02, gt=0, lt=1)
    beta_schedule: BetaSchedule = BetaSchedule("linear")
    clip_sample: bool = Field(default=True, description="clamp the data prediction to ±clip_sample_range")
    clip_sample_range: float = Field(default=1.0, gt=0)
    prediction_type: Literal["epsilon", "sample", "v_prediction", "flow_prediction"] = "epsilon"
    thresholding: bool = Field(default=False, description="dynamic thresholding (arXiv 2205.11487) instead of clipping")
    dynamic_thresholding_ratio: float = Field(default=0.995, gt=0, le=1)
    sample_max_value: float = Field(default=1.0, gt=0)
    timestep_spacing: Literal["leading", "trailing", "linspace"] = "leading"
    steps_offset: int = Field(default=1, ge=0, description="added to leading timesteps")
    use_clipped_model_output: bool = Field(
        default=True, description="DDIM: the noise prediction follows the clipped data prediction"
    )
    variance_type: Literal["fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range"] = (
        Field(default="fixed_small", description="of DDPM's noise")
    )
    sample_padding_threshold: float = Field(
        default=0.0, description="kept for files of the original, which never used it; only 0"
    )
    sample_padding_norm: float = Field(default=1.0, description="kept for files of the original, which never used it; only 1")

    @field_validator("sample_padding_threshold", "sample_padding_norm")
    @classmethod
    def _unused(cls, value: float, info: Any) -> float:
        only = cls.model_fields[info.field_name].default
        if value != only:
            raise ValueError(f"had no effect in the original and has none here; allowed is {only}")
        return value

    @model_validator(mode="after")
    def _rises(self) -> "NoiseSchedulerConfig":
        if self.beta_start > self.beta_end:
            raise ValueError(f"beta_start={self.beta_start} must not exceed beta_end={self.beta_end}")
        return self

    @model_validator(mode="after")
    def _is_read(self) -> "NoiseSchedulerConfig":
        if not self.clip_sample:
            self.refuse(["clip_sample_range"], "without clip_sample")
        if not self.thresholding:
            self.refuse(["dynamic_thresholding_ratio", "sample_max_value"], "without thresholding")
        if self.timestep_spacing != "leading":
            self.refuse(["steps_offset"], f"by timestep_spacing={self.timestep_spacing!r}")
        return self

    def scheduler_options(self, known: set[str]) -> dict[str, Any]:
        """Keyword arguments of a scheduler that knows the options ``known``."""
        data = self.model_dump(mode="json")
        return {name: value for name, value in data.items() if name in known}
