"""
A folder of 200 captioned shapes, from ``init`` to pictures, with nothing edited: how many of 30 prompts show what they ask for.

    python benchmarks/own_pictures.py WORK_FOLDER

Six colours times five shapes, of any size and place, on white. A picture is judged by its ink: the nearest of the colours, and
the shape whose outline, stretched to the ink's box, overlaps it most. All 200 pictures of the folder pass this judge.
"""

import argparse
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

COLOURS = {
    "red": (220, 40, 40), "green": (40, 160, 60), "blue": (40, 80, 220), "yellow": (240, 210, 40), "purple": (140, 60, 180),
    "black": (20, 20, 20),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "cross", "ring")
PICTURES, SIDE, INK = 200, 64, 60


def draw_shape(name: str, side: int, colour: tuple[int, int, int], box: tuple[float, float, float, float]) -> Image.Image:
    """One shape on white, drawn four times as large and averaged."""
    picture = Image.new("RGB", (4 * side, 4 * side), "white")
    draw, (left, top, right, bottom) = ImageDraw.Draw(picture), (4 * v for v in box)
    middle, width = (left + right) / 2, (right - left) / 3
    if name == "circle":
        draw.ellipse((left, top, right, bottom), fill=colour)
    elif name == "square":
        draw.rectangle((left, top, right, bottom), fill=colour)
    elif name == "triangle":
        draw.polygon([(middle, top), (right, bottom), (left, bottom)], fill=colour)
    elif name == "cross":
        draw.rectangle((left + width, top, right - width, bottom), fill=colour)
        draw.rectangle((left, top + width, right, bottom - width), fill=colour)
    else:
        draw.ellipse((left, top, right, bottom), fill=colour)
        draw.ellipse((left + width * 0.8, top + width * 0.8, right - width * 0.8, bottom - width * 0.8), fill="white")
    return picture.resize((side, side), Image.Resampling.BOX)


def make_folder(folder: Path) -> None:
    """Every combination six or seven times, captioned in ``.txt`` files as `a red circle`."""
    folder.mkdir(parents=True)
    choice = random.Random(0)
    combinations = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    for number in range(PICTURES):
        colour, shape = combinations[number % len(combinations)]
        size = choice.uniform(0.35, 0.7) * SIDE
        left, top = choice.uniform(2, SIDE - 2 - size), choice.uniform(2, SIDE - 2 - size)
        draw_shape(shape, SIDE, COLOURS[colour], (left, top, left + size, top + size)).save(folder / f"{number:03d}.png")
        (folder / f"{number:03d}.txt").write_text(f"a {colour} {shape}\n")


def judge(picture: Image.Image) -> tuple[str, str] | None:
    """Colour and shape of the ink, or ``None`` where there is hardly any."""
    pixels = np.asarray(picture.convert("RGB")).astype(float)
    ink = np.linalg.norm(255 - pixels, axis=-1) > INK
    if ink.sum() < 9:
        return None
    rows, columns = np.where(ink)
    cut = ink[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    # the darkest half of the ink: edges are mixed with white
    inside = pixels[ink]
    inside = inside[np.argsort(np.linalg.norm(255 - inside, axis=-1))[len(inside) // 2 :]].mean(0)
    colour = min(COLOURS, key=lambda name: np.linalg.norm(inside - COLOURS[name]))
    mask = np.asarray(Image.fromarray(cut).resize((32, 32), Image.Resampling.NEAREST))

    def overlap(name: str) -> float:
        other = np.asarray(draw_shape(name, 32, (0, 0, 0), (0, 0, 32, 32)).convert("L")) < 128
        return (mask & other).sum() / (mask | other).sum()

    return colour, max(SHAPES, key=overlap)


def run(*command: str) -> float:
    """The installed command line; seconds."""
    start = time.perf_counter()
    print("$ atlas-diffusers", *command, flush=True)
    subprocess.run([sys.executable, "-m", "atlas_diffusers", *command], check=True)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="a new folder, or one whose run goes on")
    work = parser.parse_args().work
    folder, recipe, output, painted = work / "shapes", work / "recipe.yaml", Path("outputs/shapes"), work / "painted"
    if not folder.exists():
        make_folder(folder)
        run("init", str(folder), "-o", str(recipe))
    seconds = run("train", str(recipe))
    prompts = [f"a {colour} {shape}" for colour in COLOURS for shape in SHAPES]
    run("generate", *prompts, "-m", str(output), "-o", str(painted))
    asked = [tuple(prompt.split()[1:]) for prompt in prompts]
    found = [judge(Image.open(file)) for file in sorted(painted.iterdir())]
    right = sum(a == f for a, f in zip(asked, found))
    for a, f in zip(asked, found):
        if a != f:
            print(f"asked for {a}, found {f}")
    originals = [judge(Image.open(file)) for file in sorted(folder.glob("*.png"))]
    true = [tuple(file.read_text().split()[1:]) for file in sorted(folder.glob("*.txt"))]
    print(f"the judge agrees with {sum(o == t for o, t in zip(originals, true))} of {PICTURES} captions of the folder")
    print(f"{right} of {len(prompts)} prompts show the shape and colour; trained in {seconds / 60:.1f} minutes")


if __name__ == "__main__":
    main()
