"""An error's sentence opens with where it arose."""

import pytest

from flows.cli import fail
from tasks.whereabouts import inside, with_place


def test_places_are_named_from_the_outermost_and_foreign_notes_left_out() -> None:
    error = ValueError("it broke")
    error.add_note("a note of somebody else's")
    with pytest.raises(ValueError, match="it broke") as caught, inside("session 1"), inside("epoch 0"):
        raise error
    assert with_place(caught.value) == "session 1, epoch 0: it broke"


def test_elsewhere_the_message_stands_alone() -> None:
    assert with_place(ValueError("it broke")) == "it broke"


def test_the_command_line_says_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="it broke") as caught, inside("session 1"):
        raise ValueError("it broke")
    assert fail(caught.value, 1) == 1
    assert capsys.readouterr().err == "error: session 1: it broke\n"
