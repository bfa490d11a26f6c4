"""Flow matching: the straight process between data and noise, and where its steps lie."""

import copy
import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from .levels import CLEAN, NoiseLevel
from .process import NoiseProcess
from .time_grid import Request, TimeGrid, as_numbers, between_ends, grid_option, spaced_grid

TIME_SHIFT_TYPES = ("exponential", "linear")
EVEN = 2e-3  # deviation of evenly spaced sigmas, some of which are rounded to timesteps
SMALLEST = 1e-8  # sigma that stands for a network call at clean data
LEAST_OF_ONE = 1e-3
LARGEST_MU = 30
LARGEST_SIGMA_HAT = 4096.0  # where the network's output says nothing about x_0 at α = 0


class Flow(NoiseProcess):
    """
    ``x_s = (1 − s) x_0 + s ε`` with ``s`` from 0 to 1; the network's timestep is ``s·T`` and a level's sigma is ``s``. Lipman
    et al. 2022 (arXiv 2210.02747); shifts: Esser et al. 2024 (arXiv 2403.03206).

    Args:
        num_train_timesteps: T.
        shift: k of ``s ← ks/(1 + (k − 1)s)``.
        dynamic: shift by the ``mu`` of a request instead, ``s ← m/(m + 1/s − 1)`` with ``m = e^μ`` or, where
            ``time_shift_type`` is `linear`, ``m = μ``.
        time_shift_type: `exponential` or `linear`.
        terminal: what the last sigma is stretched to.
        inverted: sigmas are ``1 − s``, timesteps run up, and the network predicts ``x_0 − ε`` (Mochi).
        zero_signal: whether a step may start at α = 0; otherwise σ/α is at most 4096.

    Raises:
        ValueError: for a shift that is not positive, a terminal sigma outside (0, 1) and unknown names.
    """

    averaged = ("flow_prediction",)
    shift: float

    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        dynamic: bool = False,
        time_shift_type: str = "exponential",
        terminal: float | None = None,
        inverted: bool = False,
        zero_signal: bool = True,
    ):
        super().__init__(num_train_timesteps)
        if time_shift_type not in TIME_SHIFT_TYPES:
            raise ValueError(f"time_shift_type={time_shift_type!r} is unknown; allowed are {TIME_SHIFT_TYPES}")
        if terminal is not None and not 0 < terminal < 1:
            raise ValueError(f"shift_terminal={terminal}; expected a number between 0 and 1, or None")
        self.dynamic, self.time_shift_type, self.terminal = dynamic, time_shift_type, terminal
        self.inverted, self.zero_signal = inverted, zero_signal
        self.output_sign = -1.0 if inverted else 1.0
        self.shift = _checked_shift(shift)
        self.least = 1 / num_train_timesteps if dynamic else _shifted(1 / num_train_timesteps, shift)
        """The sigma of the least noisy training timestep."""

    def with_shift(self, shift: float) -> "Flow":
        """The same process with another shift of its grids; the ends of training stay."""
        changed = copy.copy(self)
        changed.shift = _checked_shift(shift)
        return changed

    # ------------------------------------------------------------------ levels

    def _level(self, s: float) -> NoiseLevel:
        if not self.zero_signal and s * (1 + LARGEST_SIGMA_HAT) > LARGEST_SIGMA_HAT:
            return self.from_sigma_hat(LARGEST_SIGMA_HAT)
        return NoiseLevel(max(0.0, 1 - s), min(s, 1.0))

    def from_sigma_hat(self, sigma_hat: float) -> NoiseLevel:
        return NoiseLevel(0.0, 1.0) if sigma_hat == math.inf else NoiseLevel(1 / (1 + sigma_hat), sigma_hat / (1 + sigma_hat))

    def level_at(self, timestep: float) -> NoiseLevel:
        s = min(max(timestep / len(self), 0.0), 1.0)
        return self._level(1 - s if self.inverted else s)

    def timesteps_of(self, levels: Sequence[NoiseLevel]) -> list[float]:
        sigmas = torch.tensor([self.sigma(level) for level in levels], dtype=torch.float64)
        return (len(self) * sigmas).float().tolist()

    def levels_at(self, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        s = (timesteps.to(torch.float64) / len(self)).clamp(0, 1)
        return (s, 1 - s) if self.inverted else (1 - s, s)

    @property
    def ends(self) -> tuple[NoiseLevel, NoiseLevel]:
        return self._level(1.0), self._level(self.least)

    @property
    def middle(self) -> NoiseLevel:
        return self._level(0.5)

    def sigma(self, level: NoiseLevel) -> float:
        return level.alpha if self.inverted else level.sigma

    def highest(self, grid: TimeGrid) -> NoiseLevel:
        return grid.source[0]

    @property
    def lowest(self) -> NoiseLevel:
        """The least noisy level that the network is called at; where T is 1, as for audio, training's says nothing."""
        least = self.least if self.least < 1 else LEAST_OF_ONE
        return self._level(least if self.terminal is None else self.terminal)

    def final_level(self, final_sigmas_type: str) -> NoiseLevel:
        return CLEAN if final_sigmas_type == "zero" else self._level(self.least)

    def velocity(
        self, data: torch.Tensor, noise: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor
    ) -> torch.Tensor:
        return self.output_sign * (noise - data)

    # ------------------------------------------------------------------ grids

    def training_steps(self) -> tuple[torch.Tensor, torch.Tensor]:
        every = [k / len(self) for k in range(len(self), 0, -1)]
        levels = [self._level(s if self.dynamic else _shifted(s, self.shift)) for s in every]
        sigmas = [self.sigma(level) for level in (*levels, CLEAN)]
        return torch.tensor(self.timesteps_of(levels)), torch.tensor(sigmas)

    def grid(self, config: object, request: Request, final: NoiseLevel) -> TimeGrid:
        """
        In this order, as Diffusers' ``FlowMatchEulerDiscreteScheduler``: sigmas of the request, without the final one, or a
        spacing of the training timesteps; shift; stretch to the terminal sigma; sigma grid between the ends. Explicit
        timesteps stay as they are.
        """
        shift = self._shift_of(request)
        sigmas = [_shifted(s, shift) for s in self._requested(config, request, self._number_of_steps(request))]
        if self.terminal is not None and sigmas[-1] < 1:
            scale = (1 - self.terminal) / (1 - sigmas[-1])
            sigmas = [1 - (1 - s) * scale for s in sigmas]
        if option := grid_option(config):
            sigmas = self._between_ends(config, option, sigmas)
        levels = [*map(self._level, sigmas), final]
        if final.sigma > sigmas[-1]:
            levels[-1] = levels[-2]
        grid = replace(self.grid_through(levels), shift=shift)
        if request.timesteps is None or self.inverted:
            return grid
        given = torch.as_tensor(_falling("timesteps", request.timesteps, len(self)), dtype=torch.float32)
        timesteps = given.tolist()
        if request.sigmas is None and not all(math.isclose(a, b, rel_tol=1e-5) for a, b in zip(timesteps, grid.timesteps)):
            warnings.warn(
                "timesteps were given without sigmas: they are used as they are, while the sigmas of the steps, derived from "
                "them, are shifted; give sigmas to shift both",
                stacklevel=6,
            )
        return replace(grid, timesteps=timesteps)

    def _number_of_steps(self, request: Request) -> int:
        given = {
            "num_inference_steps": request.num_inference_steps,
            "timesteps": None if request.timesteps is None else len(request.timesteps),
            "sigmas": None if request.sigmas is None else len(request.sigmas),
        }
        counts = {name: count for name, count in given.items() if count is not None}
        if not counts:
            raise ValueError(f"give at least one of {list(given)}, got none")
        if len(set(counts.values())) > 1:
            raise ValueError(f"numbers of steps differ: {', '.join(f'{name} has {count}' for name, count in counts.items())}")
        return next(iter(counts.values()))

    def open_steps(self, request: Request, whatever: bool = False) -> int | None:
        """By number, or with even sigmas, as pipelines give them; never where timesteps are not T times the sigmas."""
        if request.sigmas is not None and request.timesteps is not None:
            pairs = zip(as_numbers(request.sigmas), as_numbers(request.timesteps))
            if any(abs(len(self) * s - t) > EVEN * len(self) for s, t in pairs):
                return None
        given = request.timesteps if request.sigmas is None else request.sigmas
        if given is None:
            return request.num_inference_steps
        numbers, largest = as_numbers(given), len(self) if request.sigmas is None else 1
        line = [numbers[0] + (numbers[-1] - numbers[0]) * k / max(len(numbers) - 1, 1) for k in range(len(numbers))]
        even = all(abs(a - b) <= EVEN * largest for a, b in zip(numbers, line))
        return len(numbers) if even or whatever else None

    def _requested(self, config: object, request: Request, steps: int) -> list[float]:
        """Sigmas before any shift."""
        if request.sigmas is not None:
            return [max(s, SMALLEST) for s in _falling("sigmas", request.sigmas, 1)]
        if request.timesteps is not None:
            return [max(t / len(self), SMALLEST) for t in _falling("timesteps", request.timesteps, len(self))]
        scale = (1 - self.least) / max(len(self) - 1, 1)
        return [self.least + scale * t for t in spaced_grid(config, steps, len(self))]

    def _shift_of(self, request: Request) -> float:
        mu = request.mu
        if not self.dynamic:
            return self.shift
        if mu is None:
            raise ValueError("use_dynamic_shifting=True needs set_timesteps(..., mu=...); give it, or switch the option off")
        linear = self.time_shift_type == "linear"
        if not (0 < mu < math.inf if linear else abs(mu) <= LARGEST_MU):
            expected = "a positive number" if linear else f"a number from {-LARGEST_MU} to {LARGEST_MU}"
            raise ValueError(f"mu={mu}; time_shift_type={self.time_shift_type!r} expects {expected}")
        return mu if linear else math.exp(mu)

    def _between_ends(self, config: Any, option: str, sigmas: list[float]) -> list[float]:
        if option != "use_lu_lambdas":
            for name in ("sigma_min", "sigma_max"):
                if config[name] is not None and config[name] > 1:
                    raise ValueError(f"{name}={config[name]}; sigmas of a flow lie between 0 and 1")
            return between_ends(config, option, torch.tensor(sigmas, dtype=torch.float64), len(sigmas)).tolist()
        # uniform in log-SNR, which is infinite at both ends of the process
        finite = [min(s / (1 - s), len(self)) if s < 1 else len(self) for s in (sigmas[0], sigmas[-1])]
        between = between_ends(config, option, torch.tensor(finite, dtype=torch.float64), len(sigmas))
        return (between / (1 + between)).tolist()


def _shifted(s: float, shift: float) -> float:
    return shift * s / (1 + (shift - 1) * s)


def _checked_shift(shift: float) -> float:
    if not 0 < shift < math.inf:
        raise ValueError(f"shift={shift}; expected a positive number")
    return shift


def _falling(name: str, values: Sequence[float], largest: float) -> list[float]:
    numbers = as_numbers(values)
    falling = all(a > b for a, b in zip(numbers, numbers[1:]))
    if not numbers or not falling or not 0 <= numbers[-1] <= numbers[0] <= largest:
        raise ValueError(f"{name} of a flow must fall strictly within [0, {largest}], got {numbers}")
    return numbers
