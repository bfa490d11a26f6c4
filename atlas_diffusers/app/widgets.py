"""Widgets that several tabs have."""

import gradio as gr

from .model import Model


def guidance_slider(model: Model) -> gr.Slider:
    """Guidance, at first the pipeline's own."""
    return gr.Slider(1, 15, model.defaults[1], step=0.25, label="Guidance scale (1 is off)", min_width=120)


def seed_number(label: str = "Seed") -> gr.Number:
    """A whole number, at first 0."""
    return gr.Number(0, precision=0, minimum=0, label=label, min_width=120)


def go_and_stop(word: str, name: str) -> tuple[gr.Button, gr.Button]:
    """A row of the button that starts what the tab ``name`` does, and the one that ends it."""
    with gr.Row():
        return gr.Button(word, variant="primary", elem_id=f"{name}-go"), gr.Button("Stop", elem_id=f"{name}-stop")


def progress_line(name: str) -> gr.Textbox:
    """How far the tab ``name`` is."""
    return gr.Textbox("", label="Progress", interactive=False, elem_id=name)
