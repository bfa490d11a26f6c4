"""The Schrödinger bridge between two data sets, from samples, with a Gaussian-mixture potential."""

import json
import math
import warnings
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from .mixture_fit import Cloud, Points, residual
from .mixture_potential import MixturePotential
from .mixture_stages import fit_potential

COVARIANCES = ("diag", "full")
CONVERGED = 0.05  # residual, in standard deviations
WEIGHTS, SETTINGS = "mixture_bridge.safetensors", "mixture_bridge.json"


class MixtureBridge:
    r"""
    The Schrödinger bridge from the law of x to the law of y with Brownian motion of variance ε as reference:

        min_π KL(π | exp(−|x − y|²/2ε) dx dy),    π(y|x) = exp(xᵀy/ε) v(y) / c(x),    v a mixture of Gaussians,

    fitted to samples by the objective ``E_x log c(x) − E_y log v(y)``, whose least value it has at the bridge. Then plan,
    moments, drift and paths have closed forms. Korotin et al. 2023 (arXiv 2310.01174); Gushchin et al. 2023 (arXiv 2306.10161).

    Here ``ε = σ²`` with the cost ``½|x − y|²``; the ε of :func:`~atlas_diffusers.transport.entropic_transport` is 2σ².

    Args:
        components: number of Gaussians, or `auto`: twelve, merged while the objective on held-out points does not suffer.
        covariance: `diag`, or `full` for few dimensions or many samples.
        restarts: starts of which the best on held-out points is taken.
        max_iterations: of the refinement by L-BFGS.
        seed: of starts and held-out points.

    Raises:
        ValueError: for options out of range.
    """

    def __init__(
        self,
        components: int | str = "auto",
        covariance: str = "diag",
        restarts: int = 2,
        max_iterations: int = 100,
        seed: int = 0,
    ):
        if components != "auto" and not (isinstance(components, int) and components >= 1):
            raise ValueError(f"components={components!r}; expected 'auto' or a positive integer")
        if covariance not in COVARIANCES:
            raise ValueError(f"covariance={covariance!r}; allowed are {COVARIANCES}")
        if restarts < 1:
            raise ValueError(f"restarts={restarts}; expected at least 1")
        self.components, self.covariance_type = components, covariance
        self.restarts, self.max_iterations, self.seed = restarts, max_iterations, seed
        self._potential: MixturePotential | None = None
        self._source_mean = self._target_mean = torch.zeros(0, dtype=torch.float64)
        self._scale, self.residual = 1.0, math.nan

    # ------------------------------------------------------------------ fitting

    @torch.no_grad()
    def fit(
        self,
        x: Points | Iterable[Points],
        y: Points | Iterable[Points],
        epsilon: float,
        x_weights: Points | None = None,
        y_weights: Points | None = None,
    ) -> "MixtureBridge":
        """
        Fit the potential to samples of the two laws, which need not be paired nor equally many.

        Args:
            x, y: (n, D) and (m, D), or batches of them.
            epsilon: ε, in squared units of the points.
            x_weights, y_weights: (n,) and (m,), non-negative; uniform by default.

        Returns:
            The bridge itself. A fit that is not stationary warns with its residual.

        Raises:
            ValueError: for an ε that is not positive, points that are not finite or do not fit, too few of them, and
                coordinates in which all y are equal.
        """
        if not 0 < epsilon < math.inf:
            raise ValueError(f"epsilon={epsilon}; expected a positive number")
        source, target = Cloud.of("x", x, x_weights), Cloud.of("y", y, y_weights)
        if source.points.shape[1] != target.points.shape[1]:
            raise ValueError(f"x has {source.points.shape[1]} coordinates, y has {target.points.shape[1]}")
        least = 2 if self.components == "auto" else max(2, int(self.components))
        if len(target) < least or len(source) < 2:
            raise ValueError(
                f"{len(source)} and {len(target)} samples; expected at least 2 and {least} for components={self.components!r}"
            )
        self._source_mean, self._target_mean = (cloud.weights @ cloud.points for cloud in (source, target))
        centred = source.points - self._source_mean, target.points - self._target_mean
        variance = target.weights @ centred[1].square()
        if constant := torch.nonzero(variance <= 1e-24 * (1 + self._target_mean.square()))[:, 0].tolist():
            raise ValueError(f"coordinates {constant[:5]} of y are constant: leave them out, the bridge there is a point")
        self._scale = variance.mean().sqrt().item()
        start, end = (Cloud(points / self._scale, each.weights) for points, each in zip(centred, (source, target)))
        count = None if self.components == "auto" else int(self.components)
        generator = torch.Generator().manual_seed(self.seed)
        self._potential = fit_potential(
            start, end, epsilon / self._scale**2, count, self.covariance_type == "full", generator, self.restarts,
            self.max_iterations,
        )  # fmt: skip
        self.residual = residual(self._potential, start, end)
        if not self.residual <= CONVERGED:
            warnings.warn(
                f"the bridge is not stationary: its moments are off by {self.residual:.2g} standard deviations; "
                "fit more samples, other components, or allow more max_iterations",
                stacklevel=2,
            )
        return self

    @property
    def potential(self) -> MixturePotential:
        """The fitted potential, in coordinates that are centred and divided by one scale; ``ValueError`` before ``fit``."""
        if self._potential is None:
            raise ValueError("the bridge is not fitted; call fit(x, y, epsilon) first")
        return self._potential

    @property
    def epsilon(self) -> float:
        """ε of the fit, in squared units of the points."""
        return self.potential.epsilon * self._scale**2

    def objective(self, x: Points, y: Points) -> float:
        """``E_x log c(x) − E_y log v(y)`` on other samples, lower for a better fit; up to a constant of the fit's data."""
        (u, _), (v, _) = self._source(x), self._target(y)
        p = self.potential
        return (p.log_partition(u).logsumexp(1).mean() - p.log_components(v).logsumexp(1).mean()).item()

    # ------------------------------------------------------------------ the plan

    def mean(self, x: Points) -> Any:
        """``E[y | x]``, (n, D)."""
        u, kind = self._source(x)
        return kind(self._from_target(self.potential.expected(u, 0.0)))

    def covariance(self, x: Points) -> Any:
        """``Cov[y | x]``, (n, D, D)."""
        u, kind = self._source(x)
        log_weights, means, inner = self.potential.posterior(u, 0.0)
        weights = log_weights.exp()
        centred = means - (weights[:, :, None] * means).sum(1, keepdim=True)
        outer = torch.einsum("nk,nki,nkj->nij", weights, centred, centred)
        within = torch.einsum("nk,kij->nij", weights, inner) if inner.ndim == 3 else torch.diag_embed(weights @ inner)
        return kind(self._scale**2 * (outer + within))

    def sample(self, x: Points, generator: torch.Generator | None = None) -> Any:
        """One y of π(y|x) for every x, (n, D)."""
        u, kind = self._source(x)
        return kind(self._from_target(self.potential.draw(u, 0.0, generator)))

    def pairs(self, x: Points, generator: torch.Generator | None = None) -> tuple[Any, Any]:
        """``(x, y)`` with y drawn from π(y|x): a coupling for bridge matching."""
        return x, self.sample(x, generator)

    def log_prob(self, y: Points, x: Points) -> Any:
        """``log π(y|x)``, (n,), of pairs."""
        (u, _), (v, kind) = self._source(x), self._target(y)
        p = self.potential
        joint = (u * v).sum(1) / p.epsilon + p.log_components(v).logsumexp(1) - p.log_partition(u).logsumexp(1)
        return kind(joint - v.shape[1] * math.log(self._scale))

    def log_potential(self, y: Points) -> Any:
        """``log v(y)``, (n,), up to a constant."""
        v, kind = self._target(y)
        # the plan of centred points is the plan; their potential differs by the cross term of the means
        tilt = v @ self._source_mean / (self._scale * self.potential.epsilon)
        return kind(self.potential.log_components(v).logsumexp(1) - tilt)

    # ------------------------------------------------------------------ the process

    def drift(self, x: Points, t: float) -> Any:
        """``u(x, t) = (E[y | X_t = x] − x)/(1 − t)`` of ``dX = u dt + √ε dW``, (n, D), at t in [0, 1)."""
        z, kind = self._points("x", x)
        return kind((self._from_target(self.potential.expected(self._at(z, t), t)) - z) / (1 - t))

    def sample_path(self, x: Points, steps: int, generator: torch.Generator | None = None) -> Any:
        """
        Paths of the bridge at t = 0, 1/steps, ..., 1, (steps + 1, n, D); exact in law for any number of steps.

        A step draws the end given the present, and the next point from the Brownian bridge between the two.
        """
        if not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps={steps!r}; expected a positive integer")
        z, kind = self._points("x", x)
        path = [z]
        for index in range(steps):
            t, left = index / steps, steps - index
            end = self._from_target(self.potential.draw(self._at(path[-1], t), t, generator))
            spread = math.sqrt(self.epsilon / steps * (left - 1) / left)
            noise = torch.randn(z.shape, generator=generator, dtype=z.dtype)
            path.append(torch.lerp(path[-1], end, 1 / left) + spread * noise)
        return kind(torch.stack(path))

    def interpolate(self, x: Points, t: float, generator: torch.Generator | None = None) -> Any:
        """``X_t`` given ``X_0 = x``, (n, D), at t in [0, 1]."""
        z, kind = self._points("x", x)
        if not 0 <= t <= 1:
            raise ValueError(f"t={t}; expected a time in [0, 1]")
        end = self._from_target(self.potential.draw(self._at(z, 0.0), 0.0, generator))
        noise = torch.randn(z.shape, generator=generator, dtype=z.dtype)
        return kind(torch.lerp(z, end, t) + math.sqrt(self.epsilon * t * (1 - t)) * noise)

    # ------------------------------------------------------------------ files

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the fitted bridge: tensors as safetensors, the rest as JSON."""
        p = self.potential
        Path(folder).mkdir(parents=True, exist_ok=True)
        tensors = {f.name: getattr(p, f.name).contiguous() for f in fields(p) if f.name != "epsilon"}
        save_file({**tensors, "source_mean": self._source_mean, "target_mean": self._target_mean}, Path(folder) / WEIGHTS)
        settings = {
            "components": self.components, "covariance": self.covariance_type, "restarts": self.restarts,
            "max_iterations": self.max_iterations, "seed": self.seed, "epsilon": p.epsilon, "scale": self._scale,
            "residual": self.residual,
        }  # fmt: skip
        (Path(folder) / SETTINGS).write_text(json.dumps(settings, indent=1), encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "MixtureBridge":
        """
        Read what ``save_pretrained`` wrote.

        Raises:
            OSError: for a folder without a bridge.
        """
        if missing := [name for name in (WEIGHTS, SETTINGS) if not (Path(folder) / name).is_file()]:
            raise OSError(f"{folder} has no bridge: {missing[0]} is missing")
        settings = json.loads((Path(folder) / SETTINGS).read_text(encoding="utf-8"))
        epsilon, scale, error = settings.pop("epsilon"), settings.pop("scale"), settings.pop("residual")
        bridge, tensors = cls(**settings), load_file(Path(folder) / WEIGHTS)
        bridge._source_mean, bridge._target_mean = tensors.pop("source_mean"), tensors.pop("target_mean")
        bridge._potential, bridge._scale, bridge.residual = MixturePotential(**tensors, epsilon=epsilon), scale, error
        return bridge

    def __repr__(self) -> str:
        if self._potential is None:
            return f"MixtureBridge(components={self.components!r}, covariance={self.covariance_type!r}, not fitted)"
        p = self._potential
        shares = (p.log_mass - p.log_mass.logsumexp(0)).exp()
        return (
            f"MixtureBridge({len(p)} {self.covariance_type} components in {p.mean.shape[1]} dimensions, "
            f"epsilon={self.epsilon:.4g}, largest component {shares.max():.2f}, residual {self.residual:.2g})"
        )

    # ------------------------------------------------------------------ coordinates

    def _source(self, x: Points):
        z, kind = self._points("x", x)
        return (z - self._source_mean) / self._scale, kind

    def _target(self, y: Points):
        z, kind = self._points("y", y)
        return (z - self._target_mean) / self._scale, kind

    def _points(self, name: str, given: Points):
        """Points as float64, and what brings results back to the kind and type of the points."""
        points, dimensions = torch.as_tensor(given), self.potential.mean.shape[1]
        if points.ndim != 2 or points.shape[1] != dimensions:
            raise ValueError(f"{name} has shape {tuple(points.shape)}; expected (n, {dimensions})")
        dtype = points.dtype if points.is_floating_point() else torch.float64

        def back(result: torch.Tensor) -> Points:
            result = result.to(dtype)
            return result if torch.is_tensor(given) else result.numpy()

        return points.double(), back

    def _at(self, z: torch.Tensor, t: float) -> torch.Tensor:
        """Centred coordinates of points at time t; the centre moves from the mean of x to that of y."""
        if not 0 <= t < 1:
            raise ValueError(f"t={t}; expected a time in [0, 1)")
        return (z - torch.lerp(self._source_mean, self._target_mean, t)) / self._scale

    def _from_target(self, v: torch.Tensor) -> torch.Tensor:
        return v * self._scale + self._target_mean
