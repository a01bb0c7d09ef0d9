"""Class names as vectors, from the language model that the configuration names.

Only safetensors are read. A name goes into a sentence, the sentence through the model, and its pooled output
is the vector; a model without one gives the mean of its last hidden states over the sentence, and so does one
that is asked to, as most sentence encoders want.
"""

import importlib.util
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tasks.records import Digest, Frozen
from tasks.settings import added_later
from tasks.store import digest_of

PACKAGED = "package:"


class LanguageSettings(Frozen):
    """Which model reads the class names.

    Attributes:
        model: Folder or hub id of a text model, or ``package:<module>/<folder>`` of one that an installed
            package carries.
        tokenizer: The same of its tokenizer; None where it lies with the model.
        sentence: What a name is read in; ``{}`` stands for it.
        pooling: ``pooler`` takes the pooled output where there is one, ``mean`` the mean of the last hidden states.
    """

    model: str
    tokenizer: str | None
    sentence: str
    pooling: Literal["pooler", "mean"] = added_later("pooler")


class LanguageError(ValueError):
    """A language model that is missing or cannot be read; the message names the remedy."""


@lru_cache(maxsize=4)
def word_vectors(settings: LanguageSettings, names: tuple[str, ...]) -> Tensor:
    """One vector a name [k, d], on the CPU, names in the given order.

    Raises:
        LanguageError: There is no such model, tokenizer or package.
        ValueError: The sentence has no place for a name.
    """
    if "{}" not in settings.sentence:
        raise ValueError(f"learner.language.sentence={settings.sentence!r} has no {{}} for the class name")
    tokenizer, model = _opened(settings)
    sentences = [settings.sentence.replace("{}", name) for name in names]
    vectors = [
        _vector(model, tokenizer(sentence, return_tensors="pt", truncation=True), settings.pooling)
        for sentence in sentences
    ]
    return torch.stack(vectors)


def language_digest(settings: LanguageSettings) -> Digest:
    """The content id of a model's folder; of a hub's model, its name.

    Raises:
        LanguageError: There is no such package.
    """
    place = _place(settings.model)
    return digest_of(Path(place)) if Path(place).is_dir() else Digest(place)


def aligned_names(names: Sequence[str], rule: str) -> tuple[str, ...]:
    """The name that each label is taught with.

    Args:
        names: By label.
        rule: ``correct`` keeps them; ``as_released`` has them in alphabetical order, without their last letter.
    """
    if rule == "correct":
        return tuple(names)
    return tuple(name[:-1] or name for name in sorted(names))


def fitted(vectors: Tensor, width: int) -> Tensor:
    """Vectors [k, d] turned into [k, width] by a fixed map with orthonormal rows or columns, if they are not yet."""
    if vectors.shape[1] == width:
        return vectors
    drawn = torch.randn(
        max(vectors.shape[1], width), min(vectors.shape[1], width), generator=torch.Generator().manual_seed(0)
    )
    basis = torch.linalg.qr(drawn).Q
    return vectors @ (basis if vectors.shape[1] > width else basis.T)


@lru_cache(maxsize=1)
def _opened(settings: LanguageSettings) -> tuple[Any, Any]:
    from transformers import AutoModel, AutoTokenizer  # slow: only this learner waits for it

    try:
        tokenizer = AutoTokenizer.from_pretrained(_place(settings.tokenizer or settings.model))
        model = AutoModel.from_pretrained(_place(settings.model), use_safetensors=True)
    except (OSError, ValueError) as error:
        raise LanguageError(
            f"the language model {settings.model!r} cannot be read ({str(error).splitlines()[0]}); name a folder "
            f"or hub id of a text model with learner.language.model="
        ) from error
    return tokenizer, model.eval()


def _place(name: str) -> str:
    """A folder or hub id; of ``package:<module>/<folder>`` the folder, found without running the package's code."""
    if not name.startswith(PACKAGED):
        return name
    module, _, folder = name.removeprefix(PACKAGED).partition("/")
    found = importlib.util.find_spec(module) if module.isidentifier() else None
    places = list(found.submodule_search_locations or []) if found else []
    if not places:
        raise LanguageError(
            f"learner.language.model={name!r}: no package {module!r} is installed; install it"
        )
    return str(Path(places[0]) / folder)


@torch.no_grad()
def _vector(model: Any, tokens: Any, pooling: str) -> Tensor:
    given = model(**tokens)
    pooled = getattr(given, "pooler_output", None) if pooling == "pooler" else None
    vector = pooled[0] if pooled is not None else given.last_hidden_state[0].mean(0)
    return vector.detach().float().cpu()  # type: ignore[no-any-return]
