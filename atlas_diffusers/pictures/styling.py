"""One look for every plot: colours that colour-blind readers tell apart (Okabe & Ito 2008), on white or on dark."""

from typing import Any

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#999999", "#F0E442")
HEAT = "cividis"  # a colour map that rises evenly in brightness, also to colour-blind readers
INKS = {False: ("white", "#222222"), True: ("#16181d", "#e6e6e6")}


def new_figure(width: float = 11, height: float = 7):
    """An empty ``matplotlib.figure.Figure``, inches at 120 dots; ``ImportError`` without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'atlas-diffusers[plot]'") from error
    return Figure(figsize=(width, height), dpi=120, layout="constrained")


def styled(figure: Any, dark: bool = False):
    """The figure with paper and ink of its theme; what was drawn in a colour of ``COLOURS`` keeps it."""
    paper, ink = INKS[dark]
    figure.set_facecolor(paper)
    for axes in figure.axes:
        axes.set_facecolor(paper)
        axes.tick_params(colors=ink, which="both")
        for text in (axes.title, axes.xaxis.label, axes.yaxis.label, *axes.texts):
            text.set_color(ink)
        for spine in axes.spines.values():
            spine.set_edgecolor(ink)
    for legend in [*figure.legends, *(axes.get_legend() for axes in figure.axes)]:
        if legend is not None:
            legend.get_frame().set(facecolor=paper, edgecolor=ink, alpha=0.8)
            for text in legend.get_texts():
                text.set_color(ink)
    return figure
