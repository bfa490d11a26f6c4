"""Pictures of noise schedules, of our schedulers and of Diffusers' own."""

import copy
from pathlib import Path
from typing import Any

import torch

from .styling import COLOURS, new_figure, styled

FORMATS = (".png", ".svg")
LINES = ("-", "--", ":", "-.")


def log_snr(scheduler: Any) -> torch.Tensor:
    """``λ_t = ½ log(ᾱ_t/(1 − ᾱ_t))`` at every training timestep, ``(T,)``; -inf at zero signal."""
    return scheduler.alphas_cumprod.double().logit() / 2


def log_snr_of_steps(scheduler: Any) -> torch.Tensor:
    """``λ = −log σ̂`` of the steps that ``set_timesteps`` chose: of ``sigmas``, or of ``timesteps`` where there are none."""
    sigmas = getattr(scheduler, "sigmas", None)
    return log_snr(scheduler)[scheduler.timesteps.long()] if sigmas is None else -sigmas[:-1].double().log()


def check_path(path: Path) -> None:
    """Raise before any work is done if ``path`` cannot become a picture file."""
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"output {path}: expected a file name that ends in {' or '.join(FORMATS)}")
    if not path.parent.is_dir():
        raise OSError(f"output {path}: folder {path.parent} does not exist")


def check_scheduler(name: str, scheduler: Any) -> None:
    """Raise ``ValueError`` for a scheduler without a discrete noise process, such as one for flow matching."""
    missing = [field for field in ("betas", "alphas_cumprod", "set_timesteps") if not hasattr(scheduler, field)]
    if missing:
        raise ValueError(f"{name}: {type(scheduler).__name__} has no {' or '.join(missing)}, so there is nothing to draw")


def plot_schedules(schedulers: dict, num_inference_steps: int, path: str | Path, dark: bool = False):
    """
    Draw β_t, ᾱ_t and λ_t against the training timestep t, and the λ of every sampling step, one row a scheduler.

    Args:
        schedulers: by the name to show; anything with ``betas``, ``alphas_cumprod`` and ``set_timesteps``. They are not
            changed.
        num_inference_steps: sampling steps to place.
        path: PNG or SVG file to write.
        dark: on dark paper.

    Returns:
        The ``matplotlib.figure.Figure``, for changes of one's own.

    Raises:
        ValueError: without schedulers or steps, for another kind of file, or a scheduler without a discrete noise process.
        ImportError: without matplotlib, which the extra `plot` installs.
    """
    path = Path(path)
    check_path(path)
    figure = draw_schedules(schedulers, num_inference_steps, dark)
    figure.savefig(path)
    return figure


def draw_schedules(schedulers: dict, num_inference_steps: int, dark: bool = False):
    """The figure of :func:`plot_schedules`, not written to a file."""
    if not schedulers or num_inference_steps < 1:
        raise ValueError(f"expected at least one scheduler and one step, got {len(schedulers)} and {num_inference_steps}")
    for name, scheduler in schedulers.items():
        check_scheduler(name, scheduler)
    return styled(_four_panels(schedulers, num_inference_steps), dark)


def _four_panels(schedulers: dict, num_inference_steps: int):
    figure = new_figure()
    (betas, alpha_bar), (snr, steps) = figure.subplots(2, 2)
    for row, (name, scheduler) in enumerate(schedulers.items()):
        scheduler = copy.deepcopy(scheduler)
        scheduler.set_timesteps(num_inference_steps)
        colour = COLOURS[row % len(COLOURS)]
        line = {"color": colour, "linestyle": LINES[row // len(COLOURS) % len(LINES)], "label": name}
        betas.plot(scheduler.betas.numpy(), **line)
        alpha_bar.plot(scheduler.alphas_cumprod.numpy(), **line)
        snr.plot(log_snr(scheduler).numpy(), **line)
        placed = log_snr_of_steps(scheduler).numpy()
        steps.plot(placed, [row] * len(placed), "|", color=colour, markersize=10, markeredgewidth=1.5)
    betas.set(title=r"$\beta_t$", yscale="log")
    alpha_bar.set(title=r"$\bar\alpha_t$")
    snr.set(title=r"log-SNR $\lambda_t = \log(\alpha_t/\sigma_t)$")
    for axes in (betas, alpha_bar, snr):
        axes.set(xlabel="training timestep t")
    steps.set(title=f"placement of {num_inference_steps} steps", xlabel=r"log-SNR $\lambda$: noise left, data right")
    steps.set(yticks=range(len(schedulers)), yticklabels=schedulers, ylim=(len(schedulers) - 0.4, -0.6))
    for axes in figure.axes:
        axes.grid(alpha=0.25)
    handles, names = betas.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(len(names), 4), frameon=False)
    return figure
