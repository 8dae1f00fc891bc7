"""Words, question types and phrasings of the card world.

A question ending in "?" is answered briefly ("red"), one ending in "." in a sentence ("it is
red"). Templates hold slots in braces; :data:`SLOTS` gives each a negative code, which the world
replaces by a token id.
"""

from __future__ import annotations

from collections.abc import Iterable

#: colour name -> RGB, 0..255
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (219, 33, 33),
    "green": (26, 148, 46),
    "blue": (31, 64, 224),
    "yellow": (245, 224, 26),
    "purple": (133, 31, 173),
    "orange": (250, 133, 13),
    "cyan": (26, 209, 230),
}
#: cards of these colours carry white letters, the others black ones
WHITE_INK = frozenset({"red", "green", "blue", "purple"})
SHAPES = ("square", "circle", "triangle", "diamond", "star")
#: no 0 or 1, which look like O and I
GLYPHS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ23456789"
LETTERS = GLYPHS[:26]
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight")
DIRECTIONS = ("left", "right", "above", "below")
PHRASINGS = 3

#: question type -> relative frequency (integers: the draw is exact on every machine)
TYPE_WEIGHTS: dict[str, int] = {
    "letter": 8,
    "colour": 8,
    "shape": 6,
    "where": 7,
    "count_colour": 4,
    "count_shape": 4,
    "count_cards": 2,
    "relation": 13,
    "word": 12,
}
TYPES = tuple(TYPE_WEIGHTS)

#: {C} colour, {S} shape, {P} shape in the plural, {G} letter asked about; in answers {A} the one
#: word that answers, {R} row, {L} column, {W} the letters of the printed word
SLOTS = {"{C}": -1, "{S}": -2, "{P}": -3, "{G}": -4, "{A}": -5, "{R}": -6, "{L}": -7, "{W}": -8}

Phrasing = tuple[str, str]
TEMPLATES: dict[str, tuple[Phrasing, Phrasing, Phrasing]] = {
    "letter": (
        ("which letter is on the {C} {S} ?", "{A}"),
        ("what is written on the {C} {S} ?", "{A}"),
        ("read the {C} {S} .", "it says {A}"),
    ),
    "colour": (
        ("what colour is card {G} ?", "{A}"),
        ("which colour does the card {G} have ?", "{A}"),
        ("name the colour of card {G} .", "it is {A}"),
    ),
    "shape": (
        ("what shape is card {G} ?", "{A}"),
        ("which shape does the card {G} have ?", "{A}"),
        ("name the shape of card {G} .", "it is a {A}"),
    ),
    "where": (
        ("where is card {G} ?", "row {R} column {L}"),
        ("in which row and column is card {G} ?", "row {R} column {L}"),
        ("find card {G} .", "it is in row {R} column {L}"),
    ),
    "count_colour": (
        ("how many {C} cards are there ?", "{A}"),
        ("how many cards are {C} ?", "{A}"),
        ("count the {C} cards .", "there are {A}"),
    ),
    "count_shape": (
        ("how many {P} are there ?", "{A}"),
        ("how many cards are {P} ?", "{A}"),
        ("count the {P} .", "there are {A}"),
    ),
    "count_cards": (
        ("how many cards are there ?", "{A}"),
        ("how many cards do you see ?", "{A}"),
        ("count all the cards .", "there are {A}"),
    ),
    "word": (
        ("what does the small word say ?", "{W}"),
        ("which word is printed here ?", "{W}"),
        ("spell the small word .", "{W}"),
    ),
}
#: direction -> phrasings of a relation question: the nearest card in the same row or column
RELATION_TEMPLATES: dict[str, tuple[Phrasing, Phrasing, Phrasing]] = {
    word: (
        (f"which letter is {place} card {{G}} ?", "{A}"),
        (f"what do you see {place} {{G}} ?", "{A}"),
        (f"name the card {place} {{G}} .", "it is {A}"),
    )
    for word, place in zip(DIRECTIONS, ("left of", "right of", "above", "below"), strict=True)
}

SPECIAL = ("<pad>", "<s>", "</s>", "<image>", "<unk>")
PAD, BOS, EOS, IMAGE, UNK = range(5)


def phrasings(kind: str, direction: str) -> tuple[Phrasing, Phrasing, Phrasing]:
    """Three (question, answer) templates of a type; `direction` counts for relations only."""
    return RELATION_TEMPLATES[direction] if kind == "relation" else TEMPLATES[kind]


def _words() -> list[str]:
    listed = [*SPECIAL, *COLOURS, *SHAPES, *(s + "s" for s in SHAPES), *GLYPHS, *NUMBERS]
    known = dict.fromkeys(listed)
    for kind in TYPES:
        for direction in DIRECTIONS:
            for phrasing in phrasings(kind, direction):
                for word in " ".join(phrasing).split():
                    if word not in SLOTS:
                        known[word] = None
    words = list(known)
    # a round size keeps the output head's width divisible by every quantization group size
    return words + [f"<unused{i}>" for i in range(len(words), 128)]


WORDS: tuple[str, ...] = tuple(_words())
TOKEN: dict[str, int] = {word: i for i, word in enumerate(WORDS)}
FIRST_COLOUR, FIRST_SHAPE, FIRST_PLURAL, FIRST_GLYPH, FIRST_NUMBER = (
    TOKEN[w] for w in ("red", "square", "squares", "A", "zero")
)
assert len(WORDS) == len(TOKEN) == 128


def spell(ids: Iterable[int]) -> str:
    """Token ids as text, padding left out."""
    return " ".join(WORDS[i] for i in ids if i != PAD)
