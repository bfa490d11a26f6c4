"""The dynamic Schrödinger bridge between two point clouds: a drift in time, and a sampler that follows it."""

import math

import torch

from ..transport.sinkhorn import entropic_transport


class DynamicBridge:
    r"""
    The diffusion closest to Brownian motion of scale σ that carries cloud ``x`` (t = 0) to cloud ``y`` (t = 1):

        dX = u(X, t) dt + σ dW,    u(x, t) = (E[y | X_t = x] − x)/(1 − t)
        E[y | X_t = x] = Σ_j w_j y_j / Σ_j w_j,    w_j = b_j exp(g_j/(2σ²) − ‖x − y_j‖²/(2σ²(1 − t)))

    with g the potential of the entropic transport between the clouds at ε = 2σ². Léonard 2014 (arXiv 1308.0215); Pooladian &
    Niles-Weed 2024 (arXiv 2408.11686).

    Args:
        x: (n, d).
        y: (m, d).
        sigma: σ, in the unit of the points.
        a, b: weights (n,) and (m,), uniform by default.
        tolerance: of the transport, see :func:`~atlas_diffusers.transport.entropic_transport`.

    Raises:
        ValueError: for a σ that is not positive, and for clouds and weights that do not fit.
    """

    def __init__(self, x: torch.Tensor, y: torch.Tensor, sigma: float, a=None, b=None, tolerance: float = 1e-6):
        if not 0 < sigma < math.inf:
            raise ValueError(f"sigma={sigma}; expected a positive number")
        self.x, self.y, self.sigma = x, y, sigma
        self.transport = entropic_transport(x, y, 2 * sigma**2, a, b, tolerance=tolerance)
        self._log_weights = (self.transport.b.log() + self.transport.g / (2 * sigma**2)).to(y.dtype)

    def endpoint(self, x: torch.Tensor, t: float) -> torch.Tensor:
        """``E[y | X_t = x]`` for particles (k, d) at time t in [0, 1)."""
        if not 0 <= t < 1:
            raise ValueError(f"t={t}; expected a time in [0, 1)")
        logits = self._log_weights - torch.cdist(x, self.y).square() / (2 * self.sigma**2 * (1 - t))
        return logits.softmax(1) @ self.y

    def drift(self, x: torch.Tensor, t: float) -> torch.Tensor:
        """``u(x, t)`` for particles (k, d) at time t in [0, 1)."""
        return (self.endpoint(x, t) - x) / (1 - t)

    def sample(self, num_steps: int, generator: torch.Generator | None = None) -> torch.Tensor:
        """Paths of all particles of ``x`` by Euler-Maruyama, ``(num_steps + 1, n, d)``."""
        if num_steps < 1:
            raise ValueError(f"num_steps={num_steps}; expected at least 1")
        path, step = [self.x], 1 / num_steps
        for index in range(num_steps):
            x = path[-1]
            noise = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
            path.append(x + step * self.drift(x, index * step) + self.sigma * math.sqrt(step) * noise)
        return torch.stack(path)
