"""The denoising objective: targets, timesteps, weights."""

import torch

from ..schedules import data_coefficients, output_coefficients


def stratified_timesteps(
    batch: int, num_train_timesteps: int, generator: torch.Generator, shift: float = 1.0
) -> torch.Tensor:
    """
    One timestep a sample, one in each of ``batch`` strata of equal probability: ``u_i = (i + u)/batch``, shuffled
    (Kingma et al. 2021, appendix I.1, arXiv 2107.00630), then ``t_i = ⌊T·s·u_i/(1 + (s − 1)·u_i)⌋``.

    A shift s above 1 moves them towards noise (Esser et al. 2024, section 5.3.2, arXiv 2403.03206); 1 is uniform.
    Returns ``(batch,)`` int64 in ``[0, T)``.
    """
    offset = torch.rand(1, generator=generator)
    u = (torch.randperm(batch, generator=generator) + offset) / batch
    t = shift * u / (1 + (shift - 1) * u)
    return (t * num_train_timesteps).long().clamp(max=num_train_timesteps - 1)


def min_snr_weights(prediction_type: str, alpha: torch.Tensor, sigma: torch.Tensor, gamma: float) -> torch.Tensor:
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
    coefficient = torch.stack([_data_weight(prediction_type, a, s) for a, s in zip(alpha.tolist(), sigma.tolist())])
    snr = (alpha / sigma) ** 2
    return torch.clamp(gamma / snr, max=1.0) * coefficient.to(snr)


def _data_weight(prediction_type: str, alpha: float, sigma: float) -> torch.Tensor:
    """``SNR · b²``; 1 for `epsilon`, whose b is infinite at zero signal."""
    if prediction_type == "epsilon":
        return torch.tensor(1.0)
    return torch.tensor((alpha / sigma * data_coefficients(prediction_type, alpha, sigma)[1]) ** 2)


def denoising_loss(
    output: torch.Tensor,
    data: torch.Tensor,
    noise: torch.Tensor,
    alpha: torch.Tensor,
    sigma: torch.Tensor,
    prediction_type: str,
    min_snr_gamma: float | None = None,
) -> torch.Tensor:
    """
    Mean over the batch of ``w(t)·‖m − m_θ‖²`` per element, ``m`` the target of ``prediction_type``.

    Args:
        output, data, noise: m_θ, x_0 and ε, ``(batch, channels, height, width)``.
        alpha, sigma: levels of the batch, ``(batch,)``.
        min_snr_gamma: γ of :func:`min_snr_weights`; ``None`` weighs every timestep 1.
    """
    weights = [output_coefficients(prediction_type, a, s) for a, s in zip(alpha.tolist(), sigma.tolist())]
    a, b = torch.tensor(weights, dtype=output.dtype, device=output.device).T.reshape(2, -1, *[1] * (data.ndim - 1))
    loss = (output - (a * noise + b * data)).square().flatten(1).mean(1)
    if min_snr_gamma is not None:
        loss = loss * min_snr_weights(prediction_type, alpha, sigma, min_snr_gamma).to(loss)
    return loss.mean()
