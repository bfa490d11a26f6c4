"""A Gaussian-mixture potential: everything about its Schrödinger bridge that has a closed form."""

import math
from dataclasses import dataclass, replace

import torch

BLOCK_NUMBERS = 2**22  # of the means of a block of points


@dataclass(frozen=True)
class MixturePotential:
    r"""
    The potential ``v(y) = Σ_k v_k(y)`` of a bridge from x to y, each component written about a point ``a_k`` of x-space:

        v_k(y) = exp(b_k) N(y; m_k, S_k) exp(−yᵀa_k/ε)
        c_k(x) = ∫ exp(xᵀy/ε) v_k(y) dy = exp(b_k + dᵀm_k/ε + dᵀS_k d/2ε²),    d = x − a_k
        π(y|x) = exp(xᵀy/ε) v(y) / Σ_k c_k(x) = Σ_k w_k N(y; m_k + S_k d/ε, S_k),    w_k = c_k(x) / Σ_j c_j(x)

    Korotin et al. 2023 (arXiv 2310.01174), where ``a = 0``; about points near the data the exponents stay small.

    Args:
        log_mass: b, (K,).
        mean: m, (K, D).
        covariance: S, (K, D) for diagonal ones, (K, D, D) for full ones.
        origin: a, (K, D).
        epsilon: ε = σ².
    """

    log_mass: torch.Tensor
    mean: torch.Tensor
    covariance: torch.Tensor
    origin: torch.Tensor
    epsilon: float

    @property
    def is_full(self) -> bool:
        """Whether covariances have off-diagonal terms."""
        return self.covariance.ndim == 3

    def __len__(self) -> int:
        return len(self.log_mass)

    def log_partition(self, x: torch.Tensor) -> torch.Tensor:
        """``log c_k(x)``, (n, K), of points (n, D)."""
        eps, m, S, a = self.epsilon, self.mean, self.covariance, self.origin
        if not self.is_full:
            linear = m / eps - a * S / eps**2
            constant = (0.5 * a.square() * S / eps**2 - a * m / eps).sum(1)
            return x @ linear.T + x.square() @ (0.5 * S / eps**2).T + (constant + self.log_mass)
        shifted = [x - origin for origin in a]
        quadratic = [(d @ factor / eps).square().sum(1) / 2 for d, factor in zip(shifted, torch.linalg.cholesky(S))]
        linear = [d @ mean / eps for d, mean in zip(shifted, m)]
        return torch.stack(quadratic, 1) + torch.stack(linear, 1) + self.log_mass

    def log_components(self, y: torch.Tensor) -> torch.Tensor:
        """``log v_k(y)``, (n, K), of points (n, D)."""
        m, S, a = self.mean, self.covariance, self.origin / self.epsilon
        normaliser = self.log_mass - 0.5 * y.shape[1] * math.log(2 * math.pi)
        if not self.is_full:
            constant = normaliser - 0.5 * (m.square() / S + S.log()).sum(1)
            return y @ (m / S - a).T - 0.5 * y.square() @ (1 / S).T + constant
        factors = torch.linalg.cholesky(S)
        whitened = [torch.linalg.solve_triangular(L, (y - mean).T, upper=False) for L, mean in zip(factors, m)]
        log_volume = factors.diagonal(dim1=1, dim2=2).log().sum(1)
        return normaliser - log_volume - torch.stack([w.square().sum(0) / 2 for w in whitened], 1) - y @ a.T

    def objective(self, x: torch.Tensor, y: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """``L = Σ_i a_i log c(x_i) − Σ_j b_j log v(y_j)``; ``L − L*`` is the KL divergence of the best plan from this one."""
        return a @ self.log_partition(x).logsumexp(1) - b @ self.log_components(y).logsumexp(1)

    def about(self, origin: torch.Tensor) -> "MixturePotential":
        """The same potential, its components written about other points."""
        d = origin - self.origin
        Sd = self.covariance * d if not self.is_full else (self.covariance @ d[:, :, None])[:, :, 0]
        mass = self.log_mass + (d * self.mean).sum(1) / self.epsilon + (d * Sd).sum(1) / (2 * self.epsilon**2)
        return replace(self, log_mass=mass, mean=self.mean + Sd / self.epsilon, origin=origin)

    def posterior(self, z: torch.Tensor, t: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        r"""
        The law of y given ``X_t = z`` as a mixture: log weights (n, K), means (n, K, D), and covariances like ``covariance``.

        With τ = t/(ε(1−t)), covariances are ``G = (S⁻¹ + τI)⁻¹``, means ``m + G r`` with ``r = z/(ε(1−t)) − a/ε − τm``, and
        log weights ``b − ½ log|I + τS| + ½ τ|m|² + mᵀr + ½ rᵀG r``, up to a constant.
        """
        eps, m, S, a = self.epsilon, self.mean, self.covariance, self.origin
        tau = t / (eps * (1 - t))
        r = z[:, None] / (eps * (1 - t)) - (a / eps + tau * m)
        if self.is_full:
            inner = torch.eye(m.shape[1]).to(S) + tau * S
            G = torch.linalg.solve(inner, S)
            Gr, log_volume = torch.einsum("kij,nkj->nki", G, r), torch.linalg.slogdet(inner).logabsdet
        else:
            G = S / (1 + tau * S)
            Gr, log_volume = G * r, torch.log1p(tau * S).sum(1)
        constant = self.log_mass - 0.5 * log_volume + 0.5 * tau * m.square().sum(1)
        logits = constant + (m * r).sum(2) + 0.5 * (r * Gr).sum(2)
        return logits.log_softmax(1), m + Gr, G

    def expected(self, z: torch.Tensor, t: float) -> torch.Tensor:
        """``E[y | X_t = z]``, (n, D), in blocks."""
        found = []
        for block in self._blocks(z):
            log_weights, means, _ = self.posterior(block, t)
            found.append((log_weights.exp()[:, :, None] * means).sum(1))
        return torch.cat(found)

    def draw(self, z: torch.Tensor, t: float, generator: torch.Generator | None = None) -> torch.Tensor:
        """One y given ``X_t = z`` for every z, (n, D), in blocks."""
        found = []
        for block in self._blocks(z):
            log_weights, means, covariance = self.posterior(block, t)
            chosen = torch.multinomial(log_weights.exp(), 1, generator=generator)[:, 0]
            noise = torch.randn(block.shape, generator=generator, dtype=block.dtype)
            if covariance.ndim == 3:
                noise = (torch.linalg.cholesky(covariance)[chosen] @ noise[:, :, None])[:, :, 0]
            else:
                noise = covariance.sqrt()[chosen] * noise
            found.append(means[torch.arange(len(block)), chosen] + noise)
        return torch.cat(found)

    def _blocks(self, z: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return z.split(max(1, BLOCK_NUMBERS // self.mean.numel()))
