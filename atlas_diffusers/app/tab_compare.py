"""Samplers at several numbers of steps on one sheet, with time, network calls and the distance to the finest."""

import csv
from collections.abc import Iterator
from functools import partial

import gradio as gr
from PIL import Image

from ..pictures import labelled_grid, to_pictures
from ..pipelines.comparison import Compared, compare_samplers
from .answers import answered
from .model import MOST_STEPS, OWN, Model, generators
from .scratch import new_folder
from .tab_generate import Pictures
from .widgets import go_and_stop, guidance_slider, progress_line, seed_number

HEADERS = ["sampler", "steps", "network calls", "seconds", "distance"]
MOST_CELLS = 48


def read_steps(text: str) -> list[int]:
    """Numbers of steps, as in ``"5, 10 25"``, ascending; ``ValueError`` names what is none."""
    words = text.replace(",", " ").split()
    wrong = [word for word in words if not word.isdecimal() or not 1 <= int(word) <= MOST_STEPS]
    if wrong or not words:
        named = ", ".join(wrong) or "are missing"
        raise ValueError(f"steps {named}; expected numbers from 1 to {MOST_STEPS}, such as 5, 10, 25")
    return sorted({int(word) for word in words})


def compare(
    model: Model, prompt: str, samplers: list[str], steps: str, guidance: float, seed: float
) -> Iterator[tuple[Pictures, list[list], str, str | None, str | None]]:
    """
    A sheet with a row for each sampler and a column for each number of steps, its table, how far it is, and at last both as
    files, PNG and CSV; again after every cell.

    Raises:
        ValueError: for no sampler, too many cells, and what the pipeline does not take.
    """
    counts = read_steps(steps)
    cells = [(name, count) for name in samplers for count in counts]
    if not 1 <= len(cells) <= MOST_CELLS:
        raise ValueError(f"{len(samplers)} samplers at {len(counts)} numbers of steps; allowed are 1 to {MOST_CELLS} in all")
    call = model.call(prompt, model.styles[0], 1) | {"guidance_scale": guidance}
    generators(int(seed), 1)
    schedulers = {name: model.scheduler(name) for name in samplers}
    found: dict[tuple[str, int], Compared] = {}
    for row in compare_samplers(model.pipeline, schedulers, counts, [int(seed)], call):
        found[row.sampler, row.steps] = row
        table = [_numbers(found[cell]) for cell in cells if cell in found]
        told = f"{len(found)} of {len(cells)}; distance to {samplers[0]} at {counts[-1]} steps, same noise"
        sheet = _sheet(found, cells, len(counts))
        png, file = _files(sheet, table) if len(found) == len(cells) else (None, None)
        yield [(sheet, f"{prompt.strip() or 'picture'}, seed {int(seed)}")], table, told, png, file


def _numbers(row: Compared) -> list:
    return [row.sampler, row.steps, row.network_calls, round(row.seconds, 3), round(row.distance, 4)]


def _sheet(found: dict[tuple[str, int], Compared], cells: list[tuple[str, int]], columns: int) -> Image.Image:
    images, labels = [], []
    empty = Image.new("RGB", to_pictures(next(iter(found.values())).pictures[:1])[0].size, "white")
    for cell in cells:
        row = found.get(cell)
        images.append(empty if row is None else to_pictures(row.pictures[:1])[0])
        labels.append("" if row is None else f"{row.sampler}, {row.steps} steps, off by {row.distance:.3f}")
    return labelled_grid(images, labels if any(labels) else [""] * len(cells), columns=columns, tile=260)


def _files(sheet: Image.Image, table: list[list]) -> tuple[str, str]:
    folder = new_folder()
    sheet.save(folder / "comparison.png")
    with open(folder / "comparison.csv", "w", newline="", encoding="utf-8") as handle:
        csv.writer(handle).writerows([HEADERS, *table])
    return str(folder / "comparison.png"), str(folder / "comparison.csv")


def compare_tab(model: Model) -> None:
    """Widgets, and what they do."""
    few = f"{max(1, model.defaults[0] // 2)}, {model.defaults[0]}, {min(MOST_STEPS, 2 * model.defaults[0])}"
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            prompt = gr.Textbox(model.example, label="Prompt")
            samplers = gr.CheckboxGroup(model.samplers, value=[OWN, "DDIM", "Euler"], label="Samplers")
            steps = gr.Textbox(few, label="Numbers of steps")
            with gr.Row():
                guidance, seed = guidance_slider(model), seed_number()
            go, stop = go_and_stop("Compare", "compare")
        with gr.Column(scale=3, min_width=300):
            progress = progress_line("compare-progress")
            sheet = gr.Gallery(
                label="A row for each sampler, a column for each number of steps", columns=1, object_fit="contain",
                height="auto", format="png", elem_id="compare-sheet",
            )  # fmt: skip
            table = gr.Dataframe(
                headers=HEADERS, datatype=["str", "number", "number", "number", "number"], type="array", interactive=False,
                label="Table; a click on a heading sorts", elem_id="compare-table",
            )
            with gr.Row():
                png = gr.DownloadButton("Sheet as PNG", elem_id="compare-png")
                file = gr.DownloadButton("Table as CSV", elem_id="compare-csv")
    event = go.click(
        answered(partial(compare, model)), [prompt, samplers, steps, guidance, seed],
        [sheet, table, progress, png, file], show_progress="hidden", api_name="compare",
    )
    stop.click(None, cancels=[event], api_visibility="private")
