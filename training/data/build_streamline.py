"""Streamline's pictures of the embedded things, a style that no pictogram has, as training data.

    npm pack @iconify-json/streamline-emojis@1.2.4
    python training/data/build_streamline.py iconify-json-streamline-emojis-1.2.4.tgz data/streamline

Streamline Emojis, copyright Streamline, CC BY 4.0. Pictures whose names are one of the embedded things' (numbers that tell
variants apart left out) are rendered at 64x64 pixels by resvg and laid on white, in two folders with captions: `test` has every
thing whose name's SHA-256 is 0 modulo 10, `train` the others.
"""

import argparse
import hashlib
import json
import re
import sys
from pathlib import Path

from build_pictograms import drawing, members, render
from PIL import Image

from atlas_diffusers.pretrained.pictogram_data import things

DIGEST = "5dac87c876b322500989828c5823143e0100d78881627a2e4081a4b897cbfdbc"


def named(keys: list[str]) -> dict[str, str]:
    """The name of the thing that each picture shows; those that show none of the embedded things are left out."""
    spelled = {other: thing["name"] for thing in things() for other in (*thing["names"], thing["name"])}
    plain = {key: (key.replace("-", " "), re.sub(r"-\d+$", "", key).replace("-", " ")) for key in keys}
    return {key: spelled[name] for key, names in plain.items() if (name := next((n for n in names if n in spelled), None))}


def split_of(name: str) -> str:
    """`test` for one thing in ten."""
    return "test" if int(hashlib.sha256(name.encode()).hexdigest(), 16) % 10 == 0 else "train"


def build(icons: dict, folder: Path) -> dict[str, int]:
    """Write the pictures of a set; returns how many a split has."""
    rows: dict[str, list[dict]] = {"train": [], "test": []}
    for key, name in named(sorted(icons["icons"])).items():
        split, file = split_of(name), f"{key}.png"
        (folder / split).mkdir(parents=True, exist_ok=True)
        Image.fromarray(render(drawing(icons, key))).save(folder / split / file)
        rows[split].append({"file_name": file, "text": f"{name}, streamline style"})
    for split, lines in rows.items():
        text = "".join(json.dumps(row) + "\n" for row in lines)
        (folder / split / "metadata.jsonl").write_text(text, encoding="utf-8")
    return {split: len(lines) for split, lines in rows.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tarball", type=Path)
    parser.add_argument("folder", type=Path, help="where the pictures are written")
    args = parser.parse_args()
    (icons,) = members(args.tarball.parent, args.tarball.name, DIGEST, "icons.json")
    print(build(icons, args.folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
