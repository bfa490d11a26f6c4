"""The notebooks run, and what is committed of them is small."""

import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("nbclient", reason="nbclient, of the extra `dev`, is not installed")

FOLDER = Path(__file__).parents[1] / "notebooks"
spec = importlib.util.spec_from_file_location("execute", FOLDER / "execute.py")
assert spec is not None and spec.loader is not None
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.ipynb")), ids=lambda file: file.stem)
def test_a_notebook_runs(file):
    committed = file.read_text(encoding="utf-8")
    assert len(committed) < 300_000 and "site-packages" not in committed
    assert '"image/png"' in committed
    assert "image/png" in script.execute(file).cells[-1].outputs[-1].data
