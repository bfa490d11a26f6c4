"""Gradients of the potentials by the implicit function theorem."""

import math
import warnings

import torch

from .anderson import AndersonMixing
from .costs import Cost
from .inputs import log_weights

TOLERANCE, MAX_ITERATIONS = 1e-10, 1000
TINY = 1e-300


def attach(
    cost: Cost, f: torch.Tensor, g: torch.Tensor, a: torch.Tensor, b: torch.Tensor, rho: tuple[float, float]
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    The optimal potentials as functions of points, weights and ε: with ``f = T(f, θ)`` the map of one iteration,

        df/dθ = (1 − ∂T/∂f)⁻¹ ∂T/∂θ

    One differentiable iteration from the solution gives ∂T/∂θ; a hook solves the transposed linear system when a gradient
    arrives. Luise et al. 2018 (arXiv 1805.11897), Eisenberger et al. 2022 (arXiv 2205.06688). The dense plan is held.

    Args:
        cost: built from tensors that may require gradients.
        f, g: optimal potentials in units of the cost, (batch, n) and (batch, m).
        a, b: weights.
        rho: penalties, infinite where a marginal is exact.
    """
    epsilon = cost.epsilon[:, None]
    damping = [1.0 if penalty == math.inf else 1 / (1 + epsilon / penalty) for penalty in rho]
    log_a, log_b = log_weights(a), log_weights(b)
    phi = (f / epsilon).detach()
    psi = -damping[1] * cost.log_columns(phi + log_a)
    image = -damping[0] * cost.log_rows(psi + log_b)
    with torch.no_grad():
        exponents = torch.cat([block for _, block in cost.blocks(phi, psi)], -2).double()
        rows = (exponents + log_b[:, None]).softmax(-1)
        columns = (exponents + log_a[..., None]).softmax(-2)
        balanced = rho == (math.inf, math.inf)
        factor = damping[0] * damping[1]

    def solve(gradient: torch.Tensor) -> torch.Tensor:
        """``w = gradient + (∂T/∂f)ᵀ w``."""
        with torch.no_grad():
            if balanced:  # the potentials are defined up to a constant, so that a gradient has mean zero
                gradient = gradient - a * gradient.sum(-1, keepdim=True) / a.sum(-1, keepdim=True)
            mixing, w = AndersonMixing(), gradient
            scale = gradient.abs().amax(-1).clamp(min=TINY)
            for _ in range(MAX_ITERATIONS):
                transposed = columns @ (rows.mT @ w[..., None])
                image = gradient + factor * transposed[..., 0]
                residual = w - image
                if bool((residual.abs().amax(-1) <= TOLERANCE * scale).all()):
                    return image
                w = mixing.step(image, residual)
            warnings.warn(f"the gradient of the potentials has not converged in {MAX_ITERATIONS} iterations", stacklevel=2)
            return image

    if image.requires_grad:
        image.register_hook(solve)
    psi = -damping[1] * cost.log_columns(image + log_a)
    return image * epsilon, psi * epsilon
