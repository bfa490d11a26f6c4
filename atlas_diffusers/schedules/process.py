"""What every noise process answers to a sampler."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

from .levels import CLEAN, NoiseLevel
from .predictions import combine, data_coefficients, noise_coefficients, output_coefficients, step_coefficients
from .time_grid import Request, TimeGrid


class NoiseProcess(ABC):
    """
    A forward process ``x = α x_0 + σ ε`` in a sampler's coordinates: levels ``(α, σ)``, their timesteps, grids of steps, and
    conversions of what a network predicts.

    Args:
        num_train_timesteps: T.
    """

    averaged = ("epsilon", "v_prediction")
    """Prediction types that may be averaged over neighbouring calls; the first is the slope of samplers that go straight."""

    def __init__(self, num_train_timesteps: int):
        self.num_train_timesteps = num_train_timesteps

    output_sign = 1.0
    """-1 where the network's output has the sign opposite to its prediction type's."""
    shift: float | None = None
    """Of a flow's grids."""
    zero_signal = True
    """Whether a step may start at α = 0."""

    def with_shift(self, shift: float) -> "NoiseProcess":
        """The same process with another shift of its grids; ``ValueError`` where that has no meaning."""
        raise ValueError(f"shift={shift} is an option of a flow; this scheduler's process is that of betas")

    def __len__(self) -> int:
        return self.num_train_timesteps

    def __deepcopy__(self, memo: dict[int, object]) -> "NoiseProcess":
        return self  # nothing changes a process

    # ------------------------------------------------------------------ levels

    @abstractmethod
    def from_sigma_hat(self, sigma_hat: float) -> NoiseLevel:
        """The level with ``σ/α = σ̂``."""

    @abstractmethod
    def level_at(self, timestep: int) -> NoiseLevel:
        """The level of a training timestep; below the first one it is clean data."""

    @abstractmethod
    def timesteps_of(self, levels: Sequence[NoiseLevel]) -> list[float]:
        """Fractional timesteps of levels, with which the network is called there."""

    @abstractmethod
    def levels_at(self, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """α and σ of what the network sees at timesteps, float64 ``(batch,)``, without reading a device."""

    def sample_levels_at(self, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """α and σ of the sampler's own samples at timesteps, likewise."""
        return self.levels_at(timesteps)

    @property
    @abstractmethod
    def ends(self) -> tuple[NoiseLevel, NoiseLevel]:
        """The noisiest and the least noisy level of training with a finite ``σ/α``."""

    @property
    @abstractmethod
    def middle(self) -> NoiseLevel:
        """The level halfway through training."""

    def sigma(self, level: NoiseLevel) -> float:
        """The number that stands for a level in ``scheduler.sigmas`` and ``set_timesteps(sigmas=...)``."""
        return level.sigma

    def midpoint(self, here: NoiseLevel, there: NoiseLevel) -> NoiseLevel:
        """The level halfway along a step."""
        return NoiseLevel((here.alpha + there.alpha) / 2, (here.sigma + there.sigma) / 2)

    def final_level(self, final_sigmas_type: str) -> NoiseLevel:
        """Where the last step ends: clean data for `zero`, the least noisy level of training for `sigma_min`."""
        return CLEAN if final_sigmas_type == "zero" else self.level_at(0)

    # ------------------------------------------------------------------ grids

    @abstractmethod
    def training_steps(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The training timesteps ``(T,)`` from the noisiest down; their sigmas with the final one, ``(T + 1,)``, float32."""

    @abstractmethod
    def grid(self, config: object, request: Request, final: NoiseLevel) -> TimeGrid:
        """
        The steps of a request.

        Args:
            config: of the scheduler: spacing, sigma grid and its ends.
            request: the arguments of ``set_timesteps``.
            final: where the last step ends.

        Raises:
            ValueError: for a request that is contradictory or out of range.
        """

    def open_steps(self, request: Request, whatever: bool = False) -> int | None:
        """
        The number of steps of a request that leaves their places to the sampler, otherwise ``None``.

        Args:
            request: the arguments of ``set_timesteps``.
            whatever: also where the request has places of its own, if this process can move them.
        """
        return request.num_inference_steps

    def highest(self, grid: TimeGrid) -> NoiseLevel:
        """Where nodes in place of a grid's begin: for betas at the noisiest level of training, whatever the spacing."""
        return self.ends[0]

    @property
    def lowest(self) -> NoiseLevel:
        """The least noisy level that the network is called at."""
        return self.ends[1]

    def grid_through(self, levels: Sequence[NoiseLevel]) -> TimeGrid:
        """One step from each level to the next."""
        return TimeGrid(self.timesteps_of(levels[:-1]), list(levels[:-1]), list(levels[1:]), torch.float32)

    # ------------------------------------------------------------------ samples and predictions

    def input_scale(self, level: NoiseLevel) -> float:
        """What a sample is multiplied by for the network."""
        return 1.0

    def start_scale(self, level: NoiseLevel, with_data: bool) -> float:
        """Standard deviation of the first sample, at ``level``; ``with_data`` counts in the data's unit variance."""
        return 1.0

    def velocity(
        self, data: torch.Tensor, noise: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor
    ) -> torch.Tensor:
        """What a network that predicts the velocity learns: ``α ε − σ x_0``."""
        return alpha * noise - sigma * data

    def data(self, prediction_type: str, output: torch.Tensor, x: torch.Tensor, level: NoiseLevel) -> torch.Tensor:
        """The data prediction x_0 of a network's output at a sample."""
        a, b = data_coefficients(prediction_type, *level)
        return combine(a, x, b, output)

    def noise(self, prediction_type: str, output: torch.Tensor, x: torch.Tensor, level: NoiseLevel) -> torch.Tensor:
        """The noise prediction ε of a network's output at a sample."""
        a, b = noise_coefficients(prediction_type, *level)
        return combine(a, x, b, output)

    def step(
        self, prediction_type: str, output: torch.Tensor, x: torch.Tensor, level: NoiseLevel, target: NoiseLevel
    ) -> torch.Tensor:
        """``α' x_0 + σ' ε`` at a target level, without making x_0 and ε: on a flow one pass over memory."""
        a, b = step_coefficients(prediction_type, level, target)
        moved = combine(a, x, b, output)
        return moved.clone() if moved is output or moved is x else moved

    def output(self, prediction_type: str, data: torch.Tensor, x: torch.Tensor, level: NoiseLevel) -> torch.Tensor:
        """What a network of a prediction type says whose data prediction at a sample is ``data``."""
        a, b = output_coefficients(prediction_type, *level)
        return combine(a / level.sigma, x, b - a * level.alpha / level.sigma, data)
