"""The page: five tabs on one pipeline, served to this machine."""

import threading
from typing import Any

import gradio as gr

from .model import Model
from .runs import Runs
from .scratch import scratch_folder
from .tab_bridge import bridge_tab
from .tab_compare import compare_tab
from .tab_generate import generate_tab
from .tab_pictures import pictures_tab
from .tab_schedules import schedules_tab

LOOPBACK = ("127.0.0.1", "localhost", "::1")
MOST_UPLOADED = "20mb"  # a file
AT_ONCE = 4  # calls of the pipeline
FONT = ["ui-sans-serif", "system-ui", "sans-serif"]
CSS = ".pixels img { image-rendering: pixelated; } footer { display: none !important; }"


def build_page(model: Model, runs: Runs, local: bool = True) -> gr.Blocks:
    """
    The tabs.

    Args:
        model: to play with.
        runs: that training starts in.
        local: whether whoever opens the page may read folders and train on this machine.
    """
    with gr.Blocks(title=f"atlas-diffusers: {model.name}", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown(f"# {model.name}")
        with gr.Tab("Generate"):
            generate_tab(model)
        with gr.Tab("Compare"):
            compare_tab(model)
        with gr.Tab("Schedules"):
            schedules_tab(model)
        with gr.Tab("Bridge"):
            bridge_tab(model, local)
        if local:
            with gr.Tab("Your pictures"):
                pictures_tab(runs, page)
    return page.queue(default_concurrency_limit=AT_ONCE)


def open_page(page: gr.Blocks, host: str, port: int, share: bool = False) -> str:
    """
    Serve a page in threads of its own, and return its address.

    Raises:
        OSError: for a port in use.
    """
    theme: Any = gr.themes.Default(font=FONT, font_mono=["ui-monospace", "monospace"])
    try:
        _, address, shared = page.launch(
            server_name=host, server_port=port, share=share, prevent_thread_lock=True, quiet=True, ssr_mode=False, pwa=False,
            max_file_size=MOST_UPLOADED, theme=theme, css=CSS, footer_links=[], run_history=False, mcp_server=False,
        )  # fmt: skip
    except OSError as error:
        raise OSError(f"port {port} of {host} cannot be had, is it in use? Choose another by --port") from error
    return shared or address


def serve(model: Model, host: str, port: int, share: bool = False) -> None:
    """Serve until Ctrl-C; then runs stop with a checkpoint, and temporary files go."""
    with scratch_folder(), Runs() as runs:
        page = build_page(model, runs, local=host in LOOPBACK and not share)
        print(f"{open_page(page, host, port, share)}  (Ctrl-C ends it)", flush=True)
        try:
            threading.Event().wait()
        finally:
            page.close(verbose=False)
