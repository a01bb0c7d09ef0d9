"""When a session's epochs stop: a pure rule over validation accuracies. Test accuracy is not among its inputs."""

from collections.abc import Sequence

from pydantic import Field

from tasks.records import Frozen


class StoppingSettings(Frozen):
    """The same for every row of a table, so that budgets are equal."""

    max_epochs: int = Field(ge=1)
    patience: int = Field(ge=1)


def reason_to_stop(accuracies: Sequence[float], settings: StoppingSettings) -> str | None:
    """Why the session ends after these epochs, or None if it goes on.

    Args:
        accuracies: validation accuracy in [0, 1] after each epoch so far, at least one.
        settings: the limits.
    """
    if not accuracies:
        raise ValueError("a session cannot stop before its first epoch")
    if len(accuracies) >= settings.max_epochs:
        return f"max_epochs={settings.max_epochs} reached"
    best = max(range(len(accuracies)), key=lambda epoch: (accuracies[epoch], -epoch))
    since = len(accuracies) - 1 - best
    if since >= settings.patience:
        return f"validation accuracy has not risen for {since} epochs (patience={settings.patience})"
    return None
