"""The VLM alone as the classifier (Table 4, first row): it names one of the classes seen, and learns nothing.

One request an image, with the names of all classes seen so far. A longer list is another question, so each
session asks anew about its test images; what was asked already (by a killed run, or with another seed) is
answered from the cache. The reply must be one of the names: a reply that names none or two of them, declines
or hedges is unparsed, which is no class and counts as wrong ("it may not give any option", Ablation Study).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tasks.records import Frozen, Usage
from tasks.vlm.asking import Asker, Progress
from tasks.vlm.client import ChatClient, Exchange, Message, Picture, Request
from tasks.vlm.prompts import bare, declines

NAME_ONE = (
    "Which one of these classes does the image show?\n{names}\n"
    "Please answer with the name of one class as it is written above. Do not output extra contents."
)
CHUNK = 64
"""Images held in memory at a time."""


class ZeroShotSettings(Frozen):
    """Stands where a learner's settings stand; there is nothing to learn, hence nothing to set."""

    kind: Literal["vlm_zero_shot"]


@dataclass(frozen=True)
class Classified:
    """For each image the place of its class in the list of names, or None where the reply was unparsed.

    ``exchanges`` are the questions with their answers in the order of asking; ``usage`` counts them, also
    those that a cache answered.
    """

    places: list[int | None]
    exchanges: list[Exchange]
    usage: Usage

    @property
    def unparsed(self) -> int:
        """Images whose reply named no class."""
        return self.places.count(None)


def classify(
    client: ChatClient,
    images: Sequence[Path],
    names: Sequence[str],
    max_side: int,
    progress: Progress | None = None,
) -> Classified:
    """Ask for the class of each image.

    Args:
        client: who answers.
        images: picture files.
        names: of the classes seen, all different.
        max_side: of the images as they are sent, in pixels.
        progress: told as answers come in.

    Raises:
        ValueError: no name, an empty one, or two that an answer cannot tell apart.
        VlmError: the VLM did not answer.
    """
    refuse_alike(names)
    asker, places = Asker(client, progress), []
    for start in range(0, len(images), CHUNK):
        pictures = [Picture.of(image, max_side) for image in images[start : start + CHUNK]]
        requests = [Request(messages=name_one(picture, names)) for picture in pictures]
        places += [parse_class(reply.text, names) for reply in asker.ask("classes", requests, len(images))]
    return Classified(places, asker.exchanges, asker.usage)


def refuse_alike(names: Sequence[str]) -> None:
    """Refuse names that an answer could not tell apart.

    Raises:
        ValueError: no name, one without a letter or digit, or two that differ in case and punctuation alone.
    """
    if not names:
        raise ValueError("there is no class to name; a session has at least one")
    known: dict[tuple[str, ...], str] = {}
    for name in names:
        words = _words(name)
        if not words:
            raise ValueError(f"the class name {name!r} has no letter; give it one in dataset.class_names")
        if words in known:
            raise ValueError(
                f"the class names {known[words]!r} and {name!r} cannot be told apart in an answer; "
                "give each a name of its own in dataset.class_names"
            )
        known[words] = name


def name_one(picture: Picture, names: Sequence[str]) -> tuple[Message, ...]:
    """Ask which of the names an image shows."""
    listed = "\n".join(f"- {' '.join(name.split())}" for name in names)
    return (Message(role="user", text=NAME_ONE.format(names=listed), pictures=(picture,)),)


# ------------------------------------------------------------------------------------------ the answer

_LEAD = (
    r"(?:[-•]\s+)?(?:(?:it|this|that|(?:the\s+)?(?:correct\s+)?(?:image|picture|photo|object|subject|class|category|answer))"
    r"\s*(?:['’]s|\bis|\bshows|\bdepicts|\bcontains|:)\s*[*_`\"'“‘(]*)?"
    r"(?:\b(?:an?|the)\s+)?(?:(?:image|picture|photo)\s+of\s+(?:an?\s+|the\s+)?)?[*_`\"'“‘(]*"
)
_END = r"(?=[*_`\"'”’)]*\s*(?:$|[.!,;\n]|\(|\s[-–—]\s))"


def parse_class(text: str, names: Sequence[str]) -> int | None:
    """The place in ``names`` of the one class that a reply names; None if it does not plainly name one.

    Case, punctuation, markup, a label and a lead such as "It is a" are looked through, and words may follow
    after a stop or comma, as long as they name no other class, deny nothing and do not decline.
    """
    reply = bare(text)
    by_length = sorted(range(len(names)), key=lambda place: -len(names[place]))
    for place in by_length:
        found = re.match(_LEAD + _pattern(names[place]) + _END, reply, re.IGNORECASE)
        if found:
            rest = reply[found.end() :]
            others = [names[other] for other in by_length if other != place]
            return None if _takes_back(rest, others) else place
    return None


def _takes_back(rest: str, others: Sequence[str]) -> bool:
    """Whether what follows the name names another one, hedges or declines."""
    if declines(rest) or re.search(
        r"\b(?:not|or|unsure|unclear|uncertain)\b|n['’]t\b|\?", rest, re.IGNORECASE
    ):
        return True
    return any(re.search(rf"(?<!\w){_pattern(name)}(?!\w)", rest, re.IGNORECASE) for name in others)


def _words(name: str) -> tuple[str, ...]:
    return tuple(re.findall(r"[^\W_]+", name.casefold()))


def _pattern(name: str) -> str:
    """A name however its words are spaced or joined."""
    return r"[\W_]+".join(re.escape(word) for word in re.findall(r"[^\W_]+", name))
