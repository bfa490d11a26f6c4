"""The static Schrödinger bridge between the particles being sampled and a set of reference data."""

import logging
import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..kernels import KERNEL_OPERATORS, KernelOperator, make_kernel_operator
from ..transport.potentials import extrapolate_potentials
from ..transport.sinkhorn import sinkhorn

logger = logging.getLogger(__name__)
PROBED = 256  # noised references that stand for particles


@dataclass(frozen=True)
class BridgeState:
    """
    What one step hands to the next: the last potentials of the references, to extrapolate from.

    Args:
        log_snrs: log-SNR of the last two solutions, older first.
        potentials: their ``v``, each ``(m,)``, in units of squared distance.
    """

    log_snrs: tuple[float, ...] = ()
    potentials: tuple[torch.Tensor, ...] = ()

    def followed_by(self, log_snr: float, potential: torch.Tensor) -> "BridgeState":
        """The state after another solution; one at the same noise level takes the place of the last."""
        kept = slice(-2, -1) if self.log_snrs[-1:] == (log_snr,) else slice(-1, None)
        return BridgeState((*self.log_snrs[kept], log_snr), (*self.potentials[kept], potential))


@dataclass(frozen=True)
class BridgeCoupling:
    """
    The coupling π at one noise level.

    Args:
        data: the barycentric projection ``T_v(x_i) = Σ_j π_ij y_j / Σ_j π_ij``, the shape of the particles.
        posterior: ``T_0``, the posterior mean ``E[x_0 | x_t = x_i]`` under the references without correction.
        effective_references: exp(entropy of row i of π), ``(n,)``, between 1 and m.
        state: to be handed to the next step.
        kernel_applications: products with the kernel that the potentials took.
        marginal_error: L1 distance of the marginals of π from 1/n and the reference weights.
    """

    data: torch.Tensor
    posterior: torch.Tensor
    effective_references: torch.Tensor
    state: BridgeState
    kernel_applications: int = 0
    marginal_error: float = 0.0

    @property
    def median_effective_references(self) -> float:
        """The gate's measure: how many references a particle's projection is spread over."""
        return self.effective_references.median().item()

    def correct(self, data: torch.Tensor, strength: float = 1.0) -> torch.Tensor:
        """``D(x) + g (T_v(x) − T_0(x))``: a network's data prediction, moved by the bridge's correction."""
        return torch.add(data, (self.data - self.posterior).to(data.dtype), alpha=strength)


@dataclass
class SchrodingerBridgeSolver:
    r"""
    Couples particles ``x_i`` at noise level (α, σ) with references ``y_j``:

        π_ij = exp(u_i) k(x_i, y_j) exp(v_j),    Σ_j π_ij = 1/n,    Σ_i π_ij = b_j,    k = exp(−‖x − α y‖²/(2 ε σ²))

    which for ε = 1 is the Schrödinger bridge with the forward process as reference (Léonard 2014, arXiv 1308.0215; De Bortoli
    et al. 2021, arXiv 2106.01357). With v = 0 the projection is the posterior mean; v is the log of Doob's h-transform that
    makes the whole batch land on the reference marginal.

    Args:
        references: ``y``, ``(m, ...)``, clean data or latents, m ≥ 2.
        weights: ``b``, ``(m,)``, non-negative, normalised here; uniform by default.
        epsilon: multiplies the squared bandwidth σ²; above 1 it blurs.
        rho: weight of the column constraint in units of ``2 ε (σ/α)²``: v is scaled by ρ/(ρ+1), exact for infinity. By default
            by n/M for n particles and M > n references (exp of the entropy of b), and exact otherwise: few particles cannot
            stand for all references, and would be blurred by it.
        tolerance: L1 error of the marginals at which the potentials are good.
        max_iterations: limit of the solver; reaching it warns.
        solver_type: kernel operator, as of :func:`~atlas_diffusers.kernels.make_kernel_operator`. A Nyström approximation that
            the true kernel contradicts is replaced by the direct operator, with a log entry.
        kernel_options: further arguments of it: ``num_landmarks``, ``num_features``, ``orthogonal``, ``max_bytes``.

    Raises:
        ValueError: for fewer than two references, NaN, shapes that do not fit, weights that are negative or all zero.
    """

    references: torch.Tensor
    weights: torch.Tensor | None = None
    epsilon: float = 1.0
    rho: float | None = None
    tolerance: float = 1e-3
    max_iterations: int = 1000
    solver_type: str = "auto"
    kernel_options: dict[str, Any] = field(default_factory=dict)
    _flat: torch.Tensor = field(init=False, repr=False)

    def __post_init__(self):
        y = self.references
        if y.ndim < 2 or len(y) < 2:
            raise ValueError(f"references must be at least two points, (m, ...), got shape {tuple(y.shape)}")
        if not bool(y.isfinite().all()):
            raise ValueError(f"references contain {int((~y.isfinite()).sum())} values that are NaN or infinite")
        if not self.epsilon > 0 or not (self.rho is None or self.rho > 0):
            raise ValueError(f"expected epsilon > 0 and rho > 0 or None, got epsilon={self.epsilon} and rho={self.rho}")
        if self.solver_type not in ("auto", *KERNEL_OPERATORS):
            allowed = ["auto", *sorted(KERNEL_OPERATORS)]
            raise ValueError(f"solver_type={self.solver_type!r} is unknown; allowed are {allowed}")
        self._flat = y.flatten(1)
        self._centre = self._flat.mean(0)
        self._centred = self._flat - self._centre
        self._log_weights = _log_weights(self.weights, len(y)).to(self._flat)

    def couple(
        self, particles: torch.Tensor, alpha: float, sigma: float, state: BridgeState | None = None
    ) -> BridgeCoupling:
        """
        The coupling of the particles at one noise level.

        Args:
            particles: ``x``, ``(n, ...)`` in the coordinates ``x = alpha · x_0 + sigma · ε``.
            alpha, sigma: the noise level; ``alpha = 1`` in VE coordinates.
            state: what the last step returned; ``None`` for a cold start.

        One particle has nothing to balance: its projection is the posterior mean.
        """
        if particles.shape[1:] != self.references.shape[1:]:
            raise ValueError(
                f"particles have shape {tuple(particles.shape[1:])}, references {tuple(self.references.shape[1:])}"
            )
        state, log_snr = state or BridgeState(), _log_snr(alpha, sigma)
        if len(particles) == 1 or math.isinf(log_snr):
            return self._project(particles, alpha, sigma, None, state)
        x_hat = particles.flatten(1).to(self._flat) / alpha
        start = extrapolate_potentials(state.potentials, state.log_snrs, log_snr)
        bandwidth = 2 * self.epsilon * (sigma / alpha) ** 2
        rho = self._penalty(len(particles))
        solution = sinkhorn(
            self._kernel(x_hat, math.sqrt(bandwidth / 2)),
            b=self._log_weights.exp(),
            init=None if start is None else (None, start),
            rho=None if math.isinf(rho) else (None, rho * bandwidth),
            tolerance=self.tolerance,
            max_iterations=self.max_iterations,
        )
        coupling = self._project(particles, alpha, sigma, solution.g, state.followed_by(log_snr, solution.g))
        return replace(
            coupling,
            kernel_applications=solution.kernel_applications,
            marginal_error=float(solution.row_error),
        )

    def _kernel(self, points: torch.Tensor, bandwidth: float) -> KernelOperator:
        options = {"num_landmarks": 256, **self.kernel_options}
        options["num_landmarks"] = min(options["num_landmarks"], len(points) + len(self._flat))
        operator = make_kernel_operator(points, self._flat, epsilon=bandwidth, solver_type=self.solver_type, **options)
        if self.solver_type == "nystrom" and not (probe := operator.probe()).is_good:
            logger.info("bandwidth %.3g: %s; the direct kernel is used", bandwidth, probe)
            operator = make_kernel_operator(points, self._flat, epsilon=bandwidth, solver_type="direct")
        return operator

    def posterior_size(self, alpha: float, sigma: float) -> float:
        """
        How many references explain a sample at this noise level: the gate's measure before there are particles.

        The median over ``PROBED`` noised references of exp(entropy of the posterior among all *other* references).
        """
        generator = torch.Generator(self._flat.device).manual_seed(0)
        chosen = torch.multinomial(self._log_weights.exp(), PROBED, replacement=True, generator=generator)
        noise = torch.randn(PROBED, self._flat.shape[1], generator=generator, device=self._flat.device)
        logits = self._logits(alpha * self._flat[chosen] + sigma * noise.to(self._flat), alpha, sigma)
        others = logits.scatter(1, chosen[:, None], -math.inf)
        rows = others.log_softmax(1).exp().nan_to_num(0.0)
        return torch.special.entr(rows).sum(1).exp().median().item()

    def _penalty(self, particles: int) -> float:
        if self.rho is not None:
            return self.rho
        references = torch.special.entr(self._log_weights.exp()).sum().exp().item()
        return particles / (references - particles) if particles < references - 0.5 else math.inf

    def nearest_reference(self, samples: torch.Tensor) -> torch.Tensor:
        """Euclidean distance of each sample to its nearest reference, ``(n,)``."""
        return torch.cdist(samples.flatten(1).to(self._flat), self._flat).amin(1)

    def _project(self, particles, alpha, sigma, potential, state) -> BridgeCoupling:
        """Posterior mean, and projection with the potentials of the references."""
        logits = self._logits(particles.flatten(1).to(self._flat), alpha, sigma)
        posterior = logits.softmax(1) @ self._centred + self._centre
        if potential is None:
            rows, data = logits.log_softmax(1), posterior
        else:
            rows = (logits + potential.to(logits) / (2 * self.epsilon * (sigma / alpha) ** 2)).log_softmax(1)
            data = rows.exp() @ self._centred + self._centre
        spread = torch.special.entr(rows.exp()).sum(1).exp()
        shape, dtype = particles.shape, particles.dtype
        return BridgeCoupling(data.view(shape).to(dtype), posterior.view(shape).to(dtype), spread, state)

    def _logits(self, x: torch.Tensor, alpha: float, sigma: float) -> torch.Tensor:
        """``log b_j k(x_i, y_j)`` up to a constant a row, (n, m)."""
        y, scale = self._centred, alpha / (self.epsilon * sigma**2)
        return (x - alpha * self._centre) @ (scale * y).T - (0.5 * alpha * scale) * y.square().sum(1) + self._log_weights


def _log_snr(alpha: float, sigma: float) -> float:
    return math.log(alpha / sigma) if alpha > 0 else -math.inf


def _log_weights(weights: torch.Tensor | None, count: int) -> torch.Tensor:
    if weights is None:
        return torch.full((count,), -math.log(count))
    b = torch.as_tensor(weights).double()
    if b.shape != (count,):
        raise ValueError(f"reference weights have shape {tuple(b.shape)}, references are {count}")
    if not bool((b >= 0).all()) or not bool(b.isfinite().all()) or not b.sum() > 0:
        raise ValueError("reference weights must be finite, non-negative and not all zero, "
                         f"found values from {b.min():g} to {b.max():g}")  # fmt: skip
    return (b / b.sum()).log()
