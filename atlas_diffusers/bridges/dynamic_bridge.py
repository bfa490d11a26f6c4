"""The dynamic Schrödinger bridge between two point clouds: a drift in time, and a sampler that follows it."""

import math

import numpy as np
import torch

from ..transport import SinkhornOutput, entropic_transport
from ..transport.arrays import ArrayView, as_arrays, as_tensor
from ..transport.costs import DEFAULT_MAX_BYTES
from ..transport.split_costs import PointCost


class DynamicBridge:
    r"""
    The diffusion closest to Brownian motion of scale σ that carries cloud ``x`` (t = 0) to cloud ``y`` (t = 1):

        dX = u(X, t) dt + σ dW,    u(x, t) = (E[y | X_t = x] − x)/(1 − t)
        E[y | X_t = x] = Σ_j w_j y_j / Σ_j w_j,    w_j = b_j exp(g_j/(2σ²) − ‖x − y_j‖²/(2σ²(1 − t)))

    with g the potential of the entropic transport between the clouds at ε = 2σ². Léonard 2014 (arXiv 1308.0215); Pooladian &
    Niles-Weed 2024 (arXiv 2408.11686). From NumPy arrays it computes NumPy arrays.

    Args:
        x: (n, ...), points or pictures.
        y: (m, ...), with the same shape of one point.
        sigma: σ, in the unit of the points.
        a, b: weights (n,) and (m,), uniform by default.
        tolerance: of the transport, see :func:`~atlas_diffusers.transport.entropic_transport`.
        max_bytes: as there; also of the blocks in which end points are computed.

    Raises:
        ValueError: for a σ that is not positive, and for clouds and weights that do not fit.
    """

    def __init__(
        self,
        x: torch.Tensor,
        y: torch.Tensor,
        sigma: float,
        a: torch.Tensor | None = None,
        b: torch.Tensor | None = None,
        tolerance: float = 1e-6,
        max_bytes: int = DEFAULT_MAX_BYTES,
    ):
        if not 0 < sigma < math.inf:
            raise ValueError(f"sigma={sigma}; expected a positive number")
        if isinstance(x, np.ndarray) != isinstance(y, np.ndarray):
            raise ValueError(f"give clouds as tensors or as arrays, not as both: {type(x).__name__} and {type(y).__name__}")
        self._takes_arrays = isinstance(x, np.ndarray)
        x, y = as_tensor(x), as_tensor(y)
        if not (isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor)) or x.shape[1:] != y.shape[1:] or x.ndim < 2:
            shapes = " and ".join(str(tuple(z.shape)) if hasattr(z, "shape") else type(z).__name__ for z in (x, y))
            raise ValueError(f"clouds must be tensors or arrays (n, ...) and (m, ...) of equal points; got {shapes}")
        self.sigma, self._x, self._y = sigma, x, y.flatten(1)
        self._transport = entropic_transport(
            x.flatten(1), self._y, 2 * sigma**2, as_tensor(a), as_tensor(b), tolerance=tolerance, max_bytes=max_bytes
        )
        self._psi = self._transport.b.log() + self._transport.g / (2 * sigma**2)
        self._max_bytes = max_bytes

    @property
    def transport(self) -> SinkhornOutput | ArrayView:
        """The static problem's solution."""
        return ArrayView(self._transport) if self._takes_arrays else self._transport

    def endpoint(self, x: torch.Tensor, t: float) -> torch.Tensor:
        """``E[y | X_t = x]`` for particles (k, ...) at time t in [0, 1)."""
        return self._in_kind(self._endpoint(as_tensor(x), t))

    def drift(self, x: torch.Tensor, t: float) -> torch.Tensor:
        """``u(x, t)`` for particles (k, ...) at time t in [0, 1)."""
        return self._in_kind(self._drift(as_tensor(x), t))

    def sample(self, num_steps: int, generator: torch.Generator | None = None) -> torch.Tensor:
        """Paths of all particles of ``x`` by Euler-Maruyama, ``(num_steps + 1, n, ...)``."""
        if num_steps < 1:
            raise ValueError(f"num_steps={num_steps}; expected at least 1")
        path, step = [self._x], 1 / num_steps
        for index in range(num_steps):
            x = path[-1]
            noise = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
            path.append(x + step * self._drift(x, index * step) + self.sigma * math.sqrt(step) * noise)
        return self._in_kind(torch.stack(path))

    def _drift(self, x: torch.Tensor, t: float) -> torch.Tensor:
        return (self._endpoint(x, t) - x) / (1 - t)

    def _endpoint(self, x: torch.Tensor, t: float) -> torch.Tensor:
        if not 0 <= t < 1:
            raise ValueError(f"t={t}; expected a time in [0, 1)")
        epsilon = torch.tensor([2 * self.sigma**2 * (1 - t)], dtype=torch.float64, device=x.device)
        cost = PointCost(x.flatten(1)[None], self._y[None], epsilon, max_bytes=self._max_bytes)
        return cost.project(self._psi[None], self._y[None])[0].view(x.shape).to(x.dtype)

    def _in_kind(self, values: torch.Tensor) -> torch.Tensor:
        return as_arrays(values) if self._takes_arrays else values
