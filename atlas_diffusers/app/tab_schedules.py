"""Noise schedules and the placement of steps, drawn as options change."""

import inspect
from pathlib import Path
from typing import Any

import gradio as gr

from ..pictures.plots import draw_schedules
from ..pipelines.named_schedulers import CONFIG, load_scheduler, short_names
from ..schedules.betas import BETA_SCHEDULES
from .answers import answered
from .model import MOST_STEPS, Model

AS_IT_IS = "as it is"
SPACINGS = ("linspace", "leading", "trailing")
GRIDS = {"Karras": "use_karras_sigmas", "exponential": "use_exponential_sigmas", "beta": "use_beta_sigmas",
         "uniform log-SNR": "use_lu_lambdas"}  # fmt: skip
MOST = 12


def known_schedulers(model: Model) -> list[str]:
    """The pipeline's own, ours, and presets in the folder ``schedulers``."""
    presets = sorted(str(file.parent) for file in Path("schedulers").glob(f"*/{CONFIG}"))
    return [model.name, *short_names(), *presets]


def schedules(
    model: Model, names: list[str], steps: float, betas: str, spacing: str, grid: str, zero_snr: bool
) -> tuple[Any, str]:
    """
    The figure of some schedulers with options changed, and how many there are.

    Raises:
        ValueError: for a scheduler that is unknown or does not have an option; ``OSError`` for one that cannot have its value.
    """
    if not 1 <= len(names) <= MOST or not 1 <= int(steps) <= MOST_STEPS:
        raise ValueError(f"{len(names)} schedulers and {steps} steps; allowed are 1 to {MOST}, and 1 to {MOST_STEPS}")
    options: dict[str, Any] = {} if betas == AS_IT_IS else {"beta_schedule": betas, "trained_betas": None}
    options |= {} if spacing == AS_IT_IS else {"timestep_spacing": spacing}
    options |= {} if grid == AS_IT_IS else {name: label == grid for label, name in GRIDS.items()}
    options |= {"rescale_betas_zero_snr": True} if zero_snr else {}
    given = {name: model.pipeline.scheduler if name == model.name else load_scheduler(name) for name in names}
    found = {name: _changed(name, scheduler, options) for name, scheduler in given.items()}
    return draw_schedules(found, int(steps)), f"{len(found)} drawn"


def _changed(name: str, scheduler: Any, options: dict[str, Any]) -> Any:
    cls = type(scheduler)
    known = inspect.signature(cls).parameters
    if missing := [option for option, value in options.items() if option not in known and value not in (None, False)]:
        raise ValueError(f"{name}: {cls.__name__} has no option {', '.join(missing)}")
    return cls.from_config(scheduler.config, **{option: value for option, value in options.items() if option in known})


def schedules_tab(model: Model) -> None:
    """Widgets, and what they do."""
    names = gr.Dropdown(
        known_schedulers(model), value=["ddim", "euler"], multiselect=True, allow_custom_value=True, max_choices=MOST,
        label="Schedulers: ours, Diffusers' class names, CLASS:BETAS such as euler:cosine, or folders",
        elem_id="schedules-names",
    )  # fmt: skip
    with gr.Row():
        steps = gr.Slider(1, 100, value=10, step=1, label="Steps", min_width=140)
        betas = gr.Dropdown([AS_IT_IS, *BETA_SCHEDULES], label="Betas", min_width=140)
        spacing = gr.Dropdown([AS_IT_IS, *SPACINGS], label="Spacing of timesteps", min_width=140)
        grid = gr.Dropdown([AS_IT_IS, *GRIDS], label="Grid of noise levels", min_width=140)
        zero_snr = gr.Checkbox(False, label="Rescale betas to zero SNR", min_width=140)
    told = gr.Textbox("", label="Drawn", interactive=False, elem_id="schedules-told")
    plot = gr.Plot(label="Betas, signal, log-SNR and the placement of the steps", show_label=False, elem_id="schedules-plot")
    inputs = [names, steps, betas, spacing, grid, zero_snr]
    draw = answered(lambda *values: schedules(model, *values))
    for widget in inputs:
        widget.change(
            draw, inputs, [plot, told], show_progress="hidden", trigger_mode="always_last", api_visibility="private"
        )
    gr.Button("Draw", elem_id="schedules-go").click(draw, inputs, [plot, told], api_name="schedules")
