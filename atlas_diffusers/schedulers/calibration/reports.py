"""What a calibration says about itself."""

from dataclasses import dataclass


@dataclass(frozen=True)
class StepReport:
    """Mean RMS distance of held-out ends from the teacher's, without and with the table; whether the table is kept."""

    uncalibrated: float
    calibrated: float
    kept: bool


@dataclass(frozen=True)
class CalibrationReport:
    """
    What a calibration cost and is expected to give.

    Args:
        network_calls: samples that went through the model, the teacher's included.
        teacher_calls: those of the teacher.
        steps: a report for every step count.
    """

    network_calls: int
    teacher_calls: int
    steps: dict[int, StepReport]
