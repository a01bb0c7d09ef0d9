"""An interrupt ends a run as an interrupt, whatever a library makes of it on the way out."""

from collections.abc import Iterator
from contextlib import contextmanager

from flows.cli import noted, stop_under
from flows.server_lost import is_lost


@contextmanager
def interrupts_first() -> Iterator[None]:
    """Raise the interrupt that arrived in a block where a library has answered it with an error of its own.

    Prefect does, while it has not begun a task yet: "Task run is not set". What a disk or a lost server says stays.
    """
    try:
        yield
    except Exception as error:
        stop = stop_under(error)
        if stop is None or isinstance(error, OSError) or is_lost(error):
            raise
        raise stop from error


def raise_unheeded() -> None:
    """Raise the interrupt that has arrived and that nothing has come of: a library has swallowed it.

    Prefect does where one arrives as a flow ends, and so does who goes on without MLflow.
    """
    if (stop := noted()) is not None:
        raise stop
