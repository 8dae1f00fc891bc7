"""Draw the letters once: `python -m examples.cards.make_glyphs`.

Writes glyphs.safetensors: `card` uint8 [sizes, glyphs, 24, 24] and `word` uint8 [26, 14, 10], ink
255. The letters are Pillow's built-in face (Aileron, public domain). They are kept as pixels, for
different builds of FreeType draw slightly different ones and pictures must be the same anywhere.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import save_file

from examples.cards.render import CAPITALS, GLYPH_BOX, GLYPH_FILE, WORD_BOX, WORD_CAPITAL
from examples.cards.vocabulary import GLYPHS, LETTERS


def masters() -> tuple[dict[str, Image.Image], int]:
    """Large cropped drawings of every glyph, and the height of a capital in them."""
    font = ImageFont.load_default(size=96)
    drawn = {}
    for glyph in GLYPHS:
        page = Image.new("L", (240, 240))
        ImageDraw.Draw(page).text((60, 60), glyph, font=font, fill=255)
        drawn[glyph] = page.crop(page.getbbox())
    return drawn, drawn["H"].height


def fit(glyph: Image.Image, scale: float, widest: int, box: tuple[int, int]) -> np.ndarray:
    """Scale a drawing and centre it in a box of (height, width) pixels."""
    height = min(box[0], max(1, round(glyph.height * scale)))
    width = max(1, min(widest, round(glyph.width * scale)))
    tile = Image.new("L", (box[1], box[0]))
    small = glyph.resize((width, height), Image.Resampling.BILINEAR)
    tile.paste(small, ((box[1] - width) // 2, (box[0] - height) // 2))
    return np.asarray(tile)


def main() -> None:
    drawn, capital = masters()
    card = [
        [fit(drawn[g], px / capital, px + 2, (GLYPH_BOX, GLYPH_BOX)) for g in GLYPHS]
        for px in CAPITALS
    ]
    word = [fit(drawn[g], WORD_CAPITAL / capital, WORD_BOX[1] - 1, WORD_BOX) for g in LETTERS]
    banks = {"card": torch.tensor(np.array(card)), "word": torch.tensor(np.array(word))}
    save_file(banks, str(GLYPH_FILE))


if __name__ == "__main__":
    main()
