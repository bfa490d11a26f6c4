"""Pictures of transport between one's own data: plans, couplings and paths, of points or of pictures."""

from pathlib import Path
from typing import Any

import torch

from .plots import check_path
from .sheets import to_pictures
from .styling import COLOURS, HEAT, new_figure, styled

SHOWN, TARGETS, TIMES = 6, 5, 7  # pictures: rows, targets of a row, times of a path
LINES = 200  # of points


def plot_plan(plan: object, path: str | Path, dark: bool = False):
    """
    Draw a transport plan as a map of its masses, with its two marginals beside it.

    Args:
        plan: a :class:`~atlas_diffusers.transport.SinkhornOutput`, or the matrix ``(n, m)`` itself, tensor or array.
        path: PNG or SVG file to write.
        dark: on dark paper.

    Returns:
        The ``matplotlib.figure.Figure``.

    Raises:
        ValueError: for another kind of file, or what is no plan; ``ImportError`` without matplotlib.
    """
    path, masses = Path(path), _masses(plan)
    check_path(path)
    figure = new_figure(7.5, 7)
    (above, corner), (middle, right) = figure.subplots(2, 2, width_ratios=(5, 1), height_ratios=(1, 5))
    corner.set_axis_off()
    shown = middle.imshow(masses, cmap=HEAT, aspect="auto", interpolation="nearest")
    middle.set(xlabel="target j", ylabel="source i")
    above.bar(range(masses.shape[1]), masses.sum(0), width=1, color=COLOURS[1], label="target marginal")
    above.set(title=f"plan of {masses.shape[0]} x {masses.shape[1]}, total mass {masses.sum():.3g}", ylabel="mass", xticks=[])
    right.barh(range(masses.shape[0]), masses.sum(1), height=1, color=COLOURS[0], label="source marginal")
    right.set(xlabel="mass", yticks=[])
    above.set_xlim(middle.get_xlim())
    right.set_ylim(middle.get_ylim())
    figure.colorbar(shown, ax=corner, label="mass of a pair", fraction=0.5)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return _written(figure, path, dark)


def plot_couplings(x: Any, y: Any, plan: Any, path: str | Path, dark: bool = False):
    """
    Draw what is coupled with what: points with lines between the heaviest pairs, pictures with their heaviest targets.

    Args:
        x, y: points ``(n, d)`` and ``(m, d)``, drawn in their first two principal axes where d > 2; or pictures
            ``(n, channels, height, width)`` in [-1, 1].
        plan: as of :func:`plot_plan`; or ``None`` for pairs, x_i with y_i.
        path, dark: as of :func:`plot_plan`.

    Returns:
        The ``matplotlib.figure.Figure``.

    Raises:
        ValueError: for shapes that do not fit, and as :func:`plot_plan`.
    """
    path, x, y = Path(path), torch.as_tensor(x).detach().cpu(), torch.as_tensor(y).detach().cpu()
    check_path(path)
    masses = torch.eye(len(x), dtype=torch.float64) / len(x) if plan is None else _masses(plan)
    if x.shape[1:] != y.shape[1:] or tuple(masses.shape) != (len(x), len(y)):
        raise ValueError(f"x {tuple(x.shape)}, y {tuple(y.shape)} and a plan {tuple(masses.shape)} do not fit")
    figure = _coupled_pictures(x, y, masses) if x.ndim == 4 else _coupled_points(x, y, masses)
    return _written(figure, path, dark)


def plot_paths(paths: Any, path: str | Path, references: Any = None, dark: bool = False):
    """
    Draw paths from t = 0 to t = 1: of points as lines, of pictures as rows of a film.

    Args:
        paths: ``(times, n, d)``, as of :meth:`~atlas_diffusers.bridges.MixtureBridge.sample_path`, drawn in the first two
            principal axes of their ends where d > 2; or ``(times, n, channels, height, width)`` in [-1, 1].
        references: points of the target to draw behind them, ``(m, d)``.
        path, dark: as of :func:`plot_plan`.

    Returns:
        The ``matplotlib.figure.Figure``.

    Raises:
        ValueError: for shapes that do not fit, and as :func:`plot_plan`.
    """
    path, paths = Path(path), torch.as_tensor(paths).detach().cpu()
    check_path(path)
    if paths.ndim not in (3, 5) or len(paths) < 2:
        raise ValueError(f"paths {tuple(paths.shape)}; expected (times, n, d) or (times, n, channels, height, width)")
    if paths.ndim == 5:
        return _written(_film(paths), path, dark)
    figure = new_figure(7.5, 7)
    draw_paths(figure.subplots(), paths, references)
    return _written(figure, path, dark)


def draw_paths(axes: Any, paths: torch.Tensor, references: Any = None) -> None:
    """Paths ``(times, n, d)`` of points on axes, with their starts, their ends and the points behind them."""
    behind = paths[-1] if references is None else torch.as_tensor(references).detach().cpu().to(paths)
    flat, names = _plane(behind, paths)
    if references is not None:
        axes.scatter(*_plane(behind, behind)[0].T, s=8, color=COLOURS[6], alpha=0.5, label="references")
    for line in range(min(LINES, paths.shape[1])):
        axes.plot(*flat[:, line].T, color=COLOURS[4], linewidth=0.6, alpha=0.6, label="paths" if line == 0 else None)
    axes.scatter(*flat[0].T, s=12, color=COLOURS[0], marker="x", linewidths=0.8, label="start, t = 0", zorder=3)
    axes.scatter(*flat[-1].T, s=12, color=COLOURS[1], label="end, t = 1", zorder=3)
    axes.set(title=f"{paths.shape[1]} paths of {len(paths) - 1} steps", xlabel=names[0], ylabel=names[1])
    axes.legend(fontsize="small")


def _masses(plan: Any) -> torch.Tensor:
    masses = torch.as_tensor(getattr(plan, "plan", plan)).detach().cpu().double()
    if masses.ndim != 2 or not masses.isfinite().all() or (masses < 0).any():
        raise ValueError(f"a plan is a matrix (n, m) of finite masses from 0, got {tuple(masses.shape)}")
    return masses


def _plane(ends: torch.Tensor, points: torch.Tensor) -> tuple[torch.Tensor, tuple[str, str]]:
    """Points (..., d) in two coordinates: their own, or the first two principal axes of ``ends``."""
    if points.shape[-1] == 1:
        return torch.cat((points, torch.zeros_like(points)), -1), ("x", "")
    if points.shape[-1] == 2:
        return points, ("x₁", "x₂")
    centre = ends.mean(0)
    axes = torch.linalg.svd(ends - centre, full_matrices=False).Vh[:2]
    return (points - centre) @ axes.T, ("principal axis 1", "principal axis 2")


def _coupled_points(x: torch.Tensor, y: torch.Tensor, masses: torch.Tensor):
    figure = new_figure(7.5, 7)
    axes, both = figure.subplots(), torch.cat((x, y))
    (flat_x, names), (flat_y, _) = _plane(both, x), _plane(both, y)
    heaviest = masses.flatten().topk(min(LINES, masses.numel()))
    for index, mass in zip(heaviest.indices.tolist(), heaviest.values.tolist()):
        i, j = divmod(index, len(y))
        strength = mass / heaviest.values[0].item()
        axes.plot(*torch.stack((flat_x[i], flat_y[j])).T, color=COLOURS[6], alpha=0.6 * strength, linewidth=0.8, zorder=1)
    axes.plot([], [], color=COLOURS[6], label=f"the {len(heaviest.values)} heaviest pairs")
    axes.scatter(*flat_x.T, s=14, color=COLOURS[0], marker="x", label=f"{len(x)} sources")
    axes.scatter(*flat_y.T, s=14, color=COLOURS[1], label=f"{len(y)} targets")
    axes.set(title="coupling", xlabel=names[0], ylabel=names[1])
    axes.legend(fontsize="small")
    return figure


def _coupled_pictures(x: torch.Tensor, y: torch.Tensor, masses: torch.Tensor):
    rows = [i * len(x) // min(SHOWN, len(x)) for i in range(min(SHOWN, len(x)))]
    columns = min(TARGETS, len(y))
    figure = new_figure(1.5 * (columns + 1), 1.6 * len(rows))
    panels = figure.subplots(len(rows), columns + 1, squeeze=False)
    for line, i in zip(panels, rows):
        heaviest = (masses[i] / masses[i].sum()).topk(columns)
        _show(line[0], x[i], f"source {i}")
        for axes, j, share in zip(line[1:], heaviest.indices.tolist(), heaviest.values.tolist()):
            _show(axes, y[j], f"target {j}: {share:.0%}")
    return figure


def _film(paths: torch.Tensor):
    times = [round(k * (len(paths) - 1) / (TIMES - 1)) for k in range(TIMES)] if len(paths) > TIMES else range(len(paths))
    rows = min(SHOWN, paths.shape[1])
    figure = new_figure(1.4 * len(times), 1.5 * rows)
    for row, line in enumerate(figure.subplots(rows, len(times), squeeze=False)):
        for axes, k in zip(line, times):
            _show(axes, paths[k, row], f"t = {k / (len(paths) - 1):.2f}" if row == 0 else "")
    return figure


def _show(axes: Any, pixels: torch.Tensor, title: str) -> None:
    axes.imshow(to_pictures(pixels.float().clamp(-1, 1)[None])[0].convert("RGB"), interpolation="nearest")
    axes.set(title=title, xticks=[], yticks=[])
    axes.title.set_fontsize("small")


def _written(figure: Any, path: Path, dark: bool):
    styled(figure, dark).savefig(path)
    return figure
