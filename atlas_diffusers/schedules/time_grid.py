"""From a scheduler's configuration and the arguments of ``set_timesteps`` to a list of steps."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .grids import sigma_grid, spaced_timesteps
from .levels import NoiseLevel

GRID_OF_OPTION = {
    "use_karras_sigmas": "karras",
    "use_exponential_sigmas": "exponential",
    "use_beta_sigmas": "beta",
    "use_lu_lambdas": "lambda",
}


def as_tensor(values: Sequence[float] | Sequence[Sequence[float]], dtype: torch.dtype) -> torch.Tensor:
    """``torch.tensor(values, dtype)`` by way of numpy, which reads a list several times faster."""
    return torch.from_numpy(np.array(values)).to(dtype)


def as_numbers(values: Any) -> list[float]:
    """A list, array or tensor as numbers."""
    return torch.as_tensor(values).flatten().tolist()


@dataclass(frozen=True)
class TimeGrid:
    """
    Network calls ``i = 0, 1, ...`` at ``timesteps[i]``, each of which moves the sample from level ``source[i]`` to
    ``target[i]``.

    Timesteps are whole where ``dtype`` is an integer type. ``spaced`` tells that they are an even spacing of the training
    timesteps (not a sigma grid, not explicit), and ``shift`` by how much the σ/α of a flow are shifted up from those of the
    request.
    """

    timesteps: list[float]
    source: list[NoiseLevel]
    target: list[NoiseLevel]
    dtype: torch.dtype
    spaced: bool = False
    shift: float = 1.0

    def __deepcopy__(self, memo: dict[int, object]) -> "TimeGrid":
        return self  # nothing changes a grid


@dataclass(frozen=True)
class Request:
    """What ``set_timesteps`` was asked for."""

    num_inference_steps: int | None = None
    timesteps: Sequence[float] | None = None
    sigmas: Sequence[float] | None = None
    mu: float | None = None

    def check(self, config: Any) -> None:
        """Raise ``ValueError`` unless, for betas, exactly one is given and agrees with the options of ``config``."""
        ways = {"num_inference_steps": self.num_inference_steps, "timesteps": self.timesteps, "sigmas": self.sigmas}
        chosen = [name for name, value in ways.items() if value is not None]
        if len(chosen) != 1:
            raise ValueError(f"give exactly one of {list(ways)}, got {chosen or 'none'}")
        if self.mu is not None:
            raise ValueError(f"mu={self.mu} shifts a flow; this scheduler's process is that of betas")
        grid = grid_option(config)
        if self.timesteps is not None and grid is not None:
            raise ValueError(f"timesteps cannot be set together with {grid}=True; give sigmas, or switch {grid} off")


def grid_option(config: Any) -> str | None:
    """The sigma grid option that is on."""
    return next((option for option in GRID_OF_OPTION if config[option]), None)


def spaced_grid(config: Any, steps: int | None, num_train_timesteps: int) -> list[float]:
    """The configured spacing of the training timesteps."""
    T = num_train_timesteps
    if steps is None or isinstance(steps, bool) or int(steps) != steps or not 1 <= steps <= T:
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
    values = as_numbers(timesteps)
    falling = all(a > b for a, b in zip(values, values[1:]))
    if not values or not falling or not 0 <= values[-1] <= values[0] <= num_train_timesteps - 1:
        raise ValueError(f"timesteps must fall strictly within [0, {num_train_timesteps - 1}], got {values}")
    return values


def checked_sigmas(sigmas: Sequence[float]) -> list[float]:
    """
    ``sigmas`` as numbers, or ``ValueError`` unless they are finite and fall strictly to 0 or above; the last two may be equal,
    as they are where ``final_sigmas_type`` is `sigma_min`.
    """
    values = [float(s) for s in sigmas]
    pairs = list(zip(values, values[1:]))
    falling = all(a > b for a, b in pairs[:-1]) and all(a >= b for a, b in pairs)
    if len(values) < 2 or not falling or not values[-1] >= 0 or values[0] == math.inf:
        raise ValueError(f"sigmas must be at least two finite values that fall strictly and end at 0 or above, got {values}")
    return values


def between_ends(config: Any, option: str, sigmas: torch.Tensor, steps: int) -> torch.Tensor:
    """A sigma grid between ``sigma_max`` and ``sigma_min`` or, without them, the ends of ``sigmas``."""
    low = sigmas[-1].item() if config.sigma_min is None else config.sigma_min
    high = sigmas[0].item() if config.sigma_max is None else config.sigma_max
    return sigma_grid(GRID_OF_OPTION[option], low, high, steps)
