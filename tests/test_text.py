"""Text of others: what is taken out, and what stays as it is."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.text import no_formula, one_line, readable, shortened


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("a\tb\nc\r\n", "a\tb\nc\r\n"),
        ("Ünïcode 鳥 🐦\u200d⬛", "Ünïcode 鳥 🐦\u200d⬛"),
        ("nul\0 bell\a", "nul  bell "),
        ("\x1b[31mred\x1b]0;title\x07", " [31mred ]0;title "),
        ("\u202eevil\u202c \u2066x\u2069", " evil   x "),
        ("half \ud800", "half  "),
        ("next\x85 line\u2028 \u2029", "next  line   "),
    ],
)
def test_only_what_is_no_text_becomes_a_blank(text: str, kept: str) -> None:
    assert readable(text) == kept


@given(st.text(st.characters(), max_size=60), st.integers(1, 40))
def test_any_text_becomes_text_of_one_line_within_its_bound(text: str, most: int) -> None:
    line = one_line(text + "\ud800\x1b", most)
    assert len(line) <= most
    assert line.splitlines() in ([line], [])
    assert line.encode("utf-8").decode("utf-8") == line
    assert readable(readable(text)) == readable(text)


def test_a_bound_shows_that_something_is_missing() -> None:
    assert shortened("abcdef", 4) == "abc…"
    assert shortened("abcd", 4) == "abcd"
    assert one_line("a\n\n b\tc") == "a b c"


@pytest.mark.parametrize("start", "=+-@")
def test_a_spreadsheet_computes_nothing(start: str) -> None:
    assert no_formula(f"{start}1+1") == f"'{start}1+1"
    assert no_formula("guided") == "guided"
