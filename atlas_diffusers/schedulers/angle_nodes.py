"""Where the few-step solver calls the network: evenly in a power of the angle, or where a table says."""

import math
import warnings
from dataclasses import dataclass, replace

from ..schedules import NoiseProcess
from ..schedules.time_grid import TimeGrid
from .angle import angle
from .calibration.tables import Calibration, StepTable

SAME_SHIFT = 0.05  # relative difference that tables bear


@dataclass(frozen=True)
class Nodes(TimeGrid):
    """
    Calls in place of an ``even`` grid's, from call ``begin`` on by the coefficients of ``table`` if there is one. The network
    is given the timestep of ``1/clock`` times their σ/α.
    """

    even: TimeGrid | None = None
    clock: float = 1.0
    table: StepTable | None = None
    begin: int = 0


def table_of(calibration: Calibration, steps: int, begin: int, even: TimeGrid) -> StepTable | None:
    """A table, with a warning where it is for another shift of a flow, as another resolution has it."""
    table, shift = calibration.table(steps, begin), calibration.shift
    if table is not None and shift is not None and not math.isclose(even.shift, shift, rel_tol=SAME_SHIFT):
        warnings.warn(
            f"the steps are calibrated for a flow of shift {shift:.4g} (mu={math.log(shift):.3g}), the call has "
            f"{even.shift:.4g}, as another resolution or length has; calibrate for it, or switch the tables off by "
            "calibration=None",
            stacklevel=6,
        )
    return table


def lean(grid: TimeGrid) -> float:
    """How far nodes lean towards noise: from 0 at a flow's shift of 1 to 1 at 3."""
    return min(max(grid.shift - 1, 0.0), 2.0) / 2


def nodes_from(process: NoiseProcess, begin: int, even: TimeGrid, clock: float, scale: float, power: float) -> Nodes:
    """The nodes of an angle of this scale and power from the level of an even grid's call ``begin`` on."""
    highest = even.source[begin] if begin else process.highest(even)
    lowest = min(angle(process.lowest, scale), angle(even.source[-1], scale))
    placed = angle_nodes(len(even.source) - begin, angle(highest, scale), lowest, scale, power)
    laid = grid_of(process, [*placed, even.target[-1].sigma_hat], clock)
    return Nodes(**{**vars(laid), "shift": even.shift}, even=even, clock=clock)


def angle_nodes(steps: int, largest: float, smallest: float, scale: float, power: float) -> list[float]:
    """σ̂ of the nodes ``θ_max (1 − k/N)^p``; where the last would be below the smallest angle, it is that instead."""
    last, parts = 0.0, [1 - k / steps for k in range(steps)]
    if steps > 1 and largest * parts[-1] ** power < smallest:
        parts, last = [1 - k / (steps - 1) for k in range(steps)], smallest
    return [scale * math.tan(last + (largest - last) * part**power) for part in parts]


def grid_of(process: NoiseProcess, sigma_hats: list[float], clock: float = 1.0) -> TimeGrid:
    """Steps through these σ̂; the network is told the timestep of ``1/clock`` times as much."""
    grid = process.grid_through([process.from_sigma_hat(sigma_hat) for sigma_hat in sigma_hats])
    if clock == 1:
        return grid
    slower = [process.from_sigma_hat(sigma_hat / clock) for sigma_hat in sigma_hats[:-1]]
    return replace(grid, timesteps=process.timesteps_of(slower))
