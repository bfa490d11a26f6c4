"""Nodes and coefficients of a calibrated multistep solver, as plain numbers that go into a scheduler's configuration."""

import math
from dataclasses import asdict, dataclass

from ...schedules import NoiseProcess

SAME = 1e-4  # relative difference of noise levels of one process, stored and computed


@dataclass(frozen=True)
class StepTable:
    r"""
    One step count's solver, from nodes σ̂_0 > σ̂_1 > ... to clean data:

        x_{n+1} = (1 + a_n) x_n + Σ_{j≤n} w_nj v_j

    Args:
        sigmas: σ̂ of the network calls.
        weights: ``w``, row n has n + 1 numbers.
        scales: ``a``.
        start: ``x`` at the first node over the start noise; 1 where that node is the noisiest level.
    """

    sigmas: list[float]
    weights: list[list[float]]
    scales: list[float]
    start: float = 1.0

    def __post_init__(self):
        count, numbers = len(self.sigmas), [*self.sigmas, *self.scales, self.start, *(w for row in self.weights for w in row)]
        shapes = [len(row) for row in self.weights]
        if count < 2 or shapes != list(range(1, count + 1)) or len(self.scales) != count:
            raise ValueError(f"a table of {count} nodes needs rows of 1 to {count} weights and as many scales, got {shapes}")
        if not all(math.isfinite(value) for value in numbers):
            raise ValueError(f"a table of {count} nodes holds numbers that are not finite")
        if not all(a > b > 0 for a, b in zip(self.sigmas, self.sigmas[1:])):
            raise ValueError(f"nodes must fall strictly and stay above 0, got {self.sigmas}")


@dataclass(frozen=True)
class Calibration:
    """
    The tables of a model, and what they hold for.

    Args:
        tables: by number of steps.
        process: σ̂ at the first, middle and last training timestep.
        prediction_type: of the network.
        guidance_scale: that the model was called with; ``None`` where it was a function.
    """

    tables: dict[int, StepTable]
    process: list[float]
    prediction_type: str
    guidance_scale: float | None = None

    @classmethod
    def from_config(cls, config: dict) -> "Calibration":
        """From JSON; ``ValueError`` for unknown or missing fields and tables of wrong shape."""
        try:
            tables = {int(steps): StepTable(**table) for steps, table in config["tables"].items()}
            found = cls(**{**config, "tables": tables})
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"calibration is not one of AtlasMultistepScheduler: {error}") from error
        for steps, table in found.tables.items():
            if len(table.sigmas) != steps:
                raise ValueError(f"calibration: the table for {steps} steps has {len(table.sigmas)} nodes")
        return found

    def to_config(self) -> dict:
        """To JSON."""
        return {**asdict(self), "tables": {str(steps): asdict(table) for steps, table in self.tables.items()}}

    def check(self, process: NoiseProcess, prediction_type: str) -> None:
        """``ValueError`` unless it was made for this noise process and prediction type."""
        if prediction_type != self.prediction_type:
            raise ValueError(f"calibrated for prediction_type={self.prediction_type!r}, the scheduler has {prediction_type!r}")
        here = process_of(process)
        if not all(abs(a - b) <= SAME * abs(b) for a, b in zip(self.process, here)):
            raise ValueError(f"calibrated for a noise process with sigmas {self.process}, the scheduler's are {here}")


def process_of(process: NoiseProcess) -> list[float]:
    """σ̂ at the first, middle and last training timestep."""
    return [process.sigma_hats[index].item() for index in (0, len(process) // 2, len(process) - 1)]
