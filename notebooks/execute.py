"""Run the notebooks of this folder, each in a temporary folder; with ``--write`` their outputs are kept."""

import argparse
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent
SECONDS = 300  # a cell, on a busy machine


def execute(file: Path) -> nbformat.NotebookNode:
    """The notebook with its outputs; ``CellExecutionError`` for a cell that fails."""
    notebook = nbformat.read(file, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(notebook, timeout=SECONDS, resources={"metadata": {"path": folder}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times, which differ from run to run
        if cell.cell_type == "code":  # what libraries say of notebooks, and their bars
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return notebook


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    for file in sorted(FOLDER.glob("*.ipynb")):
        notebook = execute(file)
        if args.write:
            nbformat.write(notebook, file)
        print(file.name)
