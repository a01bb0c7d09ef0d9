"""The three requests of Figure 3, word for word, and what is read out of the replies.

One dialogue compares two images: describe the first, describe the second, are they semantically similar
(Phi of Eq. 2), and, if not, rewrite the first one's prompt (P of Eq. 1). Each description is asked for
alone, with its image. In the judgement and the rewriting both descriptions stand as the turns that Figure 3
shows, but the images are not sent a second time: so a judgement depends on two captions only, is asked
once per caption pair, and costs no image tokens.
"""

import re
from collections.abc import Callable

from tasks.records import Answer
from tasks.vlm.client import Message, Picture

DESCRIBE = (
    "Please describe the following image with special attention to category, style, and pose and background."
)
COMPARE = (
    "Are the two images semantically similar? Please answer YES or NO. Do not output extra contents."
)  # fmt: skip
REWRITE = (
    "You are a prompt engineer of Stable Diffusion, "
    'the corresponding prompt of the first image is "{prompt}". '
    "Please modify the prompt of the first image so that Stable Diffusion can generate the second image. "
    "Add necessary contents if needed."
)

MAX_PROMPT_CHARS = 600
"""A prompt is cut to this many characters before its tokens are counted."""

MAX_REPLY_CHARS = 20_000
"""Of a longer reply, its reasoning apart, only so many characters are looked at."""


# ---------------------------------------------------------------------------------------- requests


def describe(picture: Picture) -> tuple[Message, ...]:
    """Ask for the caption of one image."""
    return (Message(role="user", text=DESCRIBE, pictures=(picture,)),)


def compare(caption_augmented: str, caption_original: str) -> tuple[Message, ...]:
    """Ask Phi of Eq. 2: is the generated image (first) semantically similar to the original (second)?"""
    return (
        Message(role="user", text=DESCRIBE),
        Message(role="assistant", text=caption_augmented),
        Message(role="user", text=DESCRIBE),
        Message(role="assistant", text=caption_original),
        Message(role="user", text=COMPARE),
    )


def rewrite(caption_augmented: str, caption_original: str, prompt: str) -> tuple[Message, ...]:
    """Ask P of Eq. 1: the dialogue that ended in NO, then for a prompt that draws the original."""
    return (
        *compare(caption_augmented, caption_original),
        Message(role="assistant", text="NO"),
        Message(role="user", text=REWRITE.format(prompt=prompt)),
    )


# ---------------------------------------------------------------------------------------- YES or NO

_THINKING = re.compile(
    r"<think(?:ing)?>.*?(?:</think(?:ing)?>|\Z)", re.DOTALL | re.IGNORECASE
)  # or cut off within
_LABEL = re.compile(r"^(?:the\s+)?(?:final\s+)?answer\s*(?:is)?\s*:\s*", re.IGNORECASE)
_MARKS = " \t\r\n*_`\"'“”‘’#>()[]"
_TAG = re.compile(r"</?\w+>")
_END = r"""(?!\.\s*\d)(?=\s*$|\s*\n|[.!,;:)\]"'*_`”’–—]|\s+(?:[-–—]\s|\()"""  # but not "No. 1"
_QUIET = re.compile(rf"(yes|no){_END})", re.IGNORECASE)
_LOUD = re.compile(rf"(YES|NO){_END}|\s+(?i:because|since|as|the|they|both)\b)")
_REFUSAL = re.compile(
    r"\b(?:sorry|I\s+can(?:not|['’]t)|I(?: a|['’])m (?:sorry|unable|not able)|as an AI|unable to|not able to|"
    r"(?:im|not )possible to|no (?:images?|pictures?)|"
    r"(?:can(?:not|['’]t)|could(?: not|n['’]t)) (?:determine|tell|say|see|view|compare)|"
    r"I (?:do not|don['’]t) (?:see|have))\b",
    re.IGNORECASE,
)
_AGAINST = {"YES": "not semantically similar", "NO": "are semantically similar"}


def _said(text: str) -> str:
    """A reply without its reasoning block, cut where no answer is that long."""
    return _THINKING.sub(" ", text)[:MAX_REPLY_CHARS]


def bare(text: str) -> str:
    """A reply without its reasoning block, tags, a label such as "Answer:" and the marks that lead it."""
    plain = _TAG.sub(" ", _said(text)).lstrip(_MARKS)
    return _LABEL.sub("", plain).lstrip(_MARKS)


def declines(text: str) -> bool:
    """Whether a reply refuses somewhere."""
    return _REFUSAL.search(text) is not None


def is_caption(text: str) -> bool:
    """Whether a reply can describe an image: it says something, and is no YES or NO, another question's answer."""
    return bool(text.strip()) and parse_answer(text) == "unparsed"


def parse_answer(text: str) -> Answer:
    """YES is similar, NO is different, anything that does not plainly begin with one of them is unparsed.

    Markup, quotes, a label such as "Answer:" and a reasoning block are looked through. Punctuation or the end
    must follow the yes or no, or, if it is in capitals, a clause that explains it ("NO because..."): so neither
    "No doubt they are alike" nor "NO DIFFERENCE" is taken for a NO. A reply with both answers, one that states
    the opposite of what it answers, or one that declines, is unparsed.
    """
    reply = bare(text)
    found = _LOUD.match(reply) or _QUIET.match(reply)
    if not found:
        return "unparsed"
    rest = reply[found.end() :]
    said = found.group(1).upper()
    if _contradicts(rest, said) or declines(rest):
        return "unparsed"
    return "similar" if said == "YES" else "different"


def _contradicts(rest: str, said: str) -> bool:
    other = "NO" if said == "YES" else "YES"
    next_words = [word.upper() for word in re.findall(r"\w+", rest)[:2]]
    both = other in next_words or re.search(rf"\b{other}\b", rest) is not None
    return both or _AGAINST[said] in " ".join(rest.lower().split())


# ---------------------------------------------------------------------------------------- prompts

_QUOTED = re.compile(r"(?:^|\n|:)[ \t*_>]*[\"“](.{1,2000}?)[\"”][*_]*(?=\s*(?:$|\n))", re.DOTALL)
_FENCED = re.compile(r"```[^\n`]*\n(.+?)```", re.DOTALL)
_PREFACE = re.compile(  # possessive, so that a reply of many blanks takes no longer than another
    r"^\s*+(?:(?:sure|certainly|of course|okay|ok|here(?:'s| is| are)|below is)\b[^\n:]*+:|"
    r"[*_#\s]*+(?:(?:the|a|your)\s++)?(?:modified|new|revised|updated|rewritten|improved)?\s*+prompt\s*+[*_]*+\s*+:)"
    r"[*_\s]*+",
    re.IGNORECASE,
)
_MARKUP = re.compile(r"\*\*|__|`+|^[ \t]*(?:#+|>|[-*•])[ \t]+|</?\w+>", re.MULTILINE)
_DANGLING = {"a", "an", "and", "at", "by", "for", "from", "in", "of", "on", "or", "the", "to", "with"}


def clean_prompt(text: str, fits: Callable[[str], bool], fallback: str) -> str:
    """The prompt in a reply: one line, no quotes or markup, never empty, within the text encoder's limit.

    Of a reply that quotes or fences the prompt only that part is taken; a preface ("Here is the prompt:") and
    later paragraphs are dropped. If it is too long, trailing words go until it fits, then what dangles.

    Args:
        text: the VLM's reply.
        fits: whether the text encoder takes a prompt whole.
        fallback: returned if nothing usable is left (an empty reply, a refusal, a judgement); not checked.
    """
    line = _one_line(_candidate(_said(text)))
    if not line or _REFUSAL.match(line) or parse_answer(line) != "unparsed":
        return fallback
    words = line.split(" ")
    while words and not (len(line) <= MAX_PROMPT_CHARS and fits(line)):
        words.pop()
        line = _ending(words)
    return line if re.search(r"\w", line) else fallback


def _candidate(text: str) -> str:
    if fenced := _FENCED.search(text):
        return fenced.group(1)
    if quoted := _QUOTED.findall(text):
        return max(quoted, key=len)
    rest = text
    while (shorter := _PREFACE.sub("", rest, count=1)) != rest:
        rest = shorter
    return rest.strip().split("\n\n")[0]


def _one_line(text: str) -> str:
    printable = "".join(c if c.isprintable() or c.isspace() else " " for c in _MARKUP.sub("", text))
    line = " ".join(printable.split())
    return line.strip(" \"“”'‘’*_").strip()


def _ending(words: list[str]) -> str:
    kept = list(words)
    while len(kept) > 1 and kept[-1].strip(",;:").lower() in _DANGLING:
        kept.pop()
    return " ".join(kept).rstrip(" ,;:-–—(")
