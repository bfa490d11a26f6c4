"""What MkDocs does for this site besides: pages of the API from the docstrings, mathematics as MathML."""

import ast
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
CODE = re.compile(r"(```.*?```|`[^`\n]*`)", re.S)
COMMANDS = ("app", "cli", "examples")  # rooms that nobody imports from
DISPLAY, INLINE = re.compile(r"\$\$(.+?)\$\$", re.S), re.compile(r"(?<![\\$\w])\$([^$\n]+?)\$(?![\d$])")


def rooms() -> dict[str, list[str]]:
    """The public names of every room that says which they are; those that it passes on from another room stand there."""
    found = {}
    for file in sorted((ROOT / "atlas_diffusers").glob("*/__init__.py")):
        tree = ast.parse(file.read_text(encoding="utf-8")).body
        lazy = [node for guard in tree if isinstance(guard, ast.If) for node in guard.body]  # told to type checkers alone
        assigned = [node for node in tree if isinstance(node, ast.Assign)]
        listed = [node.value for node in assigned if getattr(node.targets[0], "id", "") == "__all__"]
        imports = [node for node in (*tree, *lazy) if isinstance(node, ast.ImportFrom) and node.level]
        own = {alias.asname or alias.name for node in imports for alias in node.names}
        own |= {node.name for node in tree if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name[0] != "_"}
        if listed and not lazy:
            own &= set(ast.literal_eval(listed[0]))
        if (listed or lazy) and file.parent.name not in COMMANDS:
            found[file.parent.name] = sorted(own)
    return found


def on_files(files: Files, config: Any) -> Files:
    """A page for each room."""
    table = ["# API", "", "| room | public names |", "|---|---|"]
    for room, names in rooms().items():
        body = "\n\n".join(f"::: atlas_diffusers.{room}.{name}" for name in names)
        files.append(File.generated(config, f"reference/{room}.md", content=f"# atlas_diffusers.{room}\n\n{body}\n"))
        table.append(f"| [`atlas_diffusers.{room}`]({room}.md) | {', '.join(f'`{name}`' for name in names)} |")
    files.append(File.generated(config, "reference/index.md", content="\n".join(table) + "\n"))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Formulas between dollars become MathML, which browsers draw by themselves."""
    parts = CODE.split(markdown)
    for index in range(0, len(parts), 2):
        text = DISPLAY.sub(lambda m: convert(m[1].strip(), display="block"), parts[index])
        # a line that began with <math> would be a paragraph of its own
        parts[index] = INLINE.sub(lambda m: f"<span>{convert(m[1])}</span>", text)
    return "".join(parts)


def on_page_content(html: str, **_: Any) -> str:
    """Sphinx's roles, which the docstrings have, are read as what they name."""
    return re.sub(r":(?:class|func|meth|data|attr|mod):(<code>)~?", r"\1", html)
