"""The VLM coordinator Phi and the prompt modifier P (The VLM Coordinator; Eq. 1 and 2; Figure 3).

For each selected generated image (a cluster's centre) and all failing originals of its class:

1. every distinct image is captioned once: N + M requests, not N * M. A YES or NO in place of a caption is asked for
   once more, and then counts as none. (Two captions that a server swaps cannot be told from two that it did not:
   the protocol ties an answer to its question by nothing but the connection.);
2. every distinct pair of captions is judged once, YES or NO (Eq. 2). A reply that is neither is asked for
   once more, and then counts as similar and is counted;
3. a centre that differs from any original (the sum of Eq. 1 is positive) has its prompt rewritten towards ONE
   of the originals it differs from. Eq. 1 leaves open which: here the one that the fewest centres of the
   class aim at so far, so that the class's prompts spread over the variety of its failures. Its level is
   semantic, that of the others detail. Where prompts are fixed no rewriting is asked for.

Nothing is drawn at random: equal images, prompts and replies give equal verdicts and transcripts.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from torch import Tensor

from tasks.records import Answer, Comparison, Usage, Verdict
from tasks.vlm.asking import Asker, Progress
from tasks.vlm.client import ChatClient, Exchange, Picture, Request, VlmSettings
from tasks.vlm.prompts import clean_prompt, compare, describe, is_caption, parse_answer, rewrite

Image = Tensor | Path
"""A picture file, or [3, h, w] in [0, 1]."""

CHUNK = 64
"""Images held in memory at a time."""


@dataclass(frozen=True)
class PairToJudge:
    """A generated image, its prompt, and the originals of its class that the classifier got wrong.

    ``originals`` are (id, image). Ids are unique among generated and among original images.
    """

    augmented_id: str
    image: Image
    prompt: str
    label: int
    originals: Sequence[tuple[str, Image]]


@dataclass(frozen=True)
class JudgeResult:
    """Verdicts in the order of the pairs; every question with its answer, in the order of asking.

    ``unparsed`` counts comparisons, ``usage`` counts questions, also those that a cache answered.
    """

    verdicts: list[Verdict]
    exchanges: list[Exchange]
    usage: Usage
    unparsed: int


class Coordinator:
    """Judges all pairs of an epoch."""

    def __init__(self, client: ChatClient, settings: VlmSettings) -> None:
        """Args: client: who answers; settings: ``max_side`` of the images sent."""
        self._client = client
        self._max_side = settings.max_side

    def judge_all(
        self,
        pairs: Sequence[PairToJudge],
        fits: Callable[[str], bool] | None,
        progress: Progress | None = None,
    ) -> JudgeResult:
        """Caption, judge, rewrite.

        Args:
            pairs: one for each generated image to be judged, any classes together.
            fits: whether the generator's text encoder takes a prompt whole; None where prompts are fixed.
            progress: told as answers come in.

        Raises:
            ValueError: a generated image stands in two pairs.
            VlmError: the VLM did not answer.
        """
        _refuse_twice(pairs)
        asker = Asker(self._client, progress)
        captions = self._captions(pairs, asker)
        answers = _judgements(pairs, captions, asker)
        compared = [_comparisons(pair, captions, answers) for pair in pairs]
        targets: list[Comparison | None] = [None] * len(pairs)
        prompts = [pair.prompt for pair in pairs]
        if fits is not None:
            targets = _targets(pairs, compared)
            prompts = _rewritten(pairs, targets, asker, fits)
        verdicts = [
            _verdict(pair, comparisons, target, prompt)
            for pair, comparisons, target, prompt in zip(pairs, compared, targets, prompts, strict=True)
        ]
        unparsed = sum(c.answer == "unparsed" for comparisons in compared for c in comparisons)
        return JudgeResult(verdicts, asker.exchanges, asker.usage, unparsed)

    def _captions(self, pairs: Sequence[PairToJudge], asker: Asker) -> dict[tuple[str, str], str]:
        """Captions by ("augmented" or "original", id); images are read, sent and dropped by the chunk."""
        images: dict[tuple[str, str], Image] = {}
        for pair in pairs:
            images["augmented", pair.augmented_id] = pair.image
            images.update({("original", original_id): image for original_id, image in pair.originals})
        captions: dict[tuple[str, str], str] = {}
        for chunk in _chunks(list(images), CHUNK):
            asked = [describe(Picture.of(images[name], self._max_side)) for name in chunk]
            texts = asker.ask_until("captions", asked, is_caption, len(images))
            told = (text.strip() if is_caption(text) else "" for text in texts)
            captions.update(zip(chunk, told, strict=True))
        return captions


def _chunks(names: list[tuple[str, str]], size: int) -> Iterator[list[tuple[str, str]]]:
    rest = iter(names)
    while chunk := list(islice(rest, size)):
        yield chunk


def _refuse_twice(pairs: Sequence[PairToJudge]) -> None:
    twice = [name for name, count in Counter(pair.augmented_id for pair in pairs).items() if count > 1]
    if twice:
        raise ValueError(f"the generated image {twice[0]!r} stands in two pairs; give its originals in one")


# ------------------------------------------------------------------------------------------ Eq. 2


def _judgements(
    pairs: Sequence[PairToJudge], captions: dict[tuple[str, str], str], asker: Asker
) -> dict[tuple[str, str], Answer]:
    """Answers by (caption of the generated image, caption of the original); without a caption, unparsed."""
    wanted = dict.fromkeys(
        (captions["augmented", pair.augmented_id], captions["original", original_id])
        for pair in pairs
        for original_id, _ in pair.originals
    )
    asked = [both for both in wanted if all(both)]
    texts = asker.ask_until(
        "judgements",
        [compare(*both) for both in asked],
        lambda text: parse_answer(text) != "unparsed",
        len(asked),
    )
    answers: dict[tuple[str, str], Answer] = dict.fromkeys(wanted, "unparsed")
    answers.update({both: parse_answer(text) for both, text in zip(asked, texts, strict=True)})
    return answers


def _comparisons(
    pair: PairToJudge, captions: dict[tuple[str, str], str], answers: dict[tuple[str, str], Answer]
) -> tuple[Comparison, ...]:
    mine = captions["augmented", pair.augmented_id]
    return tuple(
        Comparison(
            augmented_id=pair.augmented_id,
            original_id=original_id,
            caption_augmented=mine,
            caption_original=captions["original", original_id],
            answer=answers[mine, captions["original", original_id]],
        )
        for original_id, _ in pair.originals
    )


# ------------------------------------------------------------------------------------------ Eq. 1


def _targets(
    pairs: Sequence[PairToJudge], compared: Sequence[tuple[Comparison, ...]]
) -> list[Comparison | None]:
    """For each pair the comparison that its rewriting aims at; None where nothing differs."""
    aimed_at: Counter[tuple[int, str]] = Counter()
    targets: list[Comparison | None] = []
    for pair, comparisons in zip(pairs, compared, strict=True):
        different = [c for c in comparisons if c.answer == "different"]
        fewest = min((aimed_at[pair.label, c.original_id] for c in different), default=0)
        target = next((c for c in different if aimed_at[pair.label, c.original_id] == fewest), None)
        if target is not None:
            aimed_at[pair.label, target.original_id] += 1
        targets.append(target)
    return targets


def _rewritten(
    pairs: Sequence[PairToJudge],
    targets: Sequence[Comparison | None],
    asker: Asker,
    fits: Callable[[str], bool],
) -> list[str]:
    """The next prompt of each pair: P(c_aug, c_orig) where there is a target, else its own."""
    aimed = [(n, target) for n, target in enumerate(targets) if target is not None]
    asked = [rewrite(t.caption_augmented, t.caption_original, pairs[n].prompt) for n, t in aimed]
    replies = asker.ask("rewrites", [Request(messages=messages) for messages in asked], len(asked))
    prompts = [pair.prompt for pair in pairs]
    for (n, _), reply in zip(aimed, replies, strict=True):
        prompts[n] = clean_prompt(reply.text, fits, pairs[n].prompt)
    return prompts


def _verdict(
    pair: PairToJudge, comparisons: tuple[Comparison, ...], target: Comparison | None, prompt: str
) -> Verdict:
    return Verdict(
        augmented_id=pair.augmented_id,
        label=pair.label,
        level="semantic" if any(c.answer == "different" for c in comparisons) else "detail",
        prompt_next=prompt,
        comparisons=comparisons,
        target_id=target.original_id if target else None,
    )
