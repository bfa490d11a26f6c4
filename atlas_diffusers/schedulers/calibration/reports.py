"""What a calibration says about itself."""

from dataclasses import dataclass


@dataclass(frozen=True)
class StepReport:
    """
    Mean RMS distance of held-out ends from the teacher's.

    Args:
        uncalibrated: of the plain solver.
        calibrated: of the table.
        kept: whether the table is.
        standard_error: of ``calibrated``, from the spread over held-out trajectories.
        restarts: the same distance for each of the tables that were tried with other nodes, least first.
    """

    uncalibrated: float
    calibrated: float
    kept: bool
    standard_error: float
    restarts: tuple[float, ...]


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
