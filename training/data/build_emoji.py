"""Rebuild the embedded emoji pictures from the npm package ``emoji-datasource-google`` 16.0.0.

    npm pack emoji-datasource-google@16.0.0
    python training/data/build_emoji.py emoji-datasource-google-16.0.0.tgz

Every emoji but flags and components (no skin-tone variants) is cut from the package's 32-pixel sheet, laid on white and
packed, in the order of ``emoji.json``, into one lossless WebP sheet. The pixels depend only on the tarball; the bytes of
the WebP file also depend on libwebp, so ``--check`` compares both and says which of them differs.
"""

import argparse
import hashlib
import io
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

SIZE, BORDER, COLUMNS = 32, 1, 41
TARBALL_SHA256 = "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438"
OUTPUT = Path(__file__).parents[2] / "atlas_diffusers" / "pretrained" / "emoji"

# Unicode's names describe the glyph of a 1990s font ("black" means filled); these say what the picture shows.
RENAMED = {
    "HEAVY BLACK HEART": "red heart",
    "HEART EXCLAMATION": "heart exclamation mark",
    "BLACK HEART SUIT": "heart suit",
    "BLACK SPADE SUIT": "spade suit",
    "BLACK CLUB SUIT": "club suit",
    "BLACK DIAMOND SUIT": "diamond suit",
    "BLACK TELEPHONE": "red telephone",
    "BLACK SUN WITH RAYS": "sun with rays",
    "BLACK SCISSORS": "scissors",
    "WHITE MEDIUM STAR": "star",
    "WHITE SMILING FACE": "smiling face",
    "WHITE HEAVY CHECK MARK": "check mark button",
    "HEAVY LARGE CIRCLE": "hollow red circle",
    "BLACK QUESTION MARK ORNAMENT": "red question mark",
    "HEAVY EXCLAMATION MARK SYMBOL": "red exclamation mark",
    "WHITE QUESTION MARK ORNAMENT": "grey question mark",
    "WHITE EXCLAMATION MARK ORNAMENT": "grey exclamation mark",
    "BLACK UNIVERSAL RECYCLING SYMBOL": "recycling symbol",
}


def caption(name: str) -> str:
    """``"FAMILY: MAN, GIRL, BOY"`` -> ``"family man girl boy"``."""
    text = RENAMED.get(name, name.lower())
    return " ".join(text.replace(":", " ").replace(",", " ").replace("’", "").replace("-", " ").split())


def aliases(entry: dict) -> list[str]:
    """The short names as words, without the caption itself and without bare abbreviations such as ``"x"``."""
    words = [name.replace("_", " ").replace("-", " ") for name in entry["short_names"]]
    return [w for w in dict.fromkeys(words) if w != caption(entry["name"]) and len(w) > 2]


def read(tarball: bytes) -> tuple[list[dict], Image.Image]:
    with tarfile.open(fileobj=io.BytesIO(tarball)) as archive:
        entries = json.load(archive.extractfile("package/emoji.json"))
        sheet = Image.open(io.BytesIO(archive.extractfile("package/img/google/sheets/32.png").read())).convert("RGBA")
    return [e for e in entries if e["category"] not in ("Flags", "Component")], sheet


def on_white(sheet: Image.Image, column: int, row: int) -> np.ndarray:
    """The emoji's RGB pixels laid on white, in exact integer arithmetic: ``round(a·c + (1 − a)·255)``."""
    x, y = (v * (SIZE + 2 * BORDER) + BORDER for v in (column, row))
    rgba = np.asarray(sheet.crop((x, y, x + SIZE, y + SIZE)), dtype=np.uint32)
    alpha = rgba[..., 3:]
    return ((rgba[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def build(tarball: bytes) -> tuple[Image.Image, list[dict]]:
    entries, source = read(tarball)
    rows = -(-len(entries) // COLUMNS)
    sheet = np.full((rows * SIZE, COLUMNS * SIZE, 3), 255, np.uint8)
    for i, e in enumerate(entries):
        y, x = (v * SIZE for v in divmod(i, COLUMNS))
        sheet[y : y + SIZE, x : x + SIZE] = on_white(source, e["sheet_x"], e["sheet_y"])
    captions = [
        {
            "unified": e["unified"],
            "name": e["name"],
            "text": caption(e["name"]),
            "aliases": aliases(e),
            "category": e["category"],
            "subcategory": e["subcategory"],
        }
        for e in entries
    ]
    return Image.fromarray(sheet), captions


def encode(sheet: Image.Image, captions: list[dict]) -> dict[str, bytes]:
    webp = io.BytesIO()
    sheet.save(webp, "WEBP", lossless=True, quality=100, method=6, exact=True)
    lines = ",\n".join(json.dumps(c, ensure_ascii=False) for c in captions)
    return {"sheet.webp": webp.getvalue(), "captions.json": f"[\n{lines}\n]\n".encode()}


def check(files: dict[str, bytes], sheet: Image.Image, folder: Path) -> int:
    """0 if the folder holds exactly these bytes, 1 with a line for each file that differs."""
    differing = [name for name, data in files.items() if (folder / name).read_bytes() != data]
    for name in differing:
        print(f"{name}: differs from {folder / name}")
    if "sheet.webp" in differing:
        with Image.open(folder / "sheet.webp") as shipped:
            same = shipped.size == sheet.size and np.array_equal(np.asarray(shipped.convert("RGB")), np.asarray(sheet))
        print("sheet.webp: pixels", "equal, only the libwebp encoding differs" if same else "differ too")
    return 1 if differing else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tarball", type=Path)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--check", action="store_true", help="compare with the folder's files instead of writing them")
    args = parser.parse_args()
    data = args.tarball.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != TARBALL_SHA256:
        parser.error(f"{args.tarball}: SHA-256 is {found}, expected {TARBALL_SHA256}")
    sheet, captions = build(data)
    files = encode(sheet, captions)
    if args.check:
        return check(files, sheet, args.output)
    args.output.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (args.output / name).write_bytes(content)
        print(f"{args.output / name}: {len(content)} bytes, SHA-256 {hashlib.sha256(content).hexdigest()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
