"""Where PNDM calls its network: predictor and corrector, or Runge-Kutta steps, before the multistep part."""

from dataclasses import dataclass, field

from ..schedules import NoiseLevel, NoiseProcess
from ..schedules.time_grid import TimeGrid

RUNGE_KUTTA_STEPS = 3


@dataclass(frozen=True)
class PNDMCalls(TimeGrid):
    """
    ``source[i]`` is the level of network call ``i``; ``start`` and ``target`` are the transfer that it takes part in,
    ``backward`` the one that ends there. The first ``runge_kutta`` calls belong to Runge-Kutta steps. ``stride`` is that of an
    even spacing.
    """

    start: list[NoiseLevel] = field(default_factory=list)
    backward: list[tuple[NoiseLevel, NoiseLevel]] = field(default_factory=list)
    runge_kutta: int = 0
    stride: int | None = None


def _targets(grid: TimeGrid, stride: int | None, process: NoiseProcess, final: NoiseLevel) -> list[NoiseLevel]:
    """As in Diffusers, an evenly spaced step always covers ``stride`` = ⌊T/N⌋ training timesteps."""
    if stride is None:
        return grid.target
    return [process.level_at(int(t) - stride) if t >= stride else final for t in grid.timesteps]


def plms_calls(grid: TimeGrid, stride: int | None, process: NoiseProcess, final: NoiseLevel) -> PNDMCalls:
    """Calls ``t_0, t_1, t_1, t_2, ...``: the second one corrects the first step."""
    steps = len(grid.source)
    order = [0, 1, *range(1, steps)] if steps > 1 else [0]
    targets = _targets(grid, stride, process, final)
    if stride is None:
        before = [grid.source[max(i - 1, 0)] for i in range(steps)]
    else:
        before = [process.level_at(min(int(t) + stride, len(process) - 1)) for t in grid.timesteps]
    source = [grid.source[i] for i in order]
    return PNDMCalls(
        timesteps=[grid.timesteps[i] for i in order],
        source=source,
        target=[targets[i] for i in order],
        dtype=grid.dtype,
        start=source,
        backward=[(before[i], grid.source[i]) for i in order],
        stride=stride,
    )


def runge_kutta_calls(grid: TimeGrid, stride: int | None, process: NoiseProcess, final: NoiseLevel) -> PNDMCalls:
    """
    Calls ``t, t_mid, t_mid, t'`` for each of the first steps ``t`` to ``t'``, then one call a step. The midpoint is half a
    stride above ``t'``; on a sigma grid it halves the step in σ̂.
    """
    count = min(RUNGE_KUTTA_STEPS, len(grid.source) - 1)
    timesteps, source, start, target = [], [], [], []
    for t, after, here, there in zip(grid.timesteps, grid.timesteps[1:], grid.source[:count], grid.source[1:]):
        middle, level = _midpoint(t, after, here, there, stride, process)
        first = process.level_at(int(t) - stride // 2) if stride is not None else level
        timesteps += [t, middle, middle, after]
        source += [here, level, level, there]
        start += [here] * 4
        target += [first, level, there, there]
    timesteps += grid.timesteps[count:]
    source += grid.source[count:]
    start += grid.source[count:]
    target += _targets(grid, stride, process, final)[count:]
    return PNDMCalls(timesteps, source, target, grid.dtype, start=start, runge_kutta=4 * count, stride=stride)


def _midpoint(
    t: float, after: float, here: NoiseLevel, there: NoiseLevel, stride: int | None, process: NoiseProcess
) -> tuple[float, NoiseLevel]:
    if stride is not None or isinstance(t, int):
        middle = int(after) + stride // 2 if stride is not None else int(t + after) // 2
        return middle, process.level_at(middle)
    level = process.midpoint(here, there)
    return process.timesteps_of([level])[0], level
