"""The stages of a fit: starts on a part of the samples, the best of them on all samples, refinement, full covariances."""

from dataclasses import replace

import torch

from .mixture_components import merge, start_from_clusters
from .mixture_fit import Cloud, closed_form_steps, refine
from .mixture_potential import MixturePotential

MOST_COMPONENTS, SUBSAMPLE = 12, 8000


def fit_potential(
    x: Cloud, y: Cloud, epsilon: float, components: int | None, full: bool, generator: torch.Generator, restarts: int,
    max_iterations: int,
) -> MixturePotential:  # fmt: skip
    """
    The potential that fits two clouds.

    Args:
        x, y: centred clouds of about unit variance.
        epsilon: ε.
        components: their number; ``None`` starts from ``MOST_COMPONENTS`` and merges.
        full: whether covariances are full in the end.
        generator: of starts and splits.
        restarts: starts of which the best on held-out points goes on.
        max_iterations: of the refinement.
    """
    (x_train, x_held), (y_train, y_held) = _split(x, generator), _split(y, generator)
    found = []
    for _ in range(restarts):
        count = components or min(MOST_COMPONENTS, max(1, len(y_train) // 10))
        trial = start_from_clusters(x_train, y_train, epsilon, count, generator)
        trial, _ = closed_form_steps(trial, x_train, y_train, 8)
        if components is None:
            trial = merge(trial, x_train, y_train, x_held, y_held)
        found.append((trial.objective(x_held.points, y_held.points, x_held.weights, y_held.weights).item(), len(trial), trial))
    potential = min(found, key=lambda each: each[:2])[2]
    potential, _ = closed_form_steps(potential, x, y, 15)
    if len(potential) > 1:
        potential = refine(potential, x, y, max_iterations)
    if full:
        potential = replace(potential, covariance=torch.diag_embed(potential.covariance))
        potential, _ = closed_form_steps(potential, x, y, 60, tolerance=2e-6)
    return potential


def _split(cloud: Cloud, generator: torch.Generator) -> tuple[Cloud, Cloud]:
    """A training part of at most ``SUBSAMPLE`` points and a held-out part of at most as many."""
    order = torch.randperm(len(cloud), generator=generator)
    training = min(SUBSAMPLE, max(1, int(0.7 * len(cloud))))
    held = order[training : training + SUBSAMPLE]
    return cloud.rows(order[:training]), cloud.rows(held if len(held) else order)
