"""What the miniature's networks see in images of 32 px: attributes read by two of them, and features.

The captioner is the run's own VLM; the judge is another network, trained on another corpus with fonts of its
own, which no stage of the loop ever asks. Both know the miniature's world alone: numbers and letters.
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from tasks.loading import MINIATURE_CAPTIONER
from tasks.miniature.architecture import Judge
from tasks.miniature.captions import ATTRIBUTES, CATEGORIES, VALUES, parse_caption
from tasks.miniature.quality import load_judge
from tasks.miniature.reader import Reader, Reading

JUDGE = MINIATURE_CAPTIONER.with_name("judge")
SIZE = 32
BATCH = 250


def knows(class_names: Sequence[str]) -> bool:
    """Whether the miniature's world has all these categories."""
    return set(class_names) <= set(CATEGORIES)


def captioned(images: Float[Tensor, "n 3 32 32"]) -> list[Reading]:
    """What the captioner reads in images in [0, 1]."""
    return _reader().read(images)


def judged(folder: Path, images: Float[Tensor, "n 3 32 32"], what: str) -> list[str]:
    """The value of one attribute that the judge sees in each image in [0, 1].

    Raises:
        ValueError: images of another size, or an attribute that it does not know.
    """
    if what not in ATTRIBUTES:
        raise ValueError(f"the judge reads {', '.join(ATTRIBUTES)}, not {what!r}; set windows.judge=null")
    if images.shape[-2:] != (SIZE, SIZE):
        raise ValueError(
            f"the judge reads images of {SIZE} px, got {list(images.shape[-2:])}; set windows.judge=null"
        )
    judge = _judge(folder)
    with torch.no_grad():
        best = [judge(part)[what].argmax(1) for part in images.split(BATCH)]
    return [VALUES[what][i] for i in torch.cat(best).tolist()]


def features(images: Float[Tensor, "n 3 32 32"]) -> Float[Tensor, "n 96"]:
    """The judge's last features before its answers, each image's scaled to a mean square of 1.

    So the kernel of :func:`tasks.similarity.mmd.polynomial_mmd` is (cosine + 1)^3, between 0 and 8, and no single
    image with large features outweighs the others.
    """
    judge = _judge(JUDGE)
    with torch.no_grad():
        found = torch.cat([judge.body(part * 2 - 1) for part in images.split(BATCH)])
    return functional.normalize(found) * found.shape[1] ** 0.5


def named(prompts: Sequence[str], what: str) -> list[str] | None:
    """The value of one attribute that each prompt names; None where one of them names none."""
    values = [getattr(parse_caption(prompt), what, None) for prompt in prompts]
    found = [value for value in values if value is not None]
    return found if len(found) == len(values) else None


@lru_cache(maxsize=1)
def _reader() -> Reader:
    return Reader.from_weights(MINIATURE_CAPTIONER)


@lru_cache(maxsize=2)
def _judge(folder: Path) -> Judge:
    return load_judge(folder)
