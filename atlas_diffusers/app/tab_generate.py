"""Pictures from a prompt, and the data predictions on the way to them."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import gradio as gr
from PIL import Image

from ..pictures import to_pictures
from ..pipelines.watching import pictures_of, watched
from .answers import answered
from .model import MOST_STEPS, OWN, Model, as_they_come, generators
from .widgets import go_and_stop, guidance_slider, progress_line, seed_number

SHOWN = 12  # predictions a call
Pictures = list[tuple[Image.Image, str]]


def generate(
    model: Model, prompt: str, negative: str, style: str, sampler: str, steps: float, guidance: float, count: float,
    seed: float,
) -> Iterator[tuple[Pictures, str]]:
    """
    Pictures with captions, and how far they are: first the data predictions of some steps, at last the result.

    Raises:
        ValueError: for what the pipeline does not take.
    """
    steps, count, seed = int(steps), int(count), int(seed)
    if not 1 <= steps <= MOST_STEPS:
        raise ValueError(f"{steps} steps; allowed are 1 to {MOST_STEPS}")
    call = model.call(prompt, style, count, negative)
    scheduler, noise = model.scheduler(sampler), generators(seed, count)
    captions = [f"{prompt.strip() or 'picture'}, seed {seed + i}" for i in range(count)]

    def run(show: Any) -> tuple[Pictures, str]:
        done, stride = 0, -(-steps // SHOWN)

        def seen(data: Any) -> None:
            nonlocal done
            done += 1
            if done % stride == 1 % stride and (pixels := pictures_of(model.pipeline, data)) is not None:
                show((list(zip(to_pictures(pixels), captions)), f"network call {done}, {steps} steps"))

        pipeline = watched(model.pipeline, scheduler, seen)
        images = pipeline(**call, num_inference_steps=steps, guidance_scale=guidance, generator=noise).images
        return list(zip(images, captions)), f"{steps} steps, {done} network calls"

    yield from as_they_come(run)


def generate_tab(model: Model) -> None:
    """Widgets, and what they do."""
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            label = "Number of the class (empty: any)" if model.labels else "Prompt"
            prompt = gr.Textbox(model.example, label=label, lines=2, interactive=model.takes_prompts or bool(model.labels))
            negative = gr.Textbox("", label="Negative prompt", visible=model.takes_prompts)
            with gr.Row():
                style = gr.Dropdown(model.styles, label="Style", visible=len(model.styles) > 1, min_width=120)
                sampler = gr.Dropdown(model.samplers, value=OWN, label="Sampler", min_width=120)
            steps = gr.Slider(1, 100, value=model.defaults[0], step=1, label="Steps")
            guidance = guidance_slider(model)
            with gr.Row():
                count = gr.Slider(1, 16, value=4, step=1, label="Pictures", min_width=120)
                seed = seed_number("Seed of the first picture")
            go, stop = go_and_stop("Generate", "generate")
        with gr.Column(scale=3, min_width=300):
            progress = progress_line("generate-progress")
            gallery = gr.Gallery(
                label="Pictures", columns=4, object_fit="contain", height="auto", format="png",
                elem_classes="pixels", elem_id="generate-gallery",
            )  # fmt: skip
    inputs = [prompt, negative, style, sampler, steps, guidance, count, seed]
    event = gr.on(
        [go.click, prompt.submit], answered(partial(generate, model)), inputs, [gallery, progress],
        show_progress="hidden", api_name="generate",
    )  # fmt: skip
    stop.click(None, cancels=[event], api_visibility="private")
