"""Beta schedules: the variance β_t that each forward step adds, t = 0..T-1."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import overload

import torch

from .grids import sigma_grid

BetaSchedule = Callable[[int, float, float], torch.Tensor]

BETA_SCHEDULES: dict[str, BetaSchedule] = {}
# names that are read in Diffusers' configurations only: of our cosine, and of Shap-E's schedule
STOCK_NAMES = ("squaredcos_cap_v2", "exp")


@overload
def register_beta_schedule(name: str) -> Callable[[BetaSchedule], BetaSchedule]: ...


@overload
def register_beta_schedule(name: str, betas: BetaSchedule) -> BetaSchedule: ...


def register_beta_schedule(
    name: str, betas: BetaSchedule | None = None
) -> BetaSchedule | Callable[[BetaSchedule], BetaSchedule]:
    """
    Register ``betas(num_train_timesteps, beta_start, beta_end) -> (num_train_timesteps,) tensor`` under ``name``.

    Usable as a decorator; every scheduler then accepts ``beta_schedule=name``.

    Raises:
        ValueError: if the name is taken by another function.
    """
    if betas is None:
        return partial(register_beta_schedule, name)
    if BETA_SCHEDULES.get(name, betas) is not betas:
        raise ValueError(f"beta schedule {name!r} is registered already")
    BETA_SCHEDULES[name] = betas
    return betas


def get_betas(
    name: str,
    num_train_timesteps: int = 1000,
    beta_start: float = 0.0001,
    beta_end: float = 0.02,
    trained_betas: Sequence[float] | None = None,
    below_one: bool = True,
) -> torch.Tensor:
    """
    Betas of a registered schedule, or ``trained_betas`` themselves; float32 ``(num_train_timesteps,)``.

    Raises:
        ValueError: for an unknown name, or betas outside ``(0, 1)``; unless ``below_one``, 1 and more are let pass.
    """
    if trained_betas is not None:
        betas = torch.tensor(trained_betas, dtype=torch.float32)
    elif name in BETA_SCHEDULES:
        betas = BETA_SCHEDULES[name](num_train_timesteps, beta_start, beta_end).to(torch.float32)
    else:
        raise ValueError(f"beta_schedule={name!r} is unknown; registered are {sorted(BETA_SCHEDULES)}")
    if betas.ndim != 1 or not bool(((betas > 0) & (betas < (1 if below_one else math.inf))).all()):
        raise ValueError(
            f"betas of schedule {name!r} must be one-dimensional and lie in (0, 1); "
            f"found shape {tuple(betas.shape)} and values from {betas.min():g} to {betas.max():g}"
        )
    return betas


def _from_alpha_bar(alpha_bar: Callable[[float], float], num_train_timesteps: int, max_beta: float = 0.999):
    """β_t = min(1 − ᾱ((t+1)/T) / ᾱ(t/T), max_beta)."""
    T = num_train_timesteps
    return torch.tensor(
        [min(1 - alpha_bar((t + 1) / T) / alpha_bar(t / T), max_beta) for t in range(T)], dtype=torch.float32
    )


@register_beta_schedule("linear")
def linear_betas(num_train_timesteps: int, beta_start: float, beta_end: float) -> torch.Tensor:
    """β_t = linspace(β_start, β_end, T). Ho et al. 2020 (arXiv 2006.11239)."""
    return torch.linspace(beta_start, beta_end, num_train_timesteps, dtype=torch.float32)


@register_beta_schedule("scaled_linear")
def scaled_linear_betas(num_train_timesteps: int, beta_start: float, beta_end: float) -> torch.Tensor:
    """β_t = linspace(√β_start, √β_end, T)². Stable Diffusion's schedule (arXiv 2112.10752)."""
    return torch.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps, dtype=torch.float32) ** 2


@register_beta_schedule("squaredcos_cap_v2")
@register_beta_schedule("cosine")
def cosine_betas(num_train_timesteps: int, beta_start: float, beta_end: float) -> torch.Tensor:
    """
    ᾱ(u) = cos²((u + 0.008)/1.008 · π/2), β_t = 1 − ᾱ_{t+1}/ᾱ_t, at most 0.999; ``beta_start`` and ``beta_end`` play no
    part. Nichol & Dhariwal 2021 (arXiv 2102.09672).
    """
    return _from_alpha_bar(lambda u: math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2, num_train_timesteps)


@register_beta_schedule("quadratic")
def quadratic_betas(num_train_timesteps: int, beta_start: float, beta_end: float) -> torch.Tensor:
    """β_t = β_start + (β_end − β_start)·u², u = t/(T−1)."""
    u = torch.linspace(0, 1, num_train_timesteps, dtype=torch.float64)
    return (beta_start + (beta_end - beta_start) * u**2).float()


@register_beta_schedule("sigmoid")
def sigmoid_betas(num_train_timesteps: int, beta_start: float, beta_end: float) -> torch.Tensor:
    """β_t = β_start + (β_end − β_start)·sigmoid(12u − 6), u = t/(T−1)."""
    return torch.sigmoid(torch.linspace(-6, 6, num_train_timesteps)) * (beta_end - beta_start) + beta_start


@register_beta_schedule("exponential")
def exponential_betas(num_train_timesteps: int, beta_start: float, beta_end: float) -> torch.Tensor:
    """β_t = β_start·(β_end/β_start)^u, u = t/(T−1)."""
    u = torch.linspace(0, 1, num_train_timesteps, dtype=torch.float64)
    return (beta_start * (beta_end / beta_start) ** u).float()


@register_beta_schedule("laplace")
def laplace_betas(num_train_timesteps: int, beta_start: float, beta_end: float) -> torch.Tensor:
    """
    Betas of ᾱ(u) = √(e^λ / (1 + e^λ)) with the Laplace-shaped λ(u) = −½ sign(½ − u) log(1 − 2|½ − u| + 1e-6), as Diffusers
    computes them. Hang & Gu 2024 (arXiv 2407.03297).
    """

    def alpha_bar(u: float) -> float:
        snr = math.exp(-0.5 * math.copysign(1, 0.5 - u) * math.log(1 - 2 * abs(0.5 - u) + 1e-6))
        return math.sqrt(snr / (1 + snr))

    return _from_alpha_bar(alpha_bar, num_train_timesteps)


@register_beta_schedule("exp")
def exp_betas(num_train_timesteps: int, beta_start: float, beta_end: float) -> torch.Tensor:
    """Betas of ᾱ(u) = e^{−12u}, Shap-E's schedule under Diffusers' name; ``beta_start`` and ``beta_end`` play no part."""
    return _from_alpha_bar(lambda u: math.exp(-12 * u), num_train_timesteps)


@register_beta_schedule("karras")
def karras_betas(num_train_timesteps: int, beta_start: float, beta_end: float) -> torch.Tensor:
    """
    Betas of ᾱ_t = 1/(1 + σ̂_t²) with σ̂_t = (σ_min^{1/7} + u (σ_max^{1/7} − σ_min^{1/7}))^7, u = t/(T−1), σ_min = 0.002,
    σ_max = 80; ``beta_start`` and ``beta_end`` play no part. Karras et al. 2022, equation 5 (arXiv 2206.00364).
    """
    sigma_hats = sigma_grid("karras", 0.002, 80.0, num_train_timesteps).flip(0)
    alphas_cumprod = 1 / (1 + sigma_hats**2)
    return 1 - alphas_cumprod / torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])


def shift_snr(betas: torch.Tensor, scale: float) -> torch.Tensor:
    """The betas of ``ᾱ_t/(k + (1 − k) ᾱ_t)``: signal-to-noise ratios divided by ``scale`` k (CogVideoX, arXiv 2408.06072)."""
    if scale == 1:
        return betas
    alphas_cumprod = (1 - betas.double()).cumprod(0)
    shifted = alphas_cumprod / (scale + (1 - scale) * alphas_cumprod)
    return (1 - shifted / torch.cat([torch.ones(1, dtype=torch.float64), shifted[:-1]])).to(betas.dtype)


def rescale_zero_terminal_snr(betas: torch.Tensor) -> torch.Tensor:
    """
    Shift and scale √ᾱ_t linearly so that √ᾱ_{T−1} = 0 while √ᾱ_0 stays: the last β becomes 1.

    Lin et al. 2023, algorithm 1 (arXiv 2305.08891).
    """
    signal = (1 - betas).cumprod(0).sqrt()
    first, last = signal[0].clone(), signal[-1].clone()
    alphas_cumprod = ((signal - last) * (first / (first - last))) ** 2
    alphas = torch.cat([alphas_cumprod[:1], alphas_cumprod[1:] / alphas_cumprod[:-1]])
    return 1 - alphas
