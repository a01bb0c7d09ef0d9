"""What a provider sends, and what is kept of what was paid for, is read, asked for again or refused, whatever became of it."""

import json
import tempfile
from pathlib import Path

import yaml
from hypothesis import given
from hypothesis import strategies as st

from tasks.records import Usage
from tasks.store import StoreError
from tasks.versions import read_pointer
from tasks.vlm.budget import Budget
from tasks.vlm.cache import CachedClient
from tasks.vlm.client import Message, Request
from tasks.vlm.failures import BrokenReplyError
from tasks.vlm.replies import MOST_TOKENS, Completion, Images, ModelList, understood
from tests.properties.hostile import anything, damaged
from tests.properties.refusing import or_refused
from tests.vlm.fake_vlm import SETTINGS, ScriptedVlm

COMPLETION = {
    "model": "m", "choices": [{"index": 0, "message": {"role": "assistant", "content": "YES, é", "refusal": None}}],
    "usage": {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9},
}  # fmt: skip
IMAGES = {"data": [{"b64_json": "AAAA"}], "usage": {"input_tokens": 3, "output_tokens": 4}}
MODELS = {"data": [{"id": "m"}, {"id": "n"}]}
FAILURE = {"error": {"message": "no", "type": "x"}}
POINTER = yaml.safe_dump(
    {
        "outs": [{"md5": f"{5:032x}.dir", "path": "seed-0", "hash": "md5"}],
        "meta": {"method": "guided", "seed": 0},
    }
).encode()


@st.composite
def replies(draw: st.DrawFn) -> bytes:
    """A reply of a provider: right, with a part of another kind, with damaged bytes, or anything."""
    reply = draw(st.sampled_from([COMPLETION, IMAGES, MODELS, FAILURE]))
    if draw(st.booleans()):
        return draw(damaged(json.dumps(reply).encode()))
    part = draw(st.sampled_from([*reply, "error"]))
    return json.dumps(
        draw(st.sampled_from([reply, {**reply, part: draw(anything)}, draw(anything)]))
    ).encode()


@given(replies() | st.binary(max_size=60) | st.integers(1, 100_000).map(lambda deep: b"[" * deep))
def test_any_reply_is_understood_or_called_broken(data: bytes) -> None:
    for form in (Completion, Images, ModelList):
        with or_refused(BrokenReplyError, form.noun, "an error in place of an answer"):
            read = understood(form, data)
            assert isinstance(read, form)
            if isinstance(read, Completion | Images):
                assert 0 <= read.used.prompt_tokens <= MOST_TOKENS
                assert 0 <= read.used.completion_tokens <= MOST_TOKENS
            if isinstance(read, Completion):
                (read.choices[0].message.content or "").encode()  # as it is kept: no half of a surrogate pair


class Counting(ScriptedVlm):
    """Says how often it was asked."""

    def text(self, request: Request) -> str:
        return f"answer {len(self.asked)} to {request.messages[0].text}"


@given(st.data())
def test_a_damaged_answer_is_asked_for_again_and_no_other(data: st.DataObject) -> None:
    questions = [Request(messages=(Message(role="user", text=text),)) for text in ("é?", "b?")]
    vlm = Counting()
    with tempfile.TemporaryDirectory() as folder:
        client = CachedClient(vlm, Path(folder))
        first = client.complete_all(questions)
        kept = {path: path.read_bytes() for path in sorted(Path(folder).glob("*/*.json"))}
        victim = data.draw(st.sampled_from(sorted(kept)))
        victim.write_bytes(data.draw(damaged(kept[victim])))
        whole = victim.read_bytes() == kept[victim]
        again = client.complete_all(questions)
        assert len(vlm.asked) == (2 if whole else 3)
        assert sum(a != b for a, b in zip(first, again, strict=True)) == (0 if whole else 1)
        assert client.complete_all(questions) == again, "what was asked again is kept"


@given(st.data())
def test_what_was_paid_counts_on_after_any_damage_to_the_ledger(data: st.DataObject) -> None:
    nothing, one = Usage(), Usage(calls=1, prompt_tokens=10, completion_tokens=3, cost=0.5)
    with tempfile.TemporaryDirectory() as folder:
        ledger = Path(folder) / "paid.jsonl"
        budget = Budget(SETTINGS, ledger)
        for _ in range(3):
            budget.settle(nothing, one)
        ledger.write_bytes(data.draw(damaged(ledger.read_bytes())))
        found = Budget(SETTINGS, ledger).paid
        assert found.calls >= 0
        Budget(SETTINGS, ledger).settle(nothing, one)
        assert Budget(SETTINGS, ledger).paid == Usage.total([found, one])


pointers = st.one_of(
    damaged(POINTER),
    st.binary(max_size=60),
    st.integers(1, 5000).map(lambda deep: b"[" * deep),
    anything.map(lambda value: json.dumps({"outs": [value]}).encode()),
    st.tuples(anything | st.sampled_from(["..", "../x", "/x", ""]), anything, anything).map(
        lambda said: json.dumps({"outs": [{"path": said[0], "md5": said[1]}], "meta": said[2]}).encode()
    ),
)


@given(pointers)
def test_any_pointer_names_a_folder_beside_it_or_is_refused(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "seed-0.dvc"
        path.write_bytes(data)
        with or_refused(StoreError, "seed-0.dvc is no pointer"):
            pointer = read_pointer(path)
            assert pointer.folder.parent == path.parent
            assert ".." not in pointer.folder.parts
            assert isinstance(pointer.digest, str)
