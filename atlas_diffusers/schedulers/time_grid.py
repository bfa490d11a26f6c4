"""From a scheduler's configuration to its list of steps."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..schedules import NoiseLevel, NoiseTable, sigma_grid, spaced_timesteps

GRID_OF_OPTION = {
    "use_karras_sigmas": "karras",
    "use_exponential_sigmas": "exponential",
    "use_beta_sigmas": "beta",
    "use_lu_lambdas": "lambda",
}


def as_tensor(values: list[float], dtype: torch.dtype) -> torch.Tensor:
    """``torch.tensor(values, dtype)`` by way of numpy, which reads a list several times faster."""
    return torch.from_numpy(np.array(values)).to(dtype)


@dataclass
class TimeGrid:
    """
    Network calls ``i = 0, 1, ...`` at ``timesteps[i]``, each of which moves the sample from level ``source[i]`` to
    ``target[i]``.

    ``spaced`` tells that the timesteps are an even spacing of the training timesteps (not a sigma grid, not explicit).
    """

    timesteps: list[int] | list[float]
    source: list[NoiseLevel]
    target: list[NoiseLevel]
    dtype: torch.dtype
    spaced: bool = False

    def __deepcopy__(self, memo) -> "TimeGrid":
        return self  # nothing changes a grid once it is built


@dataclass(frozen=True)
class Request:
    """What ``set_timesteps`` was asked for: exactly one of the three."""

    num_inference_steps: int | None = None
    timesteps: Sequence[float] | None = None
    sigmas: Sequence[float] | None = None

    def check(self, config) -> None:
        """Raise ``ValueError`` unless exactly one is given and agrees with the options of ``config``."""
        chosen = [name for name, value in vars(self).items() if value is not None]
        if len(chosen) != 1:
            raise ValueError(f"give exactly one of {list(vars(self))}, got {chosen or 'none'}")
        grid = grid_option(config)
        if self.timesteps is not None and grid is not None:
            raise ValueError(f"timesteps cannot be set together with {grid}=True; give sigmas, or switch {grid} off")


def grid_option(config) -> str | None:
    """The sigma grid option that is on."""
    return next((option for option in GRID_OF_OPTION if config[option]), None)


def spaced_grid(config, steps: int, num_train_timesteps: int) -> list[float]:
    """The configured spacing of the training timesteps."""
    T = num_train_timesteps
    if isinstance(steps, bool) or int(steps) != steps or not 1 <= steps <= T:
        raise ValueError(f"num_inference_steps={steps}; expected an integer from 1 to {T}")
    spaced = spaced_timesteps(config.timestep_spacing, int(steps), T, config.steps_offset)
    if spaced[0] >= T:
        raise ValueError(
            f"steps_offset={config.steps_offset} moves the first of {steps} timesteps to {int(spaced[0])}; "
            f"the last training timestep is {T - 1}"
        )
    return spaced


def checked_timesteps(timesteps: Sequence[float], num_train_timesteps: int) -> list[float]:
    """``timesteps`` as numbers, or ``ValueError`` unless they fall strictly within the training timesteps."""
    values = torch.as_tensor(timesteps).tolist()
    falling = all(a > b for a, b in zip(values, values[1:]))
    if not values or not falling or not 0 <= values[-1] <= values[0] <= num_train_timesteps - 1:
        raise ValueError(f"timesteps must fall strictly within [0, {num_train_timesteps - 1}], got {values}")
    return values


def checked_sigmas(sigmas: Sequence[float]) -> list[float]:
    """``sigmas`` as numbers, or ``ValueError`` unless they are finite and fall strictly to 0 or above."""
    values = [float(s) for s in sigmas]
    falling = all(a > b for a, b in zip(values, values[1:]))
    if len(values) < 2 or not falling or not values[-1] >= 0 or values[0] == float("inf"):
        raise ValueError(f"sigmas must be at least two finite values that fall strictly and end at 0 or above, got {values}")
    return values


def _between_ends(config, option: str, sigmas: torch.Tensor, steps: int) -> torch.Tensor:
    """A sigma grid between ``sigma_max`` and ``sigma_min`` or, without them, the ends of ``sigmas``."""
    low = sigmas[-1].item() if config.sigma_min is None else config.sigma_min
    high = sigmas[0].item() if config.sigma_max is None else config.sigma_max
    return sigma_grid(GRID_OF_OPTION[option], low, high, steps)


def variance_preserving_grid(
    config, table: NoiseTable, finite_table: NoiseTable, request: Request, final: NoiseLevel
) -> TimeGrid:
    """
    Steps in VP coordinates: integer timesteps read their level from ``table``; sigma grids are laid on ``finite_table``,
    whose σ̂ are all finite.
    """
    request.check(config)
    if request.sigmas is not None:
        return _from_sigma_hats(checked_sigmas(request.sigmas), finite_table)
    if request.timesteps is not None:
        timesteps = checked_timesteps(request.timesteps, len(table))
        if any(t != int(t) for t in timesteps):
            raise ValueError(f"timesteps must be integers here, got {timesteps}; give sigmas for levels between them")
        return _from_timesteps([int(t) for t in timesteps], table, final)
    spaced = spaced_grid(config, request.num_inference_steps, len(table))
    if option := grid_option(config):
        levels = _between_ends(config, option, finite_table.sigma_hats.flip(0), len(spaced))
        return _from_sigma_hats([*levels.tolist(), final.sigma_hat], finite_table)
    grid = _from_timesteps([round(t) for t in spaced], table, final)
    grid.spaced = True
    return grid


def _from_timesteps(timesteps: list[int], table: NoiseTable, final: NoiseLevel) -> TimeGrid:
    source = [table.levels[t] for t in timesteps]
    return TimeGrid(timesteps, source, [*source[1:], final], torch.int64)


def _from_sigma_hats(sigmas: list[float], table: NoiseTable) -> TimeGrid:
    levels = [NoiseLevel.from_sigma_hat(s) for s in sigmas]
    timesteps = table.timestep_at(torch.tensor(sigmas[:-1], dtype=torch.float64)).float().tolist()
    return TimeGrid(timesteps, levels[:-1], levels[1:], torch.float32)


def variance_exploding_grid(config, table: NoiseTable, request: Request, final: float) -> TimeGrid:
    """
    Steps in VE coordinates, where a level is ``(1, σ̂)``: fractional timesteps in float32, σ̂ interpolated between training
    timesteps, sigma grids between the first and the last spaced timestep, ending at σ̂ = ``final``.
    """
    request.check(config)
    if request.sigmas is not None:
        sigmas = checked_sigmas(request.sigmas)
        timesteps = table.timestep_at(torch.tensor(sigmas[:-1], dtype=torch.float64))
    else:
        timesteps, sigmas = _spaced_sigma_hats(config, table, request, final)
    if config.timestep_type == "continuous" and config.prediction_type == "v_prediction":
        timesteps = 0.25 * torch.tensor(sigmas[:-1], dtype=torch.float64).log()
    levels = [NoiseLevel(1.0, s) for s in sigmas]
    return TimeGrid(timesteps.float().tolist(), levels[:-1], levels[1:], torch.float32)


def _spaced_sigma_hats(config, table: NoiseTable, request: Request, final: float) -> tuple[torch.Tensor, list[float]]:
    if request.timesteps is not None:
        timesteps = torch.tensor(checked_timesteps(request.timesteps, len(table)), dtype=torch.float32)
    else:
        timesteps = as_tensor(spaced_grid(config, request.num_inference_steps, len(table)), torch.float32)
    if config.interpolation_type == "log_linear":
        ends = table.sigma_hats[0].item(), table.sigma_hats[-1].item()
        sigmas = sigma_grid("exponential", *ends, len(timesteps) + 1)
    else:
        sigmas = table.sigma_hat_at(timesteps)
    if option := grid_option(config):
        sigmas = _between_ends(config, option, sigmas, len(timesteps))
        timesteps = table.timestep_at(sigmas)
    return timesteps, [*sigmas.tolist(), final][: len(timesteps) + 1]
