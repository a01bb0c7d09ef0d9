"""Published weights, by their hub's ``owner/name``: the copy on this machine, else the hub's; else one sentence.

What is cached is used as it is, whatever the hub has meanwhile, so a run needs no network twice.
"""

from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import LocalEntryNotFoundError

PATIENCE = 10
"""Seconds that the hub has to answer."""


class HubError(ValueError):
    """Weights that are neither on this machine nor to be had; the message says what to do."""


def hub_file(repo: str, name: str, revision: str | None, remedy: str) -> Path:
    """One file of a repository on the hub, fetched if it is not on this machine.

    Its path is ``.../snapshots/<commit>/<name>``: the commit names the content, whatever ``revision`` was.

    Args:
        repo: ``owner/name``.
        name: the file's path in it.
        revision: a branch, tag or commit; None for the default branch.
        remedy: what to do without a network, as the end of a sentence.

    Raises:
        HubError: not on this machine, and the hub does not answer or does not have it.
    """
    try:
        return Path(hf_hub_download(repo, name, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        pass
    try:
        HfApi().model_info(
            repo, revision=revision, timeout=PATIENCE
        )  # a download would try again for half a minute
        return Path(hf_hub_download(repo, name, revision=revision))
    except Exception as error:  # the transport's own, another library's in each version of the hub's client
        raise HubError(
            f"{name} of {repo!r} is not on this machine and cannot be fetched from the hub "
            f"({type(error).__name__}); {remedy}"
        ) from error
