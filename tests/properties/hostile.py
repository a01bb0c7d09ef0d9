"""Input from outside that is nothing like what was written, or almost: strategies that several properties share."""

from hypothesis import strategies as st

anything = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)
"""Whatever JSON can say, and infinities."""


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """Bytes with some of them changed, cut out, put in or repeated."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        how, some = (
            draw(st.sampled_from(["change", "cut", "insert", "end"])),
            draw(st.binary(min_size=1, max_size=6)),
        )
        if how == "end":
            del data[at:]
        else:
            data[at : at + (0 if how == "insert" else len(some))] = b"" if how == "cut" else some
    return bytes(data)
