"""Attributes of a picture in the miniature web, and the captions that name them.

A *short* caption names the category alone ("A picture of a seven"), a *full* one every attribute, a *partial*
one some of them in any order. :func:`parse_caption` reads back what a caption says, and nothing else.
"""

import re
from dataclasses import asdict, dataclass, replace
from typing import Literal, Self

import numpy as np

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LETTERS = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
CATEGORIES = (*NUMBERS, *(f"letter {c}" for c in LETTERS))
FORMS = ("digit", "roman numeral", "die", "tally", "word", "letter")
STYLES = ("handwritten", "sans-serif", "serif", "printed")
WEIGHTS = ("thin", "regular", "bold")
POSES = ("upright", "tilted left", "tilted right")
COLOURS = ("white", "black", "grey", "red", "green", "blue", "yellow", "purple")
ATTRIBUTES = ("category", "form", "style", "weight", "pose", "colour", "background")

VALUES: dict[str, tuple[str, ...]] = {
    "category": CATEGORIES, "form": FORMS, "style": STYLES, "weight": WEIGHTS, "pose": POSES,
    "colour": COLOURS, "background": COLOURS,
}  # fmt: skip
SEEN_AS = {"tally": "tally count"}
"""Forms whose noun in a caption differs from their name."""

Detail = Literal["short", "partial", "full"]


@dataclass(frozen=True)
class Attributes:
    """What a caption says of a picture; None where it is silent.

    Raises:
        ValueError: a value outside of its attribute's vocabulary (:data:`VALUES`).
    """

    category: str | None = None
    form: str | None = None
    style: str | None = None
    weight: str | None = None
    pose: str | None = None
    colour: str | None = None
    background: str | None = None

    def __post_init__(self) -> None:
        """Refuse words that no picture of the corpus has."""
        for name, value in asdict(self).items():
            if value is not None and value not in VALUES[name]:
                raise ValueError(f"unknown {name} {value!r}; choose one of {', '.join(VALUES[name])}")

    def but(self, **changes: str | None) -> Self:
        """A copy with some attributes changed."""
        return replace(self, **changes)

    @property
    def given(self) -> dict[str, str]:
        """The attributes that are not None."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def _kind(a: Attributes) -> str | None:
    noun = SEEN_AS.get(a.form, a.form) if a.form else None
    if noun and a.style:
        return f"a {a.style} {noun}"
    return f"a {noun}" if noun else a.style


def _colours(a: Attributes) -> str | None:
    ground = f"on a {a.background} background" if a.background else None
    if a.colour and ground:
        return f"{a.colour} {ground}"
    return f"in {a.colour}" if a.colour else ground


def clauses(attributes: Attributes) -> list[str]:
    """What a caption says after the category, in the corpus's usual order."""
    a = attributes
    weight = f"{a.weight} weight" if a.weight else None
    return [c for c in (_kind(a), weight, a.pose, _colours(a)) if c]


def caption(attributes: Attributes, detail: Detail = "full", rng: np.random.Generator | None = None) -> str:
    """Caption of a picture.

    Without ``rng`` the first grammar is used: "A picture of a seven, a handwritten digit, regular weight,
    upright, white on a black background". With it, the grammar, and for ``partial`` the subset and the order,
    are drawn.

    Raises:
        ValueError: no category, or ``detail="partial"`` without ``rng``.
    """
    if attributes.category is None:
        raise ValueError("a caption needs a category; Attributes(category=...) is None")
    if detail == "short":
        return _opening(attributes, rng)
    said = attributes
    if detail == "partial":
        if rng is None:
            raise ValueError("a partial caption is drawn at random; pass rng")
        kept = {*rng.choice(ATTRIBUTES[1:], rng.integers(1, 6), replace=False), "category"}
        said = Attributes(**{n: v for n, v in attributes.given.items() if n in kept})
    parts = clauses(said)
    if rng is not None and rng.random() < (0.6 if detail == "partial" else 0.15):
        parts = [parts[i] for i in rng.permutation(len(parts))]
    return ", ".join([_opening(attributes, rng if detail == "partial" else None), *parts])


def _opening(attributes: Attributes, rng: np.random.Generator | None) -> str:
    name = attributes.category
    usual = f"A picture of a {name}"
    if rng is None or rng.random() < 0.6:
        return usual
    return str(rng.choice([f"a {name}", f"a photo of a {name}", f"an image of a {name}", str(name)]))


_FORM_WORDS = {
    "digit": "digit", "roman numeral": "roman numeral", "die": "die", "dice": "die", "domino": "die",
    "tally": "tally", "word": "word", "spelled": "word",
}  # fmt: skip
_COLOUR = "|".join(COLOURS)


def _first(options: dict[str, str], text: str) -> str | None:
    found = [(m.start(), v) for w, v in options.items() if (m := re.search(rf"\b{re.escape(w)}\b", text))]
    return min(found)[1] if found else None


def parse_caption(text: str) -> Attributes:
    """Attributes that a text names, None where it is silent. Any text is accepted, unknown words are skipped."""
    letter = re.search(r"\bletter ([A-Za-z])\b", text)
    low = text.lower()
    number = _first({n: n for n in NUMBERS}, low)
    form = _first(_FORM_WORDS, low) or ("letter" if re.search(r"\bletter\b(?! [a-z]\b)", low) else None)
    both = re.search(rf"\b({_COLOUR}) on an? ({_COLOUR})\b", low)
    ground = re.search(rf"\bon an? (?:\w+ )?({_COLOUR})\b", low) or re.search(
        rf"\b({_COLOUR}) background\b", low
    )
    rest = low.replace(ground.group(0), " ") if ground else low
    ink = both or re.search(rf"\b({_COLOUR})\b", rest)
    return Attributes(
        category=f"letter {letter.group(1).upper()}" if letter else number,
        form=form,
        style=_first({s: s for s in STYLES}, low.replace("sans serif", "sans-serif")),
        weight=_first({"thin": "thin", "regular": "regular", "bold": "bold", "thick": "bold"}, low),
        pose=_first({p: p for p in POSES}, low),
        colour=ink.group(1) if ink else None,
        background=both.group(2) if both else ground.group(1) if ground else None,
    )
