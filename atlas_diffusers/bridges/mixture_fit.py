"""How a Gaussian-mixture potential is fitted: start, masses, closed-form steps, merging, refinement."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch

from .mixture_potential import MixturePotential

Points = torch.Tensor | np.ndarray
VARIANCE_FLOOR = 1e-9  # of data scaled to unit variance
RELATIVE_RIDGE = 1e-12  # keeps covariances of points in a subspace invertible


@dataclass(frozen=True)
class Cloud:
    """Points (n, D) and their weights (n,), which sum to 1."""

    points: torch.Tensor
    weights: torch.Tensor

    @classmethod
    def of(cls, name: str, given: Points | Iterable[Points], weights: Points | None) -> "Cloud":
        """Points (or batches of them) and weights as float64; ``ValueError`` with the name for what is no cloud."""
        if not isinstance(given, (torch.Tensor, np.ndarray)):
            given = torch.cat([torch.as_tensor(batch) for batch in given])
        points = torch.as_tensor(given).double()
        if points.ndim != 2 or not points.shape[1]:
            raise ValueError(f"{name} has shape {tuple(points.shape)}; expected (n, D)")
        if not bool(points.isfinite().all()):
            raise ValueError(f"{name} has {int((~points.isfinite()).sum())} values that are NaN or infinite")
        if weights is None:
            return cls(points, torch.full((len(points),), 1 / max(1, len(points)), dtype=torch.float64))
        w = torch.as_tensor(weights).double()
        if w.shape != (len(points),) or not bool((w >= 0).all()) or not 0 < w.sum() < math.inf:
            raise ValueError(f"{name}_weights must be {len(points)} non-negative numbers, not all zero")
        return cls(points, w / w.sum())

    def __len__(self) -> int:
        return len(self.points)

    def rows(self, rows: torch.Tensor) -> "Cloud":
        """Some of the points, weighted anew."""
        weights = self.weights[rows]
        return Cloud(self.points[rows], weights / weights.sum())


@dataclass(frozen=True)
class Moments:
    """Masses (K,), means (K, D) and variances (K, D) or covariances (K, D, D) of a cloud shared by responsibilities."""

    mass: torch.Tensor
    mean: torch.Tensor
    covariance: torch.Tensor


def moments(log_shares: torch.Tensor, cloud: Cloud, full: bool) -> Moments:
    """
    Moments of the part of a cloud that each component is responsible for.

    Args:
        log_shares: log c_k or log v_k of the points, (n, K).
        cloud: the points.
        full: whether to return covariances.
    """
    shares = log_shares.softmax(1) * cloud.weights[:, None]
    mass = shares.sum(0) + 1e-300
    mean = shares.T @ cloud.points / mass[:, None]
    if full:
        roots = shares.sqrt()
        parts = [(cloud.points - mean[k]) * roots[:, k : k + 1] for k in range(len(mass))]
        covariance = torch.stack([part.T @ part for part in parts]) / mass[:, None, None]
        ridge = RELATIVE_RIDGE * covariance.diagonal(dim1=1, dim2=2).mean(1)
        return Moments(mass, mean, covariance + torch.diag_embed((ridge + 1e-300)[:, None].expand_as(mean)))
    variance = (shares.T @ cloud.points.square() / mass[:, None] - mean.square()).clamp(min=VARIANCE_FLOOR)
    return Moments(mass, mean, variance)


def gaussian_bridge(source: torch.Tensor, target: torch.Tensor, epsilon: float) -> torch.Tensor:
    r"""
    The covariance S of y given x in the bridge between Gaussians of covariances V₀ and V₁: ``S V₀ S/ε² + S = V₁``.

    Args:
        source, target: V₀ and V₁, variances (..., D) or, square in the last two, covariances (K, D, D).
        epsilon: ε.

    Janati et al. 2020 (arXiv 2006.02572); Bunne et al. 2023 (arXiv 2202.05722).
    """
    if source.ndim == 2:
        return 2 * target / (1 + (1 + 4 * source * target / epsilon**2).sqrt())
    values, vectors = torch.linalg.eigh(source)
    values = torch.maximum(values, 1e-10 * values[:, -1:])
    root = vectors * values.sqrt()[:, None] @ vectors.mT
    inverse = vectors / values.sqrt()[:, None] @ vectors.mT
    inner, axes = torch.linalg.eigh(root @ target @ root)
    inner = inner.clamp(min=0)
    S = inverse @ (axes * (2 * inner / (1 + (1 + 4 * inner / epsilon**2).sqrt()))[:, None] @ axes.mT) @ inverse
    return (S + S.mT) / 2


def balance_masses(potential: MixturePotential, x: Cloud, y: Cloud, iterations: int, tolerance: float = 1e-3):
    """
    Newton's method, damped, for the masses b alone: every component gets the same mass from x as from y.

    Returns:
        The potential, its objective, and log c_k(x) and log v_k(y) with the new masses.
    """
    log_c, log_v = potential.log_partition(x.points), potential.log_components(y.points)

    def objective(shift: torch.Tensor) -> float:
        return (x.weights @ (log_c + shift).logsumexp(1) - y.weights @ (log_v + shift).logsumexp(1)).item()

    shift, current = torch.zeros_like(potential.log_mass), objective(torch.zeros_like(potential.log_mass))
    for _ in range(iterations):
        shares = (log_c + shift).softmax(1)
        from_x = x.weights @ shares
        gradient = from_x - y.weights @ (log_v + shift).softmax(1)
        if gradient.abs().sum() < tolerance:
            break
        hessian = torch.diag(from_x) - shares.T @ (shares * x.weights[:, None])
        ridge = (1e-6 + 1e-3 * gradient.abs().sum()) / len(shift) + 1e-10
        step = -torch.linalg.solve(hessian + ridge * torch.eye(len(shift)).to(hessian), gradient)
        step -= step.mean()
        length, accepted = min(1.0, 20 / step.abs().max().item()), False
        for _ in range(12):
            value = objective(shift + length * step)
            if accepted := value < current + 1e-4 * length * (gradient @ step).item():
                shift, current = shift + length * step, value
                break
            length /= 2
        if not accepted:
            break
    return replace(potential, log_mass=potential.log_mass + shift), current, log_c + shift, log_v + shift


def closed_form_steps(
    potential: MixturePotential, x: Cloud, y: Cloud, iterations: int, tolerance: float = 1e-6
) -> tuple[MixturePotential, float]:
    """
    Steps towards the bridge between the Gaussians that each component sees, shortened until the objective falls.

    Returns:
        The potential and its objective.
    """
    full = potential.is_full
    potential, current, log_c, log_v = balance_masses(potential, x, y, 30)
    length = 1.0
    for _ in range(iterations):
        source, target = moments(log_c, x, full), moments(log_v, y, full)
        here = potential.about(source.mean)
        best = gaussian_bridge(source.covariance, target.covariance, potential.epsilon)
        length, found = min(1.0, 2 * length), None
        for _ in range(6):
            covariance = _between(here.covariance, best, length)
            # the mass that a component of another covariance gets from x stays
            change = (source.covariance * (covariance - here.covariance)).flatten(1).sum(1) / (2 * potential.epsilon**2)
            mean = torch.lerp(here.mean, target.mean, length)
            trial = replace(here, log_mass=here.log_mass - change, mean=mean, covariance=covariance)
            candidate = balance_masses(trial, x, y, 6)
            if candidate[1] < current:
                found = candidate
                break
            length /= 3
        if found is None:
            break
        fell = current - found[1]
        potential, current, log_c, log_v = found
        if fell < tolerance * max(1.0, abs(current)):
            break
    return potential, current


def _between(start: torch.Tensor, end: torch.Tensor, length: float) -> torch.Tensor:
    if start.ndim == 3:
        return torch.lerp(start, end, length)
    return torch.lerp(start.log(), end.log(), length).exp()


def refine(potential: MixturePotential, x: Cloud, y: Cloud, iterations: int) -> MixturePotential:
    """L-BFGS on the objective over the masses, means and log variances of diagonal components, scaled by their curvature."""
    source = moments(potential.log_partition(x.points), x, full=False)
    start = potential.about(source.mean)
    mass = source.mass.clamp(min=1e-4)[:, None]
    mean_scale = (mass * (1 / start.covariance + source.covariance / start.epsilon**2)).rsqrt()
    log_scale = (mass / 2).rsqrt()
    moves = [torch.zeros_like(v, requires_grad=True) for v in (start.log_mass, start.mean, start.covariance)]

    def moved() -> MixturePotential:
        db, dm, ds = moves
        covariance = start.covariance * (ds * log_scale).clamp(-20, 20).exp()
        return replace(start, log_mass=start.log_mass + db, mean=start.mean + dm * mean_scale, covariance=covariance)

    optimiser = torch.optim.LBFGS(
        moves, max_iter=1, history_size=20, line_search_fn="strong_wolfe", tolerance_grad=1e-7, tolerance_change=0
    )

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        loss = moved().objective(x.points, y.points, x.weights, y.weights)
        loss.backward()
        return loss

    best, best_loss, last = potential, potential.objective(x.points, y.points, x.weights, y.weights).item(), None
    for _ in range(iterations):
        with torch.enable_grad():
            optimiser.step(closure)
        with torch.no_grad():
            loss = moved().objective(x.points, y.points, x.weights, y.weights).item()
            if not loss < best_loss:
                break
            best = moved()
        best_loss, last = loss, best_loss
        if last - best_loss < 1e-10 * max(1.0, abs(best_loss)):
            break
    return replace(best, **{name: getattr(best, name).detach() for name in ("log_mass", "mean", "covariance")})


def residual(potential: MixturePotential, x: Cloud, y: Cloud) -> float:
    r"""
    How far a potential is from stationary: the largest error, weighted by mass, of ``n_k(x) = n_k(y)``, of
    ``E_y = m + S(E_x − a)/ε`` in standard deviations, and of ``Var_y = S Var_x S/ε² + S`` relative to Var_y.
    """
    full, eps = potential.is_full, potential.epsilon
    source = moments(potential.log_partition(x.points), x, full)
    target = moments(potential.log_components(y.points), y, full)
    here = potential.about(source.mean)
    S = here.covariance
    spread = S @ source.covariance @ S / eps**2 + S if full else S.square() * source.covariance / eps**2 + S
    variance = target.covariance.diagonal(dim1=1, dim2=2) if full else target.covariance
    scale = (variance[:, :, None] * variance[:, None]).sqrt() if full else variance
    errors = [
        (source.mass - target.mass).abs(),
        target.mass * ((here.mean - target.mean).abs() / variance.sqrt()).amax(1),
        target.mass * ((spread - target.covariance).abs() / scale).flatten(1).amax(1),
    ]
    return torch.stack(errors).max().item()
