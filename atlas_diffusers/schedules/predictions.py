"""
What a network may predict about ``x = α x_0 + σ ε``, and how each prediction ``m`` gives data, noise and the others.

| prediction type   | m             | reference        |
|-------------------|---------------|------------------|
| `epsilon`         | ε             | arXiv 2006.11239 |
| `sample`          | x_0           | arXiv 2006.11239 |
| `v_prediction`    | α ε − σ x_0   | arXiv 2202.00512 |
| `flow_prediction` | ε − x_0       | arXiv 2210.02747 |

All conversions are linear, so each function returns the two scalars of the combination, or two tensors where α and σ are
tensors. ``(α, σ)`` need not be normalised: in VE coordinates α is 1 and σ is σ̂. The α and σ inside ``v_prediction`` are
the normalised ones.
"""

import functools
import math
from typing import Any

import torch

Number = float | torch.Tensor

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction", "flow_prediction")


def check_prediction_type(prediction_type: str) -> None:
    """Raise ``ValueError`` for a name that is not a prediction type."""
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"prediction_type={prediction_type!r} is unknown; allowed are {PREDICTION_TYPES}")


def combine(a: Any, x: torch.Tensor, b: Any, y: torch.Tensor) -> torch.Tensor:
    """``a·x + b·y`` in as few passes over memory as the scalars allow."""
    if a == 0:
        return y if b == 1 else y * b
    if b == 0:
        return x if a == 1 else x * a
    return torch.add(x, y, alpha=b) if a == 1 else torch.mul(x, a).add_(y, alpha=b)


def data_coefficients(prediction_type: str, alpha: Number, sigma: Number) -> tuple[Number, Number]:
    """``(a, b)`` with ``x_0 = a·x + b·m``."""
    match prediction_type:
        case "epsilon":
            return 1 / alpha, -sigma / alpha
        case "sample":
            return 0.0, 1.0
        case "v_prediction":
            norm = _norm(alpha, sigma)
            return alpha / norm**2, -sigma / norm
        case "flow_prediction":
            return 1 / (alpha + sigma), -sigma / (alpha + sigma)
    raise ValueError(f"prediction_type={prediction_type!r} is unknown; allowed are {PREDICTION_TYPES}")


def noise_coefficients(prediction_type: str, alpha: Number, sigma: Number) -> tuple[Number, Number]:
    """``(a, b)`` with ``ε = a·x + b·m``."""
    match prediction_type:
        case "epsilon":
            return 0.0, 1.0
        case "sample":
            return 1 / sigma, -alpha / sigma
        case "v_prediction":
            norm = _norm(alpha, sigma)
            return sigma / norm**2, alpha / norm
        case "flow_prediction":
            return 1 / (alpha + sigma), alpha / (alpha + sigma)
    raise ValueError(f"prediction_type={prediction_type!r} is unknown; allowed are {PREDICTION_TYPES}")


@functools.lru_cache(maxsize=4096)
def step_coefficients(
    prediction_type: str, level: tuple[float, float], target: tuple[float, float]
) -> tuple[float, float]:
    """``(a, b)`` with ``α' x_0 + σ' ε = a·x + b·m``: the step of first order from level ``(α, σ)`` to ``(α', σ')``."""
    data, noise = data_coefficients(prediction_type, *level), noise_coefficients(prediction_type, *level)
    a, b = (float(target[0] * of_data + target[1] * of_noise) for of_data, of_noise in zip(data, noise))
    return a, b


def output_coefficients(prediction_type: str, alpha: Number, sigma: Number) -> tuple[Number, Number]:
    """``(a, b)`` with ``m = a·ε + b·x_0``: the training target."""
    match prediction_type:
        case "epsilon":
            return 1.0, 0.0
        case "sample":
            return 0.0, 1.0
        case "v_prediction":
            norm = _norm(alpha, sigma)
            return alpha / norm, -sigma / norm
        case "flow_prediction":
            return 1.0, -1.0
    raise ValueError(f"prediction_type={prediction_type!r} is unknown; allowed are {PREDICTION_TYPES}")


def _norm(alpha: Number, sigma: Number) -> Number:
    return torch.hypot(alpha, torch.as_tensor(sigma)) if isinstance(alpha, torch.Tensor) else math.hypot(alpha, sigma)
