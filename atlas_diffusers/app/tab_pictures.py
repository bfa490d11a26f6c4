"""Training on a folder of one's own: a recipe, a run, its curves and grids, stop and go on."""

from typing import Any, get_args

import gradio as gr

from ..config.dataset import Captions
from ..training.recorder import draw_curves
from ..training.starting import write_recipe
from .answers import answered
from .runs import Run, Runs
from .scratch import new_folder
from .widgets import go_and_stop

SHOWN = 6  # grids
EVERY = 2  # seconds


def look(folder: str, captions: Captions, resolution: float) -> tuple[str, str]:
    """What a folder holds, and a recipe that trains on it; mistakes are those of ``atlas-diffusers init``."""
    if not folder.strip():
        raise ValueError("the folder is missing; expected the path of a folder of pictures on this computer")
    file = new_folder() / "recipe.yaml"
    told = write_recipe(folder.strip(), file, captions, int(resolution) or None)
    return told, file.read_text(encoding="utf-8")


def train(runs: Runs, session: str, recipe: str) -> Run:
    """The run of a recipe's text; ``ValueError`` for a mistake in it, or while one is running."""
    if not recipe.strip():
        raise ValueError("there is no recipe; look at a folder first, or paste one")
    folder = new_folder()
    (folder / "recipe.yaml").write_text(recipe, encoding="utf-8")
    return runs.start(session, folder / "recipe.yaml", folder / "log.txt")


def progress(run: Run | None) -> tuple[str, Any, list, str]:
    """Status, curves, grids and the end of the log."""
    if run is None:
        return "nothing is running", None, [], ""
    rows = run.rows()
    return run.status(), _curves(rows) if rows else None, run.grids(SHOWN), run.tail()


def _curves(rows: list[dict]) -> Any:
    from matplotlib.figure import Figure

    return draw_curves(Figure(figsize=(9, 3.2), layout="constrained"), rows)


def pictures_tab(runs: Runs, page: gr.Blocks) -> None:
    """Widgets, and what they do."""
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            folder = gr.Textbox("", label="Folder of pictures on this computer", elem_id="pictures-folder")
            with gr.Row():
                captions = gr.Dropdown(list(get_args(Captions)), label="Captions from", min_width=120)
                resolution = gr.Number(0, precision=0, minimum=0, label="Pixels a side (0: by the pictures)", min_width=120)
            looking = gr.Button("Look at the folder", elem_id="pictures-look")
            told = gr.Textbox("", label="Found", interactive=False, elem_id="pictures-told")
            recipe = gr.Code("", language="yaml", label="Recipe, which you may change", max_lines=24, elem_id="pictures-recipe")
            go, stop = go_and_stop("Train, or go on", "pictures")
        with gr.Column(scale=3, min_width=300):
            status = gr.Textbox("nothing is running", label="Status", interactive=False, elem_id="pictures-status")
            curves = gr.Plot(label="Loss and learning rate", show_label=False, elem_id="pictures-curves")
            grids = gr.Gallery(label="Sample grids", columns=2, object_fit="contain", height="auto", elem_id="pictures-grids")
            log = gr.Textbox("", label="What the run says", lines=8, max_lines=8, interactive=False, elem_id="pictures-log")
    timer, shown = gr.Timer(EVERY, active=False), [status, curves, grids, log]

    def started(text: str, request: gr.Request) -> tuple:
        return *progress(train(runs, str(request.session_hash), text)), gr.Timer(active=True)

    def stopped(request: gr.Request) -> str:
        run = runs.of_session.get(str(request.session_hash))
        return "nothing is running" if run is None else run.stop()

    def ticked(request: gr.Request) -> tuple:
        run = runs.of_session.get(str(request.session_hash))
        return *progress(run), gr.Timer(active=run is not None and run.is_running)

    def left(request: gr.Request) -> None:
        runs.leave(str(request.session_hash))

    hidden: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    looking.click(answered(look), [folder, captions, resolution], [told, recipe], **hidden)
    go.click(answered(started), recipe, [*shown, timer], **hidden)
    stop.click(answered(stopped), None, status, **hidden)
    timer.tick(answered(ticked), None, [*shown, timer], **hidden)
    page.unload(left)
