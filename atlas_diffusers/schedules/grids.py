"""Where a sampler puts its steps: spacings of the training timesteps, and grids of the VE noise σ̂."""

import math

import torch

TIMESTEP_SPACINGS = ("linspace", "leading", "trailing")
SIGMA_GRIDS = ("karras", "exponential", "beta", "lambda")


def spaced_timesteps(spacing: str, steps: int, num_train_timesteps: int, offset: int = 0) -> list[float]:
    """
    ``steps`` decreasing timesteps (Lin et al. 2023, table 2, arXiv 2305.08891).

    ==========  =============================================
    linspace    T−1 ... 0, both ends included, fractional
    leading     i·⌊T/steps⌋ + offset: starts below T−1
    trailing    round(T − i·T/steps) − 1: starts at T−1
    ==========  =============================================
    """
    T = num_train_timesteps
    match spacing:
        case "linspace":
            # products, not torch.linspace: halves then round as numpy's do in Diffusers
            ratio = (T - 1) / max(steps - 1, 1)
            return [min(i * ratio, T - 1) for i in range(steps - 1, -1, -1)] if steps > 1 else [T - 1]
        case "leading":
            stride = T // steps
            return list(range((steps - 1) * stride + offset, offset - 1, -stride))
        case "trailing":
            # the stride as numpy.arange(T, 0, -T/steps) computes it, for the same reason
            stride = (T - T / steps) - T
            return [round(T + i * stride) - 1 for i in range(steps)]
    raise ValueError(f"timestep_spacing={spacing!r} is unknown; allowed are {TIMESTEP_SPACINGS}")


def sigma_grid(name: str, sigma_min: float, sigma_max: float, steps: int) -> torch.Tensor:
    """
    ``steps`` values of σ̂ falling from ``sigma_max`` to ``sigma_min``, both of them exact, float64.

    ===========  ==================================================================================
    karras       (σ_max^{1/7} + u (σ_min^{1/7} − σ_max^{1/7}))^7        (arXiv 2206.00364)
    exponential  uniform in log σ̂
    beta         quantiles of Beta(0.6, 0.6), linear in σ̂               (arXiv 2407.12173)
    lambda       uniform in log-SNR, i.e. the same points as exponential (arXiv 2206.00927)
    ===========  ==================================================================================
    """
    u = torch.linspace(0, 1, steps, dtype=torch.float64)
    grid = _between(name, sigma_min, sigma_max, u)
    grid[-1] = sigma_min
    grid[0] = sigma_max
    return grid


def _between(name: str, sigma_min: float, sigma_max: float, u: torch.Tensor) -> torch.Tensor:
    match name:
        case "karras":
            high, low = sigma_max ** (1 / 7), sigma_min ** (1 / 7)
            return (high + u * (low - high)) ** 7
        case "exponential" | "lambda":
            return torch.exp(math.log(sigma_max) + u * (math.log(sigma_min) - math.log(sigma_max)))
        case "beta":
            from scipy.stats import beta

            quantiles = torch.as_tensor(beta.ppf((1 - u).numpy(), 0.6, 0.6))
            return sigma_min + quantiles * (sigma_max - sigma_min)
    raise ValueError(f"sigma grid {name!r} is unknown; allowed are {SIGMA_GRIDS}")
