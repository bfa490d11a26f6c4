"""Rebuild the embedded pictograms: the same things drawn in six styles, from npm packages of SVG pictures.

    for name in noto@1.2.9 noto-v1@1.2.5 fluent-emoji@1.2.7 fluent-emoji-flat@1.2.6 twemoji@1.2.5 fxemoji@1.2.2; do
        npm pack @iconify-json/$name
    done
    npm pack emojibase-data@17.0.0 emojilib@4.0.3
    pip install resvg-py==0.5.0
    python training/data/build_pictograms.py FOLDER_OF_THE_TARBALLS

A thing is an emoji of Unicode without flags, components and skin tones that at least four of the six styles draw. Every drawing
is rendered at 64x64 pixels by resvg and laid on white; each style is one WebP sheet, and ``things.json`` has names, keywords
and the position in each sheet. ``--check`` compares the folder with what is built and says which files differ.
"""

import argparse
import hashlib
import io
import json
import re
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

SIZE, COLUMNS, FEWEST_STYLES = 64, 40, 4
OUTPUT = Path(__file__).parents[2] / "atlas_diffusers" / "pretrained" / "pictograms"
STYLES = {
    "noto": ("iconify-json-noto-1.2.9.tgz", "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad"),
    "noto-v1": ("iconify-json-noto-v1-1.2.5.tgz", "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37"),
    "fluent": ("iconify-json-fluent-emoji-1.2.7.tgz", "8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b"),
    "flat": ("iconify-json-fluent-emoji-flat-1.2.6.tgz", "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175"),
    "twemoji": ("iconify-json-twemoji-1.2.5.tgz", "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7"),
    "fxemoji": ("iconify-json-fxemoji-1.2.2.tgz", "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef"),
}
WORDS = {
    "emojibase": ("emojibase-data-17.0.0.tgz", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a"),
    "emojilib": ("emojilib-4.0.3.tgz", "7f9a6b43cff31d18985b7d65d11faba5bd971cbcc60020cf6d09322fbaaaf303"),
}
GROUPS = {
    0: "smileys", 1: "people", 3: "animals & nature", 4: "food & drink", 5: "travel & places", 6: "activities",
    7: "objects", 8: "symbols",
}  # fmt: skip
SHORTCODES = ("github", "iamcal", "emojibase", "joypixels")


def words(name: str) -> str:
    """``"Jack-O-Lantern: lit"`` -> ``"jack o lantern lit"``."""
    return " ".join(re.sub(r"[^\w&+]+", " ", name.lower().replace("’", "").replace("'", "").replace("_", " ")).split())


def plain(codepoints: str) -> str:
    """A sequence of code points without variation selectors, as the packages' tables spell it."""
    return "-".join(part for part in codepoints.lower().split("-") if part != "fe0f")


def members(folder: Path, tarball: str, expected: str, *names: str) -> list:
    """JSON files of a tarball, or ``SystemExit`` where its SHA-256 is another."""
    data = (folder / tarball).read_bytes()
    if (found := hashlib.sha256(data).hexdigest()) != expected:
        raise SystemExit(f"{tarball}: SHA-256 is {found}, expected {expected}")
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return [json.load(archive.extractfile(f"package/{name}")) for name in names]


def read_things(folder: Path) -> list[dict]:
    """Every emoji but flags and components: code points, name, other names, keywords, category."""
    tarball, digest = WORDS["emojibase"]
    files = [f"en/shortcodes/{name}.json" for name in SHORTCODES]
    entries, *codes = members(folder, tarball, digest, "en/data.json", *files)
    (keywords,) = members(folder, *WORDS["emojilib"], "dist/emoji-en-US.json")
    things = []
    for entry in entries:
        if entry.get("group") not in GROUPS:
            continue
        short = [table.get(entry["hexcode"], []) for table in codes]
        names = [words(n) for group in short for n in ([group] if isinstance(group, str) else group)]
        name = words(entry["label"])
        tags = [words(tag) for tag in (*entry.get("tags", ()), *keywords.get(entry["emoji"], ()))]
        names = [n for n in dict.fromkeys(names) if n != name and len(n) > 2]
        tags = [t for t in dict.fromkeys(tags) if t not in (name, *names) and len(t) > 2]
        things.append({
            "unicode": plain(entry["hexcode"]), "name": name, "names": names, "keywords": tags,
            "category": GROUPS[entry["group"]],
        })  # fmt: skip
    return things


def drawing(icons: dict, key: str) -> str | None:
    """The SVG document called ``key`` in a set, or ``None``."""
    key = icons.get("aliases", {}).get(key, {}).get("parent", key)
    icon = icons["icons"].get(key)
    if icon is None:
        return None
    width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
    left, top = icon.get("left", 0), icon.get("top", 0)
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'


def render(svg: str) -> np.ndarray:
    """RGB pixels on white, ``(SIZE, SIZE, 3)``, in exact integer arithmetic: ``round(a·c + (1 − a)·255)``."""
    import resvg_py

    png = resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE)
    rgba = np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGBA").resize((SIZE, SIZE)), dtype=np.uint32)
    alpha = rgba[..., 3:]
    return ((rgba[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def build(folder: Path) -> tuple[dict[str, Image.Image], list[dict]]:
    """A sheet for every style, and the things with their position in each."""
    things = read_things(folder)
    sets = {style: members(folder, *source, "icons.json")[0] for style, source in STYLES.items()}
    (by_codepoint,) = members(folder, *STYLES["noto"], "chars.json")
    by_codepoint = {plain(codepoints): key for codepoints, key in by_codepoint.items()}
    spread = Counter(name for thing in things for name in (thing["name"], *thing["names"]))
    kept, pictures = [], {style: [] for style in STYLES}
    for thing in things:
        slug = thing["name"].replace(" ", "-")
        keys = [by_codepoint.get(thing["unicode"], slug), slug]
        own = [name for name in thing["names"] if spread[name] == 1]  # fxemoji has names of its own, written as one word
        found = {}
        for style, icons in sets.items():
            spelled = [re.sub("[- ]", "", name) for name in (*keys, *own)] if style == "fxemoji" else keys
            found[style] = next((svg for name in spelled if (svg := drawing(icons, name))), None)
        if sum(svg is not None for svg in found.values()) < FEWEST_STYLES:
            continue
        thing["at"] = {style: len(pictures[style]) for style, svg in found.items() if svg is not None}
        for style, svg in found.items():
            if svg is not None:
                pictures[style].append(render(svg))
        kept.append(thing)
    return {style: sheet(images) for style, images in pictures.items()}, kept


def sheet(images: list[np.ndarray]) -> Image.Image:
    rows = -(-len(images) // COLUMNS)
    pixels = np.full((rows * SIZE, COLUMNS * SIZE, 3), 255, np.uint8)
    for i, image in enumerate(images):
        y, x = (v * SIZE for v in divmod(i, COLUMNS))
        pixels[y : y + SIZE, x : x + SIZE] = image
    return Image.fromarray(pixels)


def encode(sheets: dict[str, Image.Image], things: list[dict]) -> dict[str, bytes]:
    lines = ",\n".join(json.dumps(thing, ensure_ascii=False) for thing in things)
    files = {"things.json": f"[\n{lines}\n]\n".encode()}
    for style, picture in sheets.items():
        webp = io.BytesIO()
        picture.save(webp, "WEBP", lossless=True, quality=100, method=6, exact=True)
        files[f"{style}.webp"] = webp.getvalue()
    return files


def loss(sheets: dict[str, Image.Image], files: dict[str, bytes]) -> dict[str, float]:
    """RMS difference of the encoded sheets from the rendered ones, of values in [0, 1]."""
    result = {}
    for style, picture in sheets.items():
        shipped = np.asarray(Image.open(io.BytesIO(files[f"{style}.webp"])).convert("RGB"), dtype=np.float64)
        result[style] = float(np.sqrt(np.mean((shipped - np.asarray(picture, dtype=np.float64)) ** 2)) / 255)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the tarballs are")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--check", action="store_true", help="compare with the output folder instead of writing it")
    args = parser.parse_args()
    sheets, things = build(args.folder)
    files = encode(sheets, things)
    if args.check:
        differing = [name for name, data in files.items() if (args.output / name).read_bytes() != data]
        print("\n".join(f"{name}: differs from {args.output / name}" for name in differing) or "all files are equal")
        return 1 if differing else 0
    args.output.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (args.output / name).write_bytes(content)
        print(f"{name}: {len(content)} bytes, SHA-256 {hashlib.sha256(content).hexdigest()}")
    print(f"{len(things)} things, {sum(len(t['at']) for t in things)} pictures")
    print("RMS loss:", {style: round(value, 4) for style, value in loss(sheets, files).items()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
