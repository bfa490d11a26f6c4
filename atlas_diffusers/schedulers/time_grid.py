"""From a scheduler's configuration to its list of steps."""

from dataclasses import dataclass

import torch

from ..schedules import NoiseLevel, NoiseTable, sigma_grid, spaced_timesteps

GRID_OF_OPTION = {
    "use_karras_sigmas": "karras",
    "use_exponential_sigmas": "exponential",
    "use_beta_sigmas": "beta",
    "use_lu_lambdas": "lambda",
}


@dataclass
class TimeGrid:
    """
    Steps ``i = 0..N-1`` from level ``source[i]`` to ``target[i]``; the network is called at ``timesteps[i]``.

    ``spaced`` tells that the timesteps are an even spacing of the training timesteps (not a sigma grid, not explicit).
    """

    timesteps: list[int] | list[float]
    source: list[NoiseLevel]
    target: list[NoiseLevel]
    dtype: torch.dtype
    spaced: bool = False


def build_time_grid(
    config,
    table: NoiseTable,
    finite_table: NoiseTable,
    num_inference_steps: int | None,
    timesteps: list[int] | None,
    sigmas: list[float] | None,
    final: NoiseLevel,
) -> TimeGrid:
    """
    Levels from exactly one of: a number of steps, explicit timesteps, explicit sigmas (see ``set_timesteps``).

    Integer timesteps read their level from ``table``; sigma grids are laid on ``finite_table``, whose σ̂ are all finite.
    """
    given = {"num_inference_steps": num_inference_steps, "timesteps": timesteps, "sigmas": sigmas}
    chosen = [name for name, value in given.items() if value is not None]
    if chosen not in (["num_inference_steps"], ["timesteps"], ["sigmas"]):
        raise ValueError(f"give exactly one of {list(given)}, got {chosen or 'none'}")
    if sigmas is not None:
        return _from_sigmas(_checked_sigmas(sigmas), finite_table)
    if timesteps is not None:
        return _from_timesteps(_checked_timesteps(timesteps, len(table)), table, final)
    _check_steps(num_inference_steps, len(table))
    grid = next((name for option, name in GRID_OF_OPTION.items() if config[option]), None)
    if grid is not None:
        low, high = finite_table.sigma_hats[0].item(), finite_table.sigma_hats[-1].item()
        levels = sigma_grid(grid, low, high, num_inference_steps)
        return _from_sigmas([*levels.tolist(), final.sigma_hat], finite_table)
    spaced = spaced_timesteps(config.timestep_spacing, num_inference_steps, len(table), config.steps_offset).round()
    if spaced[0] >= len(table):
        raise ValueError(
            f"steps_offset={config.steps_offset} moves the first of {num_inference_steps} timesteps to {int(spaced[0])}; "
            f"the last training timestep is {len(table) - 1}"
        )
    result = _from_timesteps([int(t) for t in spaced.tolist()], table, final)
    result.spaced = True
    return result


def _from_timesteps(timesteps: list[int], table: NoiseTable, final: NoiseLevel) -> TimeGrid:
    source = [table.level(t) for t in timesteps]
    return TimeGrid(timesteps, source, [*source[1:], final], torch.int64)


def _from_sigmas(sigmas: list[float], table: NoiseTable) -> TimeGrid:
    levels = [NoiseLevel.from_sigma_hat(s) for s in sigmas]
    timesteps = table.timestep_at(torch.tensor(sigmas[:-1], dtype=torch.float64)).float().tolist()
    return TimeGrid(timesteps, levels[:-1], levels[1:], torch.float32)


def _check_steps(steps: int, num_train_timesteps: int) -> None:
    if isinstance(steps, bool) or int(steps) != steps or not 1 <= steps <= num_train_timesteps:
        raise ValueError(f"num_inference_steps={steps}; expected an integer from 1 to {num_train_timesteps}")


def _checked_timesteps(timesteps, num_train_timesteps: int) -> list[int]:
    values = [int(t) for t in timesteps]
    falling = all(a > b for a, b in zip(values, values[1:]))
    if not values or not falling or values[0] >= num_train_timesteps or values[-1] < 0:
        raise ValueError(f"timesteps must fall strictly within [0, {num_train_timesteps - 1}], got {values}")
    return values


def _checked_sigmas(sigmas) -> list[float]:
    values = [float(s) for s in sigmas]
    falling = all(a > b for a, b in zip(values, values[1:]))
    if len(values) < 2 or not falling or not values[-1] >= 0 or values[0] == float("inf"):
        raise ValueError(f"sigmas must be at least two finite values that fall strictly and end at 0 or above, got {values}")
    return values
