"""The static Schrödinger bridge between the particles being sampled and a set of reference data."""

import logging
import math
from dataclasses import dataclass, field
from typing import Any

import torch

from ..kernels import KERNEL_OPERATORS, DirectKernel, KernelOperator, NystromKernel, make_kernel_operator
from ..kernels.choice import DIRECT_LIMIT
from ..transport import SinkhornOutput, extrapolate_potentials, sinkhorn
from ..transport.costs import DEFAULT_MAX_BYTES
from ..transport.split_costs import SplitCost
from .references import ReferencePoints, ReferenceSet

logger = logging.getLogger(__name__)
LEAST_SIGNAL = 1e-6  # α/σ
PROBED = 256  # noised references that stand for particles
WITHOUT_SIGNAL = 1e100  # σ/α at which every reference is as likely as its weight


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
        references: ``y``, ``(m, ...)``, clean data or latents, m ≥ 2; or :class:`~atlas_diffusers.bridges.ReferenceShards`.
        weights: ``b``, ``(m,)``, non-negative, normalised here; uniform by default.
        epsilon: multiplies the squared bandwidth σ²; above 1 it blurs.
        rho: weight of the column constraint in units of ``2 ε (σ/α)²``: v is scaled by ρ/(ρ+1), exact for infinity. By default
            by n/M for n particles and M > n references (exp of the entropy of b), and exact otherwise: few particles cannot
            stand for all references, and would be blurred by it.
        tolerance: L1 error of the marginals at which the potentials are good.
        max_iterations: limit of the solver; reaching it warns.
        solver_type: kernel operator, as of :func:`~atlas_diffusers.kernels.make_kernel_operator`. A Nyström approximation that
            the true kernel contradicts is replaced by the direct operator, with a log entry.
        kernel_options: further arguments of it: ``num_landmarks``, ``num_features``, ``orthogonal``, and ``max_bytes``, the
            largest kernel matrix that is stored, and block of a projection; a larger one is computed in blocks.

    Raises:
        ValueError: for fewer than two references, NaN, shapes that do not fit, weights that are negative or all zero.
    """

    references: torch.Tensor | ReferenceSet
    weights: torch.Tensor | None = None
    epsilon: float = 1.0
    rho: float | None = None
    tolerance: float = 1e-3
    max_iterations: int = 1000
    solver_type: str = "auto"
    kernel_options: dict[str, Any] = field(default_factory=dict)
    _set: ReferenceSet = field(init=False, repr=False)

    def __post_init__(self):
        y = self.references
        if len(y.shape) < 2 or len(y) < 2:
            raise ValueError(f"references must be at least two points, (m, ...), got shape {tuple(y.shape)}")
        self._set = y if isinstance(y, ReferenceSet) else ReferencePoints(y)
        if not self.epsilon > 0 or not (self.rho is None or self.rho > 0):
            raise ValueError(f"expected epsilon > 0 and rho > 0 or None, got epsilon={self.epsilon} and rho={self.rho}")
        if self.solver_type not in ("auto", *KERNEL_OPERATORS):
            allowed = ["auto", *sorted(KERNEL_OPERATORS)]
            raise ValueError(f"solver_type={self.solver_type!r} is unknown; allowed are {allowed}")
        if self.solver_type not in ("auto", "direct") and not isinstance(self._set, ReferencePoints):
            raise ValueError(f"solver_type={self.solver_type!r} needs references in memory; allowed are ['auto', 'direct']")
        self._log_weights = _log_weights(self.weights, len(y)).to(self._set.device)

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
        references, shape = self._set, tuple(particles.shape)
        if shape[1:] != references.shape[1:]:
            raise ValueError(f"particles have shape {shape[1:]}, references {references.shape[1:]}")
        state, solution, x = state or BridgeState(), None, particles.flatten(1).to(references.device, references.dtype)
        if alpha == 0:  # all particles are alike
            x, alpha, sigma = torch.zeros_like(x), 1.0, WITHOUT_SIGNAL
        elif len(x) > 1:
            solution = self._solve(x / alpha, alpha, sigma, state)
            state = state.followed_by(math.log(alpha / sigma), solution.g)
        width = self._width(alpha, sigma)
        if solution is not None and isinstance(solution.geometry, SplitCost):
            cost = solution.geometry
        else:
            cost = references.cost(x / alpha, width, self._max_bytes)
        psi = self._log_weights[None]
        if solution is not None:
            psi = torch.cat((psi, psi + solution.g / width))
        means, sizes = references.average(cost, psi)
        return BridgeCoupling(
            data=means[-1].view(shape).to(particles.dtype),
            posterior=means[0].view(shape).to(particles.dtype),
            effective_references=sizes[-1],
            state=state,
            kernel_applications=0 if solution is None else solution.kernel_applications,
            marginal_error=0.0 if solution is None else float(solution.row_error),
        )

    @property
    def _max_bytes(self) -> int:
        return self.kernel_options.get("max_bytes", DEFAULT_MAX_BYTES)

    def _width(self, alpha: float, sigma: float) -> float:
        """ε of the transport in data units, ``2 ε (σ/α)²`` with the multiplier ε of this bridge."""
        return 2 * self.epsilon * (sigma / alpha) ** 2

    def _solve(self, x: torch.Tensor, alpha: float, sigma: float, state: BridgeState) -> SinkhornOutput:
        """Transport of particles in data units."""
        width, rho = self._width(alpha, sigma), self._penalty(len(x))
        start = extrapolate_potentials(state.potentials, state.log_snrs, math.log(alpha / sigma))
        options = {
            "b": self._log_weights.exp(),
            "init": None if start is None else (None, start),
            "rho": None if math.isinf(rho) else (None, rho * width),
            "tolerance": self.tolerance,
            "max_iterations": self.max_iterations,
        }
        operator = self._approximation(x, math.sqrt(width / 2))
        if operator is None:
            return self._set.transport(x, width, self._max_bytes, **options)
        return sinkhorn(operator, **options)

    def _approximation(self, x: torch.Tensor, bandwidth: float) -> KernelOperator | None:
        """The kernel operator that stands for the exact gaussian kernel, if one does."""
        count, options = len(x) * len(self._set), {"num_landmarks": 256, **self.kernel_options}
        if self.solver_type == "direct" or not isinstance(self._set, ReferencePoints):
            return None
        if self.solver_type == "auto" and count <= DIRECT_LIMIT and count * x.itemsize <= self._max_bytes:
            return None
        options["num_landmarks"] = min(options["num_landmarks"], len(x) + len(self._set))
        operator = make_kernel_operator(x, self._set.points, epsilon=bandwidth, solver_type=self.solver_type, **options)
        if isinstance(operator, NystromKernel) and not (probe := operator.probe()).is_good:
            logger.info("bandwidth %.3g: %s; the direct kernel is used", bandwidth, probe)
            return None
        return None if isinstance(operator, DirectKernel) else operator

    def posterior_size(self, alpha: float, sigma: float) -> float:
        """
        How many references explain a sample at this noise level: the gate's measure before there are particles.

        The median over ``PROBED`` noised references of exp(entropy of the posterior among all *other* references); at α = 0
        its limit.
        """
        references, alpha = self._set, max(alpha, LEAST_SIGNAL * sigma)
        generator = torch.Generator(references.device).manual_seed(0)
        chosen = torch.multinomial(self._log_weights.exp(), PROBED, replacement=True, generator=generator)
        clean = references.take(chosen)
        noise = torch.randn(clean.shape, generator=generator, device=references.device).to(clean)
        cost = references.cost(clean + sigma / alpha * noise, self._width(alpha, sigma), self._max_bytes)

        def size(exponents: torch.Tensor, rows: slice) -> torch.Tensor:
            others = exponents[0].scatter(1, chosen[rows, None], -math.inf)
            return torch.special.entr(others.softmax(1).nan_to_num(0.0)).sum(1).exp()

        none = torch.zeros(1, PROBED, dtype=torch.float64, device=references.device)
        return torch.cat(cost.each(size, none, self._log_weights[None])).median().item()

    def _penalty(self, particles: int) -> float:
        if self.rho is not None:
            return self.rho
        references = torch.special.entr(self._log_weights.exp()).sum().exp().item()
        return particles / (references - particles) if particles < references - 0.5 else math.inf

    def nearest_reference(self, samples: torch.Tensor) -> torch.Tensor:
        """Euclidean distance of each sample to its nearest reference, ``(n,)``."""
        return self._set.nearest(samples.flatten(1).to(self._set.device, self._set.dtype))


def _log_weights(weights: torch.Tensor | None, count: int) -> torch.Tensor:
    if weights is None:
        return torch.full((count,), -math.log(count), dtype=torch.float64)
    b = torch.as_tensor(weights).double()
    if b.shape != (count,):
        raise ValueError(f"reference weights have shape {tuple(b.shape)}, references are {count}")
    if not bool((b >= 0).all()) or not bool(b.isfinite().all()) or not b.sum() > 0:
        raise ValueError("reference weights must be finite, non-negative and not all zero, "
                         f"found values from {b.min():g} to {b.max():g}")  # fmt: skip
    return (b / b.sum()).log()
