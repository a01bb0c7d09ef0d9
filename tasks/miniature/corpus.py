"""The miniature web: pictures of letters and numbers with captions, drawn from a seed; 32 x 32 RGB.

Its faults are the real web's, on purpose. A short caption ("A picture of a seven") goes with what the web
mostly shows under that name: the spelled word, a Roman numeral, a die, tally marks, and digits that are mostly
printed, bold and coloured. Full and partial captions say what is there, over (nearly) even attributes, so that
a prompt that names form and style steers the picture.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tasks.miniature import glyphs
from tasks.miniature.captions import COLOURS, LETTERS, NUMBERS, POSES, WEIGHTS, Attributes, Detail, caption

Rng = np.random.Generator
Pixels = NDArray[np.uint8]

RGB: dict[str, tuple[float, float, float]] = {
    "white": (0.98, 0.98, 0.98), "black": (0.02, 0.02, 0.02), "grey": (0.53, 0.53, 0.53),
    "red": (0.86, 0.17, 0.15), "green": (0.15, 0.62, 0.25), "blue": (0.16, 0.38, 0.90),
    "yellow": (0.96, 0.85, 0.15), "purple": (0.62, 0.22, 0.70),
}  # fmt: skip
TOO_CLOSE = frozenset(
    {frozenset({"white", "yellow"}), frozenset({"purple", "blue"}), frozenset({"purple", "red"})}
)
"""Pairs of colours that a glyph and its ground do not take together."""

ROMAN = ("", "I", "II", "III", "IV", "V", "VI", "VII", "VIII", "IX")
SHORT_FORMS = {"word": 0.25, "digit": 0.25, "roman numeral": 0.2, "die": 0.15, "tally": 0.15}
SHORT_FORMS_ZERO = {"word": 0.45, "digit": 0.25, "die": 0.3}
"""What a number's short caption shows; zero has no Roman numeral and no tally marks."""
FULL_FORMS = {"digit": 0.6, "word": 0.1, "roman numeral": 0.1, "die": 0.1, "tally": 0.1}
TYPEFACES = ("sans-serif", "serif")
SMALL = frozenset({"word", "roman numeral", "die", "tally"})
"""Forms in which 32 px do not show a typeface: their style is "handwritten" or "printed"."""


@dataclass(frozen=True)
class Sample:
    """One picture [32, 32, 3], what it shows, and captions that go with it."""

    pixels: Pixels
    attributes: Attributes
    captions: tuple[str, ...]


def _pick(rng: Rng, options: dict[str, float]) -> str:
    weights = np.array(list(options.values()))
    return str(rng.choice(list(options), p=weights / weights.sum()))


def _typeset(rng: Rng, form: str, even: bool) -> str:
    """Style of what is not handwritten."""
    return "printed" if form in SMALL else str(rng.choice(TYPEFACES, p=[0.5, 0.5] if even else [0.7, 0.3]))


def _two_colours(rng: Rng) -> tuple[str, str]:
    while True:
        colour, ground = (str(c) for c in rng.choice(COLOURS, 2, replace=False))
        if frozenset({colour, ground}) not in TOO_CLOSE:
            return colour, ground


def even_attributes(rng: Rng, category: str) -> Attributes:
    """Attributes of a fully captioned picture: nearly even, handwriting and white on black more often."""
    forms = {
        f: w for f, w in FULL_FORMS.items() if not (category == "zero" and f in ("roman numeral", "tally"))
    }
    form = _pick(rng, forms) if category in NUMBERS else "letter"
    hand = {"digit": 0.6, "letter": 0.4, "die": 0.5, "tally": 0.5}.get(form, 0.25)
    style = "handwritten" if rng.random() < hand else _typeset(rng, form, even=True)
    colour, ground = _two_colours(rng)
    if style == "handwritten" and rng.random() < 0.2:
        colour, ground = "white", "black"
    return Attributes(category, form, style, str(rng.choice(WEIGHTS)), str(rng.choice(POSES)), colour, ground)


def usual_attributes(rng: Rng, category: str) -> Attributes:
    """Attributes of a picture that the web shows under the category's bare name: the stereotype."""
    if category not in NUMBERS:
        form, hand = "letter", 0.1
    else:
        form, hand = _pick(rng, SHORT_FORMS_ZERO if category == "zero" else SHORT_FORMS), 0.05
    drawn = rng.random() < hand
    plain = _typeset(rng, form, even=False)
    weight = str(rng.choice(WEIGHTS, p=[0.1, 0.25, 0.65]))
    pose = str(rng.choice(POSES, p=[0.8, 0.1, 0.1]))
    while True:
        ground = str(rng.choice(["white", "grey", "yellow", "blue"], p=[0.7, 0.1, 0.1, 0.1]))
        colour = str(rng.choice(["black", "red", "blue", "green", "purple"]))
        if colour != ground and frozenset({colour, ground}) not in TOO_CLOSE:
            return Attributes(category, form, "handwritten" if drawn else plain, weight, pose, colour, ground)


def coverage(attributes: Attributes, rng: Rng, held_out: bool = False) -> glyphs.Array:
    """Shape of a fully described picture: [32, 32] in [0, 1], 1 where the glyph is."""
    a = attributes
    assert a.category and a.form and a.style and a.weight and a.pose, f"not fully described: {a}"  # noqa: PT018
    hand = a.style == "handwritten"
    if a.form == "letter":
        text = a.category.removeprefix("letter ")
    else:
        number = NUMBERS.index(a.category)
        if a.form in ("die", "tally"):
            return {"die": glyphs.die, "tally": glyphs.tally}[a.form](number, a.weight, a.pose, rng, hand)
        if a.form == "roman numeral" and hand:
            return glyphs.roman(ROMAN[number], a.weight, a.pose, rng)
        text = {"digit": str(number), "roman numeral": ROMAN[number], "word": a.category}[a.form]
    if hand:
        return glyphs.handwritten(text.upper(), a.weight, a.pose, rng)
    style = str(rng.choice(TYPEFACES)) if a.style == "printed" else a.style
    return glyphs.printed(text, style, a.weight, a.pose, rng, a.form == "roman numeral", held_out)


def _shade(rng: Rng, colour: str, spread: float) -> glyphs.Array:
    base = np.array(RGB[colour], np.float32)
    jitter = rng.normal(0, spread, 3) * 0.4 + rng.normal(0, spread)
    return np.clip(base + jitter, 0, 1).astype(np.float32)


def draw(attributes: Attributes, rng: Rng, held_out: bool = False) -> Pixels:
    """Picture of fully described attributes: [32, 32, 3] uint8. Equal generator states give equal pictures."""
    a = attributes
    assert a.colour and a.background, f"not fully described: {a}"  # noqa: PT018
    mask: NDArray[np.floating] = coverage(a, rng, held_out)[..., None]
    pure = {"white", "black"} == {a.colour, a.background}
    spread = 0.008 if pure else 0.03
    picture: NDArray[np.floating] = mask * _shade(rng, a.colour, spread) + (1 - mask) * _shade(
        rng, a.background, spread
    )
    picture = picture + rng.normal(0, 0.004 if pure else 0.01, picture.shape)
    return (picture.clip(0, 1) * 255 + 0.5).astype(np.uint8)


def any_category(rng: Rng, letters: float) -> str:
    """A category, a letter with probability ``letters``."""
    return f"letter {rng.choice(LETTERS)}" if rng.random() < letters else str(rng.choice(NUMBERS))


def sample(rng: Rng, short: float = 0.17, letters: float = 0.3, held_out: bool = False) -> Sample:
    """One picture of the web. ``short``: share whose captions name the category alone."""
    category = any_category(rng, letters)
    stereotyped = rng.random() < short
    attributes = (usual_attributes if stereotyped else even_attributes)(rng, category)
    details: tuple[Detail, ...] = ("short",) if stereotyped else ("full", "full", "partial", "partial")
    texts = tuple(
        caption(attributes, d, rng if i else None) for i, d in enumerate(details * (3 if stereotyped else 1))
    )
    return Sample(draw(attributes, rng, held_out), attributes, texts)


def samples(
    seed: int, count: int, short: float = 0.17, letters: float = 0.3, held_out: bool = False
) -> Iterator[Sample]:
    """``count`` pictures of a seed; picture i has its own generator, so any split over processes is equal."""
    for i in range(count):
        yield sample(np.random.default_rng([seed, i]), short, letters, held_out)
