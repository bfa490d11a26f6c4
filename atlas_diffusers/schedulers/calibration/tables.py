"""Nodes and coefficients of a calibrated multistep solver, as plain numbers that go into a scheduler's configuration."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

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
        tables: by number of steps, and how many of them image-to-image leaves out.
        process: σ̂ at the first, middle and last training timestep.
        prediction_type: of the network.
        guidance_scale: that the model was called with; ``None`` where it was a function.
        shift: of a flow's grid; ``e^μ`` where it is dynamic, which the resolution decides.
    """

    tables: dict[tuple[int, int], StepTable]
    process: list[float]
    prediction_type: str
    guidance_scale: float | None = None
    shift: float | None = None

    @classmethod
    def from_config(cls, config: dict) -> "Calibration":
        """From JSON; ``ValueError`` for unknown or missing fields and tables of wrong shape."""
        try:
            tables = {read_key(key): StepTable(**table) for key, table in config["tables"].items()}
            found = cls(**{**config, "tables": tables})
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"calibration is not one of AtlasMultistepScheduler: {error}") from error
        for (steps, begin), table in found.tables.items():
            if len(table.sigmas) != steps - begin:
                raise ValueError(f"calibration: the table for {steps - begin} steps has {len(table.sigmas)} nodes")
        return found

    def to_config(self) -> dict:
        """To JSON."""
        return {**asdict(self), "tables": {write_key(*key): asdict(table) for key, table in self.tables.items()}}

    def table(self, steps: int, begin: int = 0) -> StepTable | None:
        """The table for a call with so many steps, of which image-to-image leaves out ``begin``."""
        return self.tables.get((steps, begin))

    def check(self, process: list[float], prediction_type: str) -> None:
        """``ValueError`` unless it was made for a noise process with these σ̂ and this prediction type."""
        if prediction_type != self.prediction_type:
            raise ValueError(f"calibrated for prediction_type={self.prediction_type!r}, the scheduler has {prediction_type!r}")
        if not all(abs(a - b) <= SAME * abs(b) for a, b in zip(self.process, process)):
            raise ValueError(f"calibrated for a noise process with sigmas {self.process}, the scheduler's are {process}")


def calibrations_of(config: Mapping[str, Any]) -> list[Calibration]:
    """Those of a scheduler's configuration: none, one, or several for different guidance scales."""
    stored = config.get("calibration")
    several = stored if isinstance(stored, list) else [] if stored is None else [stored]
    return [Calibration.from_config(one) for one in several]


def write_key(steps: int, begin: int) -> str:
    """``"10"``, or ``"10 from 4"`` where the first four of ten are left out."""
    return f"{steps} from {begin}" if begin else str(steps)


def read_key(key: str) -> tuple[int, int]:
    """Inverse of :func:`write_key`."""
    steps, _, begin = key.partition(" from ")
    return int(steps), int(begin or 0)
