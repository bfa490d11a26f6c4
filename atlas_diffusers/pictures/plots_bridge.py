"""Pictures of the Schrödinger-bridge step: where it reaches, and what it does to trajectories and proportions."""

import math
from pathlib import Path
from typing import Any

import torch

from ..bridges import GatedBridge, SchrodingerBridgeSolver
from ..metrics import manifold_overlap
from .plots import check_path
from .plots_transport import draw_paths
from .styling import COLOURS, new_figure, styled

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


def plot_bridge(
    references: torch.Tensor,
    path: str | Path,
    gate: float = 10.0,
    paths: dict[str, torch.Tensor] | None = None,
    dark: bool = False,
):
    """
    Draw the effective references against noise with the gate, trajectories, and what they reach with and without the bridge.

    Without paths of one's own the trajectories are those of an example in 2-D: a ring of eight Gaussians with a network that
    weights them wrongly.

    Args:
        references: ``(m, ...)``.
        path: PNG or SVG file to write.
        gate: effective references below which the bridge ends.
        paths: by the name to show, samples on their way to the references, ``(times, n, ...)``; two of them.
        dark: on dark paper.

    Returns:
        The ``matplotlib.figure.Figure``.

    Raises:
        ValueError: for another kind of file, a gate below 1, references that are no clean data, or paths of another shape.
        ImportError: without matplotlib, which the extra `plot` installs.
    """
    path = Path(path)
    check_path(path)
    if not gate >= 1:
        raise ValueError(f"gate={gate}; expected at least 1")
    if paths is not None and (len(paths) != 2 or any(p.shape[2:] != references.shape[1:] for p in paths.values())):
        shapes = {name: tuple(p.shape) for name, p in paths.items()}
        raise ValueError(f"paths {shapes}; expected two of shape (times, n, {', '.join(map(str, references.shape[1:]))})")
    figure = new_figure()
    (reach, shares_or_overlap), panels = figure.subplots(2, 2)
    _draw_reach(reach, SchrodingerBridgeSolver(references), gate)
    if paths is None:
        _draw_ring(shares_or_overlap, panels)
    else:
        _draw_own(shares_or_overlap, panels, references, paths)
    styled(figure, dark).savefig(path)
    return figure


def _draw_ring(proportions: Any, panels: Any) -> None:
    """The example in 2-D: trajectories, and shares of the modes."""
    found = {"references": shares(ring(400, 1))}
    for axes, title in zip(panels, ("network alone", "with the bridge")):
        paths, calls = trajectories(title != "network alone")
        coverage = manifold_overlap(ring(400, 2), paths[-1]).coverage
        found[title] = shares(paths[-1])
        draw_paths(axes, paths[:, ::8], ring(400, 1))
        axes.set(title=f"{title}: {calls} calls of 40 steps, coverage {coverage:.2f}", xlim=(-3, 3), ylim=(-2.2, 2.2))
    _draw_bars(proportions, found, [str(mode) for mode in range(MODES)])
    proportions.set(title="share of samples by mode, biased network", xlabel="mode", ylabel="share")


def _draw_own(overlap: Any, panels: Any, references: torch.Tensor, paths: dict[str, torch.Tensor]) -> None:
    """One's own trajectories in the references' principal axes, and how their ends overlap with the references."""
    flat, found = references.flatten(1), {}
    for axes, (name, path) in zip(panels, paths.items()):
        draw_paths(axes, path.flatten(2), flat)
        axes.set_title(f"{name}: {axes.get_title()}")
        found[name] = manifold_overlap(flat, path[-1].flatten(1), min(5, len(flat) - 1, path.shape[1] - 1))
    names = list(next(iter(found.values()))._fields)
    _draw_bars(overlap, {name: torch.tensor(values) for name, values in found.items()}, names)
    overlap.set(title="ends against references, in pixels", ylabel="share (density: mean)")


def _draw_bars(axes: Any, found: dict[str, torch.Tensor], names: list[str]) -> None:
    width, colours = 0.8 / len(found), {"references": COLOURS[6]}
    for row, (name, values) in enumerate(found.items()):
        places = torch.arange(len(names)) + (row - (len(found) - 1) / 2) * width
        axes.bar(places, values, width, color=colours.get(name, COLOURS[row % 3]), label=name)
    axes.set_xticks(range(len(names)), names)
    axes.legend(fontsize="small")


def draw_effective_references(report: Any, gate: float, dark: bool = False):
    """
    The figure of the effective references at every coupled step of a call, one line a group of samples, with the gate.

    Args:
        report: :class:`~atlas_diffusers.denoising.BridgeReport` of the call.
        gate: where it closed.
        dark: on dark paper.
    """
    figure = new_figure(8, 4)
    axes = figure.subplots()
    for group, sizes in enumerate(report.effective_references):
        colour = COLOURS[group % len(COLOURS)]
        axes.semilogy(range(1, len(sizes) + 1), sizes, marker="o", color=colour, label=f"group {group + 1}")
    axes.axhline(gate, color=COLOURS[6], linestyle="--", label=f"gate {gate:g}")
    axes.set(title="effective references of the coupled steps", xlabel="step", ylabel="references, median of exp(entropy)")
    axes.legend()
    return styled(figure, dark)


def _draw_reach(axes: Any, solver: SchrodingerBridgeSolver, gate: float) -> None:
    sizes = [solver.posterior_size(*level(value)) for value in LOG_SNRS.tolist()]
    axes.semilogy(LOG_SNRS, sizes, color=COLOURS[2], label="median over references")
    axes.axhline(gate, color=COLOURS[3], linestyle="--", linewidth=0.8, label=f"gate {gate:g}")
    shut = [value for value, size in zip(LOG_SNRS.tolist(), sizes) if size < gate]
    if shut:
        axes.axvline(shut[0], color=COLOURS[3], linestyle=":", linewidth=0.8, label="where it shuts")
    dimension = math.prod(solver.references.shape[1:])
    title = f"effective references of {len(solver.references)}, {dimension}-d"
    axes.set(title=title, xlabel="log-SNR log(α/σ): noise left, data right", ylabel="references, median of exp(entropy)")
    axes.legend(fontsize="small")


def _centres() -> torch.Tensor:
    angles = torch.arange(MODES, dtype=torch.float64) * (2 * math.pi / MODES)
    return torch.stack((angles.cos(), angles.sin()), 1)
