"""A folder of pictures as a data set: captions from metadata, from texts beside the pictures, or from names where asked."""

import csv
import json
from pathlib import Path
from typing import Any

METADATA = ("metadata.jsonl", "metadata.csv")
TEXTS = (".txt", ".caption")
SHOWN = 5


def read_folder(root: str, split: str, captions: str):
    """
    A ``datasets.Dataset`` with ``image``, ``text`` (empty where there is no caption), the columns of metadata files and, where
    every picture lies in a subfolder, ``label``; ``info.description`` says where the captions come from, and what does not fit.

    Args:
        root: folder; its subfolder called ``split``, where there is one, is read instead.
        captions: `auto` (metadata, else texts), `metadata`, `files` (`.txt` beside each picture), `names` (of the files) or
            `folders` (of the subfolders).

    Raises:
        ValueError: for a folder without pictures, captions that were asked for and are not there, and files that are not UTF-8
            or do not parse; ``OSError`` for a folder that is not there.
    """
    import datasets
    from PIL import Image

    folder = Path(root)
    if not folder.is_dir():
        raise OSError(f"dataset: folder {root} does not exist")
    if (folder / split).is_dir():
        folder = folder / split
    elif split != "train":
        raise ValueError(f"dataset: folder {root} has no subfolder for split {split!r}")
    known = Image.registered_extensions()
    files = [f for f in sorted(folder.rglob("*")) if not any(p.startswith(".") for p in f.relative_to(folder).parts)]
    pictures = [file for file in files if file.suffix.lower() in known and file.is_file()]
    if not pictures:
        raise ValueError(f"dataset.root={root!r} has no pictures in split {split!r}")
    rows, told = _annotated(folder, pictures, files, captions)
    columns = {name: [row.get(name) for row in rows] for name in dict.fromkeys(name for row in rows for name in row)}
    columns |= {"image": [str(picture) for picture in pictures], **_labels(folder, pictures, columns)}
    data = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image(decode=False))
    data.info.description = told
    return data


def _annotated(folder: Path, pictures: list[Path], files: list[Path], captions: str) -> tuple[list[dict[str, Any]], str]:
    """A row of annotations for each picture, and where they come from."""
    tables = [file for file in files if file.name in METADATA]
    texts = {f.with_suffix(""): f for f in files if f.suffix.lower() in TEXTS}
    if captions == "auto":
        beside = any(picture.with_suffix("") in texts for picture in pictures)
        captions = "metadata" if tables else "files" if beside else "none"
    if captions == "metadata" and not tables:
        raise ValueError(f"dataset.captions='metadata': {folder} has neither {' nor '.join(METADATA)}")
    if captions == "metadata":
        found = {path: row for table in tables for path, row in _table(table).items()}
        rows = [{"text": None, **found.get(picture, {})} for picture in pictures]
        lost = [str(path.relative_to(folder)) for path in found if path not in set(pictures)]
    elif captions == "files":
        rows = [{"text": _text(texts[p.with_suffix("")]) if p.with_suffix("") in texts else None} for p in pictures]
        named = {picture.with_suffix("") for picture in pictures}
        lost = [file.name for stem, file in texts.items() if stem not in named]
    else:
        rows, lost = [{"text": _name(picture, folder, captions)} for picture in pictures], []
    bare = [p.name for p, row in zip(pictures, rows) if not row["text"]]
    for row in rows:
        row["text"] = row["text"] or ""
    return rows, _told(captions, len(pictures), bare, lost)


def _name(picture: Path, folder: Path, captions: str) -> str:
    name = {"names": picture.stem, "folders": picture.parent.name if picture.parent != folder else "", "none": ""}[captions]
    return " ".join(name.replace("_", " ").replace("-", " ").split())


def _told(captions: str, count: int, bare: list[str], lost: list[str]) -> str:
    origin = {
        "metadata": "from metadata", "files": "from the texts beside them", "names": "from their names",
        "folders": "from their folders' names", "none": "",
    }  # fmt: skip
    parts = [f"{count} pictures, {count - len(bare)} with captions {origin[captions]}".strip()]
    if bare and captions != "none":
        parts.append(f"{len(bare)} without one train with the empty caption: {_some(bare)}")
    if lost:
        parts.append(f"{len(lost)} captions without a picture: {_some(lost)}")
    return "; ".join(parts)


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def _labels(folder: Path, pictures: list[Path], columns: dict[str, list]) -> dict[str, list[int]]:
    """Numbers of the subfolders, in the order of their names, where every picture lies in one and nothing else says labels."""
    parts = [picture.relative_to(folder).parts for picture in pictures]
    if "label" in columns or any(len(part) < 2 for part in parts):
        return {}
    numbers = {name: number for number, name in enumerate(sorted({part[0] for part in parts}))}
    return {"label": [numbers[part[0]] for part in parts]}


def _table(file: Path) -> dict[Path, dict[str, Any]]:
    """Rows of a metadata file by the picture that they name."""
    text, found = _text(file), {}
    lines = csv.DictReader(text.splitlines()) if file.suffix == ".csv" else text.splitlines()
    for number, line in enumerate(lines, 2 if file.suffix == ".csv" else 1):
        if not line:
            continue
        try:
            row = dict(line) if isinstance(line, dict) else json.loads(line)
            name = row.pop("file_name")
        except (json.JSONDecodeError, KeyError, AttributeError, TypeError) as error:
            kind = type(error).__name__
            raise ValueError(f"{file}, line {number}: expected a file_name and a text ({kind}: {error})") from error
        if not isinstance(row.get("text", ""), (str, type(None))):
            raise ValueError(f"{file}, line {number}: {name} has no caption, but {row['text']!r}")
        found[file.parent / name] = row
    return found


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 (byte {error.start})") from error
