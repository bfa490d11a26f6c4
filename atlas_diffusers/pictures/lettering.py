"""Text in any script: each letter in the first font that has it, emoji as pictures, and nothing as an empty box."""

import gzip
import io
import json
import unicodedata
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from ..pretrained import FOLDER as PRETRAINED
from ..pretrained import TILE

UNIFONT = Path(__file__).parent / "fonts" / "unifont.otf.gz"
SIZE, UNIFONT_SIZE, EMOJI_SIZE = 13, 16, 16
VARIATION, JOINER, TONES = "\ufe0f", "\u200d", "\U0001f3fb\U0001f3fc\U0001f3fd\U0001f3fe\U0001f3ff"


class Lettering:
    """
    Writes labels; measures like a font of Pillow.

    Latin letters are those of Pillow's own font, other scripts those of GNU Unifont (without ligatures where Pillow lacks
    raqm), emoji the embedded pictures. What none of them has is spelt out by its Unicode name.
    """

    def __init__(self):
        self.latin: Any = ImageFont.load_default(SIZE)

    def getlength(self, text: str) -> float:
        """Pixels from left to right."""
        return sum(self._length(kind, run) for kind, run in self._runs(text))

    def write(self, sheet: Image.Image, x: float, y: float, text: str) -> None:
        """Black on a sheet, with its middle at x and its top at y."""
        draw, runs = ImageDraw.Draw(sheet), self._runs(text)
        if all(kind == "latin" for kind, _ in runs):
            draw.text((x, y), text, fill="black", font=self.latin, anchor="ma")
            return
        x -= self.getlength(text) / 2
        for kind, run in runs:
            if kind == "emoji":
                picture = emoji_pictures()[run].resize((EMOJI_SIZE, EMOJI_SIZE), Image.Resampling.LANCZOS)
                sheet.paste(picture, (round(x), round(y)))
            else:
                draw.text((x, y), run, fill="black", font=self.latin if kind == "latin" else unifont(), anchor="la")
            x += self._length(kind, run)

    def _length(self, kind: str, run: str) -> float:
        if kind == "emoji":
            return EMOJI_SIZE
        return (self.latin if kind == "latin" else unifont()).getlength(run)

    def _runs(self, text: str) -> list[tuple[str, str]]:
        """Neighbours that are written the same way, `latin`, `unifont` or one `emoji` each."""
        if text.isascii() or all(has(self.latin, letter) for letter in set(text)):
            return [("latin", text)]
        runs = []
        for kind, part in groupby(self._pieces(text), key=lambda piece: piece[0]):
            letters = [piece[1] for piece in part]
            runs += [(kind, letter) for letter in letters] if kind == "emoji" else [(kind, "".join(letters))]
        return runs

    def _pieces(self, text: str) -> list[tuple[str, str]]:
        text, pictures, pieces, place = text.replace(VARIATION, ""), emoji_pictures(), [], 0
        longest = max(map(len, pictures))
        while place < len(text):
            ends = range(min(len(text), place + longest), place, -1)
            found = next((text[place:end] for end in ends if text[place:end] in pictures), None)
            if found is not None:
                pieces.append(("emoji", found))
            elif text[place] != JOINER and text[place] not in TONES:
                pieces.append(self._letter(text[place]))
            place += len(found or text[place])
        return pieces

    def _letter(self, letter: str) -> tuple[str, str]:
        if has(self.latin, letter):
            return "latin", letter
        if has(unifont(), letter):
            return "unifont", letter
        return "latin", f"[{unicodedata.name(letter, f'U+{ord(letter):04X}').lower()}]"


@cache
def unifont() -> Any:
    """GNU Unifont 15.0.01 (SIL Open Font License 1.1), which covers the basic multilingual plane, at its size in pixels."""
    return ImageFont.truetype(io.BytesIO(gzip.decompress(UNIFONT.read_bytes())), UNIFONT_SIZE)


def has(font: Any, letter: str) -> bool:
    """Whether a font draws something else for a letter than for what is no character."""
    return letter.isspace() or _mask(font, letter) != _mask(font, "\uffff")


def _mask(font: Any, letter: str) -> tuple[tuple[int, int], bytes]:
    mask = font.getmask(letter)
    return mask.size, bytes(mask)


@cache
def emoji_pictures() -> dict[str, Image.Image]:
    """The embedded emoji by their characters, without variation selectors."""
    captions = json.loads((PRETRAINED / "emoji" / "captions.json").read_text(encoding="utf-8"))
    with Image.open(PRETRAINED / "emoji" / "sheet.webp") as file:
        sheet = file.convert("RGB")
    columns, pictures = sheet.width // TILE, {}
    for index, entry in enumerate(captions):
        y, x = (v * TILE for v in divmod(index, columns))
        character = "".join(chr(int(code, 16)) for code in entry["unified"].split("-")).replace(VARIATION, "")
        pictures[character] = sheet.crop((x, y, x + TILE, y + TILE))
    return pictures
