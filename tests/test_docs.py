"""The pages of the site, and the docstrings that they are made of."""

import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = sorted(file.parent.name for file in (ROOT / "atlas_diffusers").glob("*/__init__.py"))


def public_names(room):
    module = importlib.import_module(f"atlas_diffusers.{room}")
    return {name: getattr(module, name) for name in getattr(module, "__all__", ())}


def own_methods(cls):
    """Public functions and properties that a class of ours defines, and does not inherit a docstring for."""
    for name, value in vars(cls).items():
        function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        inherited = any(getattr(base, name, None) is not None for base in cls.__mro__[1:])
        if not name.startswith("_") and inspect.isfunction(function) and not inherited:
            yield name, function


@pytest.mark.parametrize("room", [room for room in ROOMS if room != "app"])
def test_every_public_name_has_a_docstring(room):
    missing = []
    for name, value in public_names(room).items():
        if not (inspect.isclass(value) or inspect.isfunction(value)):
            continue
        if not (value.__doc__ or "").strip():
            missing.append(name)
        if inspect.isclass(value) and value.__module__.startswith("atlas_diffusers"):
            missing += [f"{name}.{method}" for method, function in own_methods(value) if not inspect.getdoc(function)]
    assert missing == []


def test_formulas_become_mathml_and_code_stays():
    pytest.importorskip("mkdocs", reason="the extra `docs` is not installed")
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        hooks = importlib.import_module("hooks")
    finally:
        sys.path.remove(str(ROOT / "docs"))
    page = hooks.on_page_markdown("price 5$ `$HOME` $a_1$\n\n$$ \\frac{1}{2} $$")
    assert "<msub><mi>a</mi><mn>1</mn></msub>" in page
    assert "<mfrac><mrow><mn>1</mn></mrow><mrow><mn>2</mn></mrow></mfrac>" in page
    assert "price 5$ `$HOME`" in page


def test_the_site_builds_without_a_warning_and_without_a_network(tmp_path):
    pytest.importorskip("mkdocs", reason="the extra `docs` is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    reference = (tmp_path / "site" / "reference" / "schedulers.html").read_text(encoding="utf-8")
    assert "AtlasHeunScheduler" in reference and "(corrector, called at" in reference
    assert ":class:" not in reference
    pages = [page.read_text(encoding="utf-8") for page in (tmp_path / "site").rglob("*.html")]
    assert len(pages) > 20
    fetched = re.findall(r'<(?:script|img|link)[^>]+(?:src|href)="(https?://[^"]+)"', "\n".join(pages))
    assert [address for address in fetched if "github" not in address] == []
