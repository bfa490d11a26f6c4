"""Where a mixture potential starts, and how many components it keeps."""

import torch

from .mixture_fit import VARIANCE_FLOOR, Cloud, balance_masses, closed_form_steps, gaussian_bridge
from .mixture_potential import MixturePotential


def start_from_clusters(x: Cloud, y: Cloud, epsilon: float, count: int, generator: torch.Generator) -> MixturePotential:
    """Diagonal components at the clusters of y (k-means++, best of three), each fed by all of x."""
    centres = min((_cluster(y, count, generator) for _ in range(3)), key=lambda found: found[1])[0]
    nearest = torch.cdist(y.points, centres).argmin(1)
    shares = torch.nn.functional.one_hot(nearest, count).to(y.points) * y.weights[:, None]
    mass = shares.sum(0)
    variance = (shares.T @ y.points.square() / (mass[:, None] + 1e-300) - centres.square()).clamp(min=0)
    pooled = (variance * mass[:, None]).sum(0) / mass.sum()
    trust = 1 / (1 + shares.count_nonzero(0).to(y.points)[:, None] / 20)
    target = torch.lerp(variance, pooled.expand_as(variance), trust).clamp(min=VARIANCE_FLOOR)
    centre = (x.weights @ x.points).expand(count, -1)
    source = (x.weights @ (x.points - centre[0]).square()).clamp(min=VARIANCE_FLOOR).expand(count, -1)
    covariance = gaussian_bridge(source, target, epsilon)
    return MixturePotential(mass.clamp(min=1 / len(y)).log(), centres, covariance, centre.clone(), epsilon)


def _cluster(y: Cloud, count: int, generator: torch.Generator) -> tuple[torch.Tensor, float]:
    """Centres (count, D) of a weighted sample of y and its mean squared distance to them."""
    drawn = torch.multinomial(y.weights, min(5000, len(y)), replacement=len(y) > 5000, generator=generator)
    points = y.points[drawn]
    centres = points[:1]
    distances = torch.cdist(points, centres).square()[:, 0]
    for _ in range(count - 1):
        tries = torch.multinomial(distances + 1e-300, 4, replacement=True, generator=generator)
        shorter = torch.minimum(distances[:, None], torch.cdist(points, points[tries]).square())
        best = shorter.sum(0).argmin()
        centres, distances = torch.cat([centres, points[tries[best]][None]]), shorter[:, best]
    for _ in range(10):
        nearest = torch.cdist(points, centres).argmin(1)
        shares = torch.nn.functional.one_hot(nearest, count).to(points)
        filled = shares.sum(0) > 0
        centres[filled] = (shares.T @ points)[filled] / shares.sum(0)[filled, None]
    return centres, torch.cdist(points, centres).amin(1).square().mean().item()


def merge(potential: MixturePotential, x: Cloud, y: Cloud, x_held: Cloud, y_held: Cloud) -> MixturePotential:
    """
    Join pairs of components down to a single one, and take the fewest components whose objective on held-out points is
    within a standard error of the least.
    """
    path = [potential]
    while len(potential) > 1:
        log_c, log_v = potential.log_partition(x.points), potential.log_components(y.points)
        source, target = log_c.softmax(1) * x.weights[:, None], log_v.softmax(1) * y.weights[:, None]
        tried = [_joined(potential, x, y, source, target, pair) for pair in _alike(potential, target.sum(0))]
        joined = min((balance_masses(trial, x, y, 8) for trial in tried), key=lambda found: found[1])[0]
        potential, _ = closed_form_steps(joined, x, y, 4)
        path.append(potential)
    best = min(path, key=lambda each: each.objective(x_held.points, y_held.points, x_held.weights, y_held.weights).item())
    for candidate in reversed(path):
        rise, error = _held_out_rise(candidate, best, x_held, y_held)
        if rise <= max(error, 1e-6):
            return candidate
    return best


def _alike(potential: MixturePotential, mass: torch.Tensor, pairs: int = 4) -> list[tuple[int, int]]:
    """The pairs of diagonal components that are cheapest to join: symmetrised divergence times their joint mass."""
    m, S = potential.mean, potential.covariance
    moved = (m[:, None] - m).square() * (1 / S[:, None] + 1 / S)
    stretched = S[:, None] / S + S / S[:, None] - 2
    cost = (moved + stretched).sum(2) * (mass[:, None] * mass / (mass[:, None] + mass))
    first, second = torch.triu_indices(len(m), len(m), 1)
    order = cost[first, second].argsort()[:pairs]
    return list(zip(first[order].tolist(), second[order].tolist()))


def _joined(
    potential: MixturePotential, x: Cloud, y: Cloud, source: torch.Tensor, target: torch.Tensor, pair: tuple[int, int]
) -> MixturePotential:
    """The potential with a pair replaced by the bridge between the Gaussians that the two see together."""
    i, j = pair

    def gaussian(shares: torch.Tensor, cloud: Cloud) -> tuple[torch.Tensor, torch.Tensor]:
        both = shares[:, i] + shares[:, j]
        both = both / both.sum()
        mean = both @ cloud.points
        return mean, (both @ cloud.points.square() - mean.square()).clamp(min=VARIANCE_FLOOR)

    (mx, vx), (my, vy) = gaussian(source, x), gaussian(target, y)
    mass = potential.about(mx.expand_as(potential.mean)).log_mass[[i, j]].logsumexp(0)
    rest = [k for k in range(len(potential)) if k not in pair]
    S = gaussian_bridge(vx[None], vy[None], potential.epsilon)
    return MixturePotential(
        torch.cat([potential.log_mass[rest], mass[None]]),
        torch.cat([potential.mean[rest], my[None]]),
        torch.cat([potential.covariance[rest], S]),
        torch.cat([potential.origin[rest], mx[None]]),
        potential.epsilon,
    )


def _held_out_rise(new: MixturePotential, old: MixturePotential, x: Cloud, y: Cloud) -> tuple[float, float]:
    """Difference of the objectives on other points, and its standard error."""
    dx = new.log_partition(x.points).logsumexp(1) - old.log_partition(x.points).logsumexp(1)
    dy = new.log_components(y.points).logsumexp(1) - old.log_components(y.points).logsumexp(1)
    rise = x.weights @ dx - y.weights @ dy
    error = (dx.var() / len(dx) + dy.var() / len(dy)).sqrt()
    return rise.item(), error.item()
