"""Pictures coupled with references by the Schrödinger bridge, beside those of the network alone."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import gradio as gr
import torch

from ..config import DatasetConfig
from ..denoising import BridgeReport
from ..pictures import to_pictures
from ..pictures.plots_bridge import draw_effective_references
from ..pipelines.references import References
from ..pipelines.watching import pictures_of, watched
from ..training import PictureDataset, load_training_data
from .answers import answered
from .model import ANY, MOST_PICTURES, MOST_STEPS, Model, as_they_come, generators
from .tab_generate import Pictures
from .widgets import go_and_stop, progress_line, seed_number

EMBEDDED = {"emoji": "embedded:emoji", "pictograms": "embedded:pictograms", "digits": "embedded:digits"}
FOLDER, UPLOADS = "a folder on this computer", "uploaded pictures"
FEWEST, MOST = 8, 2000


def read_references(model: Model, source: str, folder: str, files: list[str] | None, local: bool) -> References:
    """
    At most 2,000 pictures at the pipeline's size, with captions where there are.

    Args:
        source: a name of ``EMBEDDED``, or ``FOLDER`` or ``UPLOADS``.
        folder, files: of these two.
        local: whether whoever asks may read folders.

    Raises:
        ValueError: for too few or too many pictures; ``OSError`` for one that cannot be read, by name.
    """
    pipeline = model.pipeline
    options: dict[str, Any] = {
        "resolution": pipeline.unet.config.sample_size * pipeline.vae_scale_factor,
        "channels": pipeline.unet.config.in_channels if pipeline.vae is None else 3,
    }
    if source == UPLOADS:
        config = DatasetConfig(caption_column=None, **options)
        data: Any = [{"image": {"path": file, "bytes": None}} for file in files or []]
    elif source == FOLDER:
        if not local:
            raise ValueError("this page is open to others, so it reads no folders")
        config = DatasetConfig(root=folder, **options)
        data = load_training_data(config)
    else:
        config = DatasetConfig(name=EMBEDDED[source], **options)
        data = load_training_data(config)
    if len(data) < FEWEST:
        raise ValueError(f"{len(data)} pictures; a bridge needs at least {FEWEST} references")
    pictures = PictureDataset(data, config)
    items = [pictures[index, 0] for index in range(min(len(data), MOST))]
    captions = [item["text"] for item in items]
    return References(torch.stack([item["pixels"] for item in items]), captions=captions if any(captions) else None)


def bridge(
    model: Model, local: bool, source: str, folder: str, files: list[str] | None, prompt: str, gate: float, steps: float,
    count: float, seed: float,
) -> Iterator[tuple[Pictures, Pictures, Any, str]]:
    """
    Pictures of the network alone and of the bridge from the same noise, as they come; at last the effective references of every
    coupled step as a figure, and what the bridge did.

    Raises:
        ValueError: for another kind of pipeline, and what it does not take.
    """
    if not model.is_ours:
        raise ValueError(f"the bridge needs an AtlasPipeline; {model.name} is a {type(model.pipeline).__name__}")
    if not 1 <= int(steps) <= MOST_STEPS:
        raise ValueError(f"{steps} steps; allowed are 1 to {MOST_STEPS}")
    references = read_references(model, source, folder, files, local)
    call = model.call(prompt, ANY, int(count)) | {"num_inference_steps": int(steps)}
    captions = [f"seed {int(seed) + i}" for i in range(int(count))]

    def run(show: Any) -> tuple[Pictures, Pictures, Any, str]:
        alone: Pictures = []

        def seen(data: torch.Tensor) -> None:
            if (pixels := pictures_of(model.pipeline, data)) is not None:
                now = list(zip(to_pictures(pixels), captions))
                show((alone or now, now if alone else [], None, "with the bridge" if alone else "the network alone"))

        pipeline = watched(model.pipeline, model.pipeline.scheduler, seen)
        images = pipeline(**call, generator=generators(int(seed), int(count))).images
        alone = list(zip(images, captions))
        noise = generators(int(seed), int(count))
        found = pipeline(**call, generator=noise, references=references, bridge={"gate": gate})
        figure = draw_effective_references(found.bridge, gate)
        return alone, list(zip(found.images, captions)), figure, _told(found.bridge, references)

    yield from as_they_come(run)


def _told(report: BridgeReport, references: References) -> str:
    return (
        f"{len(references.values)} references; {report.network_calls:g} network calls in place of "
        f"{report.network_calls + report.network_calls_saved:g}"
    )


def bridge_tab(model: Model, local: bool) -> None:
    """Widgets, and what they do."""
    sources = [*EMBEDDED, *([FOLDER] if local else []), UPLOADS]
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            source = gr.Dropdown(sources, label="References", elem_id="bridge-source")
            folder = gr.Textbox("", label="Folder", visible=False)
            files = gr.File(file_count="multiple", file_types=["image"], label="Pictures, 20 MB each at most", visible=False)
            prompt = gr.Textbox(model.example, label="Prompt")
            gate = gr.Slider(1, 100, value=10, step=1, label="Gate: effective references at which the bridge ends")
            steps = gr.Slider(1, 100, value=model.defaults[0], step=1, label="Steps")
            with gr.Row():
                count = gr.Slider(2, MOST_PICTURES, value=8, step=1, label="Pictures", min_width=120)
                seed = seed_number()
            go, stop = go_and_stop("Couple", "bridge")
        with gr.Column(scale=3, min_width=300):
            told = progress_line("bridge-told")
            options: dict[str, Any] = {"columns": 4, "object_fit": "contain", "height": "auto", "format": "png"}
            options["elem_classes"] = "pixels"
            alone = gr.Gallery(label="The network alone", elem_id="bridge-alone", **options)
            coupled = gr.Gallery(label="With the bridge", elem_id="bridge-coupled", **options)
            plot = gr.Plot(label="Effective references at every coupled step", show_label=False, elem_id="bridge-plot")
    source.change(
        lambda chosen: (gr.update(visible=chosen == FOLDER), gr.update(visible=chosen == UPLOADS)), source, [folder, files],
        show_progress="hidden", api_visibility="private",
    )
    event = go.click(
        answered(partial(bridge, model, local)), [source, folder, files, prompt, gate, steps, count, seed],
        [alone, coupled, plot, told], show_progress="hidden", api_name="bridge",
    )
    stop.click(None, cancels=[event], api_visibility="private")
