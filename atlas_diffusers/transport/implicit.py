"""Gradients of the potentials by the implicit function theorem."""

import math
import warnings
from dataclasses import replace
from functools import reduce

import torch

from .anderson import AndersonMixing
from .costs import Cost
from .inputs import log_weights
from .potentials import Potentials

TOLERANCE, MAX_ITERATIONS = 1e-10, 1000
TINY = 1e-300


def attach(cost: Cost, solution: Potentials, a: torch.Tensor, b: torch.Tensor, rho: tuple[float, float]) -> Potentials:
    r"""
    The optimal potentials as functions of points, weights and ε: with ``f = T(f, θ)`` the map of one iteration,

        df/dθ = (1 − ∂T/∂f)⁻¹ ∂T/∂θ

    One differentiable iteration from the solution gives ∂T/∂θ; a hook solves the transposed linear system when a gradient
    arrives. Luise et al. 2018 (arXiv 1805.11897), Eisenberger et al. 2022 (arXiv 2205.06688).

    Args:
        cost: built from tensors that may require gradients.
        solution: optimal potentials.
        a, b: weights.
        rho: penalties, infinite where a marginal is exact.
    """
    epsilon = cost.epsilon[:, None]
    damping = [1.0 if penalty == math.inf else 1 / (1 + epsilon / penalty) for penalty in rho]
    log_a, log_b = log_weights(a), log_weights(b)
    phi = (solution.f / epsilon).detach()
    full_psi = -cost.log_columns(phi + log_a)
    psi = damping[1] * full_psi
    full_phi = -cost.log_rows(psi + log_b)
    image = damping[0] * full_phi
    factor, balanced = damping[0] * damping[1], rho == (math.inf, math.inf)
    with torch.no_grad():
        columns, rows = _Shares(cost, phi + log_a, full_psi), _Shares(cost, full_phi, psi + log_b)

    def solve(gradient: torch.Tensor) -> torch.Tensor:
        """``w = gradient + (∂T/∂f)ᵀ w``."""
        with torch.no_grad():
            if balanced:  # the potentials are defined up to a constant, so that a gradient has mean zero
                gradient = gradient - a * gradient.sum(-1, keepdim=True) / a.sum(-1, keepdim=True)
            mixing, w = AndersonMixing(), gradient
            scale = gradient.abs().amax(-1).clamp(min=TINY)
            for _ in range(MAX_ITERATIONS):
                image = gradient + factor * columns.times(rows.transposed_times(w))
                residual = w - image
                if bool((residual.abs().amax(-1) <= TOLERANCE * scale).all()):
                    return image
                w = mixing.step(image, residual)
            warnings.warn(f"the gradient of the potentials has not converged in {MAX_ITERATIONS} iterations", stacklevel=2)
            return image

    if image.requires_grad:
        image.register_hook(solve)
    psi = -damping[1] * cost.log_columns(image + log_a)
    return replace(solution, f=image * epsilon, g=psi * epsilon)


class _Shares:
    """The matrix ``exp(φ + ψ − C/ε)``, with sums of 1 on one side; stored if a differentiable output may be."""

    def __init__(self, cost: Cost, phi: torch.Tensor, psi: torch.Tensor):
        self._cost, self._potentials = cost, (phi, psi)
        self._stored = torch.cat(cost.each(_exp, phi, psi), -2) if cost.holds_gradients else None

    def times(self, v: torch.Tensor) -> torch.Tensor:
        """(batch, m) to (batch, n)."""
        if self._stored is not None:
            return (self._stored @ v[..., None])[..., 0]
        return torch.cat(self._cost.each(lambda block, rows: (_exp(block) @ v[..., None])[..., 0], *self._potentials), -1)

    def transposed_times(self, u: torch.Tensor) -> torch.Tensor:
        """(batch, n) to (batch, m)."""
        if self._stored is not None:
            return (u[:, None] @ self._stored)[:, 0]
        parts = self._cost.each(lambda block, rows: (u[:, None, rows] @ _exp(block))[:, 0], *self._potentials)
        return reduce(torch.add, parts)


def _exp(exponents: torch.Tensor, rows: slice = slice(None)) -> torch.Tensor:
    return exponents.double().exp_()
