"""Text that others wrote - a VLM, a provider, whoever named a folder - made harmless to keep and to show.

Where it comes in, :func:`readable` takes out what is no text: half a character, control characters (a terminal
obeys them), marks that turn the direction of reading (what is shown is then not what is there). Where it is shown,
:func:`one_line` and a bound on its length keep it to its place; HTML, Markdown, LaTeX and CSV are escaped there.
"""

import re

_NO_TEXT = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]"
)
_FORMULA = ("=", "+", "-", "@")


def readable(text: str, most: int | None = None) -> str:
    """The text with a blank for each character that is none; line ends, tabs and all letters stay.

    Args:
        text: any string, lone surrogates included.
        most: cut to this many characters, the last of them an ellipsis; None cuts nothing.
    """
    return shortened(_NO_TEXT.sub(" ", text), most)


def one_line(text: str, most: int | None = None) -> str:
    """:func:`readable` text on one line, each run of white space a blank."""
    return shortened(" ".join(_NO_TEXT.sub(" ", text).split()), most)


def shortened(text: str, most: int | None) -> str:
    """The text, or its beginning and an ellipsis, ``most`` characters in all."""
    return text if most is None or len(text) <= most else f"{text[: most - 1]}…"


def no_formula(text: str) -> str:
    """A cell of a CSV file that a spreadsheet shows and does not compute."""
    return f"'{text}" if text.startswith(_FORMULA) else text
