"""Settings to client: which of the implementations answers, behind the cache of answers."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch

from tasks.vlm.cache import CachedClient
from tasks.vlm.cassette import Cassette
from tasks.vlm.client import ChatClient, VlmSettings
from tasks.vlm.openai_client import OpenAiClient
from tasks.vlm.transformers_client import TransformersClient
from tasks.vlm.transport import VlmUnavailableError


def open_client(
    settings: VlmSettings,
    *,
    base_url: str | None,
    cache: Path,
    ledger: Path | None = None,
    device: torch.device | None = None,
) -> ChatClient:
    """The client that the settings ask for.

    The miniature's server names its model by its weights' digest, and that name goes into the keys: answers
    of other weights are never taken from the cache. A local model's name gets its folder's digest.

    Args:
        settings: which VLM, and how.
        base_url: address of a server that the run started itself; goes before ``settings.base_url``.
        cache: folder of the answers; a cassette does not use it.
        ledger: file of what the run has paid; None keeps no account.
        device: where a local model computes; None: on the CPU.

    Raises:
        VlmError: the transcript or the model cannot be read, or the miniature's server cannot be reached.
    """
    client = _client(settings, base_url, ledger, device)
    return client if isinstance(client, Cassette) else CachedClient(client, cache)


def _client(
    settings: VlmSettings,
    base_url: str | None,
    ledger: Path | None = None,
    device: torch.device | None = None,
) -> ChatClient:
    if settings.kind == "cassette":
        assert settings.transcript is not None, "validated with the settings"
        return Cassette.from_file(settings.transcript, settings.sampling)
    if settings.kind == "transformers":
        return TransformersClient(settings, device or torch.device("cpu"))
    if settings.kind == "miniature":
        settings = _with_served_model(settings, base_url)
    return OpenAiClient(settings, base_url, ledger)


def _with_served_model(settings: VlmSettings, base_url: str | None) -> VlmSettings:
    address = base_url or settings.base_url
    if address is None:
        raise VlmUnavailableError(
            "vlm.kind=miniature needs the miniature's server: let the run start it, or set vlm.base_url "
            "to one started by hand"
        )
    served = OpenAiClient(settings, address).served_models()
    named = [model for model in served if model.split("@")[0] == settings.model]
    if not named:
        raise VlmUnavailableError(
            f"the VLM at {address} serves {', '.join(served) or 'no model'}, not {settings.model}; "
            f"correct vlm.model, or use vlm=openai_compatible for a server that is not the miniature's"
        )
    return settings.model_copy(update={"model": named[0]})


@contextmanager
def check_vlm(
    settings: VlmSettings, serve: Callable[[], AbstractContextManager[str]]
) -> Iterator[str | None]:
    """Start the run's own VLM if the settings want it, and find out that the VLM can answer.

    Args:
        settings: which VLM, and how.
        serve: starts the miniature's server and gives its address.

    Yields:
        The address to hand to :func:`open_client`; None if the settings know it.

    Raises:
        VlmError: it cannot answer; one sentence with the remedy.
    """
    starts_one = settings.kind == "miniature" and settings.base_url is None
    with serve() if starts_one else nullcontext() as base_url:
        _client(settings, base_url).check()
        yield base_url
