"""Pictures of the Schrödinger-bridge step: where it reaches, and what it does to trajectories and proportions."""

import math
from pathlib import Path
from typing import Any

import torch

from ..bridges import GatedBridge, SchrodingerBridgeSolver
from ..metrics import manifold_overlap
from .plots import check_path, new_figure

LOG_SNRS = torch.linspace(-5, 1, 49, dtype=torch.float64)
MODES, SPREAD = 8, 0.12
BIAS = torch.tensor([6.0, 1, 1, 1, 3, 1, 1, 0.3], dtype=torch.float64)


def level(log_snr: float) -> tuple[float, float]:
    """Variance-preserving ``(α, σ)`` at ``λ = log(α/σ)``."""
    return 1 / math.hypot(1, math.exp(-log_snr)), 1 / math.hypot(1, math.exp(log_snr))


def ring(count: int, seed: int) -> torch.Tensor:
    """Points of eight Gaussians on the unit circle, in turn, ``(count, 2)``."""
    generator = torch.Generator().manual_seed(seed)
    return _centres()[torch.arange(count) % MODES] + SPREAD * torch.randn(count, 2, generator=generator, dtype=torch.float64)


def denoise(x: torch.Tensor, alpha: float, sigma: float, weights: torch.Tensor) -> torch.Tensor:
    """``E[x_0 | x]`` of the ring with these weights of its modes, ``(n, 2)``: the network of the picture."""
    variance = alpha**2 * SPREAD**2 + sigma**2
    share = (weights.log() - torch.cdist(x, alpha * _centres()).square() / (2 * variance)).softmax(1)
    means = share @ _centres()
    return means + alpha * SPREAD**2 / variance * (x - alpha * means)


def trajectories(bridged: bool, count: int = 400, steps: int = 40, gate: float = 10.0) -> tuple[torch.Tensor, int]:
    """DDIM paths ``(steps + 1, count, 2)`` of a network with biased weights, and at how many steps it was called."""
    x = torch.randn(count, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    bridge, calls, path = GatedBridge(SchrodingerBridgeSolver(ring(count, 1)), gate), 0, [x]
    grid = [level(value) for value in torch.linspace(-4, 4, steps + 1).tolist()]
    for (alpha, sigma), (next_alpha, next_sigma) in zip(grid, grid[1:]):
        if bridged and (coupling := bridge.couple(x, alpha, sigma)) is not None:
            data = coupling.data
        else:
            data, calls = denoise(x, alpha, sigma, BIAS), calls + 1
        x = next_alpha * data + next_sigma * (x - alpha * data) / sigma
        path.append(x)
    return torch.stack(path), calls


def shares(points: torch.Tensor) -> torch.Tensor:
    """Fractions of the points by nearest mode, ``(8,)``."""
    return torch.bincount(torch.cdist(points, _centres()).argmin(1), minlength=MODES) / len(points)


def plot_bridge(references: torch.Tensor, path: str | Path, gate: float = 10.0):
    """
    Draw the effective references against noise with the gate, 2-D trajectories, and coverage with and without the bridge.

    The 2-D example is a ring of eight Gaussians with a network that weights them wrongly.

    Args:
        references: ``(m, ...)``, for the first panel.
        path: PNG or SVG file to write.
        gate: effective references below which the bridge ends.

    Returns:
        The ``matplotlib.figure.Figure``.

    Raises:
        ValueError: for another kind of file, a gate below 1, or references that are no clean data.
        ImportError: without matplotlib, which the extra `plot` installs.
    """
    path = Path(path)
    check_path(path)
    if not gate >= 1:
        raise ValueError(f"gate={gate}; expected at least 1")
    figure = new_figure()
    (reach, proportions), (alone, bridged) = figure.subplots(2, 2)
    _draw_reach(reach, SchrodingerBridgeSolver(references), gate)
    found = {"references": shares(ring(400, 1))}
    for axes, title in ((alone, "network alone"), (bridged, "with the bridge")):
        paths, calls = trajectories(title != "network alone")
        coverage = manifold_overlap(ring(400, 2), paths[-1]).coverage
        found[title] = shares(paths[-1])
        axes.plot(*paths[:, ::8].unbind(-1), color="C0" if axes is alone else "C1", linewidth=0.6, alpha=0.6)
        axes.scatter(*paths[-1].T, s=4, color="k", zorder=3)
        axes.set(title=f"{title}: {calls} calls of 40 steps, coverage {coverage:.2f}", xlim=(-3, 3), ylim=(-2.2, 2.2))
    width = 0.8 / len(found)
    for row, (name, values) in enumerate(found.items()):
        colour = {"references": "0.6", "network alone": "C0"}.get(name, "C1")
        proportions.bar(torch.arange(MODES) + (row - 1) * width, values, width, color=colour, label=name)
    proportions.set(title="share of samples by mode, biased network", xlabel="mode", xticks=range(MODES))
    proportions.legend(fontsize="small")
    figure.savefig(path)
    return figure


def draw_effective_references(report: Any, gate: float):
    """
    The figure of the effective references at every coupled step of a call, one line a group of samples, with the gate.

    Args:
        report: :class:`~atlas_diffusers.denoising.BridgeReport` of the call.
        gate: where it closed.
    """
    figure = new_figure()
    axes = figure.subplots()
    for group, sizes in enumerate(report.effective_references):
        axes.semilogy(range(1, len(sizes) + 1), sizes, marker="o", label=f"group {group + 1}")
    axes.axhline(gate, color="0.4", linestyle="--", label=f"gate {gate:g}")
    axes.set(title="effective references of the coupled steps", xlabel="step", ylabel="median of exp(entropy)")
    axes.legend()
    return figure


def _draw_reach(axes: Any, solver: SchrodingerBridgeSolver, gate: float) -> None:
    sizes = [solver.posterior_size(*level(value)) for value in LOG_SNRS.tolist()]
    axes.semilogy(LOG_SNRS, sizes, color="C2")
    axes.axhline(gate, color="k", linestyle="--", linewidth=0.8)
    shut = [value for value, size in zip(LOG_SNRS.tolist(), sizes) if size < gate]
    if shut:
        axes.axvline(shut[0], color="k", linestyle=":", linewidth=0.8)
    dimension = math.prod(solver.references.shape[1:])
    title = f"effective references of {len(solver.references)}, {dimension}-d; gate {gate:g}"
    axes.set(title=title, xlabel="log(α/σ)", ylabel="median of exp(entropy)")


def _centres() -> torch.Tensor:
    angles = torch.arange(MODES, dtype=torch.float64) * (2 * math.pi / MODES)
    return torch.stack((angles.cos(), angles.sin()), 1)
