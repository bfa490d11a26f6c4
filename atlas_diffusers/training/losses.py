"""The denoising objective: targets, timesteps, weights."""

import inspect
from collections.abc import Callable
from functools import partial

import torch
from diffusers.utils.torch_utils import randn_tensor

from ..config import unknown_key
from ..schedules import data_coefficients, output_coefficients


def stratified_uniform(batch: int, generator: torch.Generator) -> torch.Tensor:
    """
    ``u_i = (i + u)/batch``, shuffled: one number a sample, one in each of ``batch`` strata of [0, 1) (Kingma et al. 2021,
    appendix I.1, arXiv 2107.00630). Returns ``(batch,)``.
    """
    offset = torch.rand(1, generator=generator)
    return (torch.randperm(batch, generator=generator) + offset) / batch


def shifted(u: torch.Tensor, shift: float) -> torch.Tensor:
    """``s·u/(1 + (s − 1)·u)``: a shift s above 1 moves times towards noise (Esser et al. 2024, 5.3.2, arXiv 2403.03206)."""
    return shift * u / (1 + (shift - 1) * u)


def stratified_timesteps(batch: int, num_train_timesteps: int, generator: torch.Generator, shift: float = 1.0) -> torch.Tensor:
    """``⌊T·t_i⌋`` of :func:`stratified_uniform` times that are :func:`shifted`: ``(batch,)`` int64 in ``[0, T)``."""
    t = shifted(stratified_uniform(batch, generator), shift)
    return (t * num_train_timesteps).long().clamp(max=num_train_timesteps - 1)


def flow_times(
    batch: int, generator: torch.Generator, shift: float = 1.0, logit_normal: tuple[float, float] | None = None
) -> torch.Tensor:
    """
    Times s of ``x = (1 − s) x_0 + s ε``, one in each of ``batch`` strata of equal probability, then :func:`shifted`.

    Args:
        logit_normal: mean and standard deviation of ``log(s/(1 − s))``, a Gaussian (Esser et al. 2024, 3.1, arXiv 2403.03206);
            ``None`` is uniform.

    Returns:
        ``(batch,)`` in (0, 1).
    """
    u = stratified_uniform(batch, generator).double()
    if logit_normal is not None:
        mean, deviation = logit_normal
        u = torch.sigmoid(mean + deviation * torch.special.ndtri(u))
    return shifted(u, shift).float()


def min_snr_weights(prediction_type: str, alpha: torch.Tensor, sigma: torch.Tensor, gamma: float = 5.0) -> torch.Tensor:
    r"""
    ``min(α²/σ², γ)``, the weight of a data-prediction error, carried over to the error of ``prediction_type``.

    An error e of the prediction is an error ``b·e`` of the data (``x_0 = a·x + b·m``), so the weight is multiplied by
    b²: ``min(SNR, γ)/SNR`` for `epsilon`, ``min(SNR, γ)/(SNR + 1)`` for `v_prediction`. Hang et al. 2023
    (arXiv 2303.09556).

    Args:
        alpha, sigma: levels of the batch, ``(batch,)``.
        gamma: γ; 5 in the paper.
    """
    # SNR·b² first: it stays finite where α = 0
    return torch.clamp(gamma / _snr(alpha, sigma), max=1.0) * _noise_weight(prediction_type, alpha, sigma)


def p2_weights(
    prediction_type: str, alpha: torch.Tensor, sigma: torch.Tensor, gamma: float = 1.0, k: float = 1.0
) -> torch.Tensor:
    """
    ``1/(k + SNR)^γ``, the weight of a noise-prediction error, carried over to the error of ``prediction_type``: less for the
    last, imperceptible details. Choi et al. 2022 (arXiv 2204.00227).

    Args:
        alpha, sigma: levels of the batch, ``(batch,)``.
        gamma, k: γ and k; 0.5 to 1, and 1, in the paper.
    """
    return (k + _snr(alpha, sigma)) ** -gamma * _noise_weight(prediction_type, alpha, sigma)


def edm_weights(prediction_type: str, alpha: torch.Tensor, sigma: torch.Tensor, sigma_data: float = 0.5) -> torch.Tensor:
    """
    ``(σ̂² + σ_d²)/(σ̂ σ_d)² = SNR + 1/σ_d²``, the weight of a data-prediction error, carried over to the error of
    ``prediction_type``. Karras et al. 2022 (arXiv 2206.00364). Infinite for `epsilon` at zero signal.

    Args:
        alpha, sigma: levels of the batch, ``(batch,)``.
        sigma_data: σ_d, standard deviation of the data.
    """
    weight = _noise_weight(prediction_type, alpha, sigma)
    if prediction_type == "epsilon":
        return weight + 1 / (_snr(alpha, sigma) * sigma_data**2)
    return weight + data_coefficients(prediction_type, alpha, sigma)[1] ** 2 / sigma_data**2


# weights of squared errors by name: functions of (prediction_type, alpha, sigma) and their options
WEIGHTINGS = {"min_snr": min_snr_weights, "p2": p2_weights, "edm": edm_weights}


def loss_weighting(name: float | str, **options: float | str) -> Callable[[str, torch.Tensor, torch.Tensor], torch.Tensor]:
    """
    The weights called ``name`` in ``WEIGHTINGS``, as a function of ``(prediction_type, alpha, sigma)``.

    Raises:
        ValueError: for an unknown name or option, and options that are no positive numbers.
    """
    weights = WEIGHTINGS.get(str(name))
    if weights is None:
        raise ValueError(f"loss_weighting.name={name!r} is unknown; allowed are {list(WEIGHTINGS)}")
    known = list(inspect.signature(weights).parameters)[3:]
    if unknown := [unknown_key(f"loss_weighting.{key}", known) for key in options if key not in known]:
        raise ValueError(f"{'; '.join(unknown)} ({name} has {', '.join(known)})")
    if wrong := {key: value for key, value in options.items() if isinstance(value, str) or not value > 0}:
        raise ValueError(f"loss_weighting: {wrong}; expected positive numbers")
    return partial(weights, **options)


def _snr(alpha: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    return (alpha / sigma) ** 2


def _noise_weight(prediction_type: str, alpha: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """``SNR · b²``, which makes an error of the prediction one of the noise; 1 for `epsilon`, whose b is infinite at α = 0."""
    if prediction_type == "epsilon":
        return torch.ones_like(alpha)
    return (alpha / sigma * data_coefficients(prediction_type, alpha, sigma)[1]) ** 2


def offset_noise(noise: torch.Tensor, strength: float, generator: torch.Generator | list[torch.Generator]) -> torch.Tensor:
    """
    ``ε + s·η`` with η ~ N(0, 1) one number a sample and channel, so that a network learns to change the mean of a picture
    (Guttenberg 2023, "Diffusion with offset noise").

    Args:
        noise: ε, ``(batch, channels, height, width)``.
        strength: s, such as 0.1.
        generator: draws η, on the CPU; a list has one a sample.
    """
    shift = randn_tensor((*noise.shape[:2], *[1] * (noise.ndim - 2)), generator, noise.device, noise.dtype)
    return noise + strength * shift


def denoising_loss(
    output: torch.Tensor,
    data: torch.Tensor,
    noise: torch.Tensor,
    alpha: torch.Tensor,
    sigma: torch.Tensor,
    prediction_type: str,
    sample_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Mean over the batch of ``w(t)·‖m − m_θ‖²`` per element, ``m`` the target of ``prediction_type``.

    Args:
        output, data, noise: m_θ, x_0 and ε, ``(batch, channels, height, width)``.
        alpha, sigma: levels of the batch, ``(batch,)``.
        sample_weights: w, ``(batch,)``, such as :func:`min_snr_weights`; ``None`` weighs every timestep 1.
    """
    alpha, sigma = (level.to(output).reshape(-1, *[1] * (data.ndim - 1)) for level in (alpha, sigma))
    a, b = output_coefficients(prediction_type, alpha, sigma)
    loss = (output - (a * noise + b * data)).square().flatten(1).mean(1)
    return (loss if sample_weights is None else loss * sample_weights.to(loss)).mean()
