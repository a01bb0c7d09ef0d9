"""What the store promises of any settings and any damage: one key for equal work, another for other work, no false reading."""

import json
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tasks.records import ArtifactRef, Digest, Frozen
from tasks.store import (
    StageFolder,
    Store,
    artifacts_of,
    canonical,
    digest_of,
    directory_object,
    export,
    fingerprint,
    read_json,
    write_json,
)
from tests.helpers import without_sync

scalars = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
settings = st.dictionaries(st.text(), values, max_size=4)
inputs = st.dictionaries(st.text(), st.none() | st.text().map(Digest), max_size=3)


class Out(Frozen):
    files: tuple[ArtifactRef, ...]
    share: float


@given(settings, inputs, st.integers(), st.randoms(use_true_random=False))
def test_a_key_follows_from_content_alone(
    given_settings: dict, read: dict, seed: int, random: object
) -> None:
    shuffled = list(given_settings.items())
    random.shuffle(shuffled)
    key = fingerprint("s", 1, given_settings, read, seed)
    assert fingerprint("s", 1, dict(shuffled), dict(reversed(read.items())), seed) == key
    assert len(key) == 64
    assert set(key) <= set("0123456789abcdef")


@given(settings, settings, inputs, inputs, st.integers(0, 3), st.integers(0, 3))
def test_other_work_has_another_key(
    a: dict, b: dict, read: dict, other: dict, seed: int, version: int
) -> None:
    key = fingerprint("s", 1, a, read, 0)
    same = json.dumps([a, read, 0, 1], sort_keys=True) == json.dumps(
        [b, other, seed, version], sort_keys=True
    )
    assert (fingerprint("s", version, b, other, seed) == key) == same
    assert fingerprint("t", 1, a, read, 0) != key


@given(values, st.sampled_from([float("nan"), float("inf"), -float("inf"), {1}, object(), Path("a")]))
def test_what_has_no_single_spelling_has_no_key(value: object, bad: object) -> None:
    for hidden in ([value, bad], {"a": value, "b": {"c": bad}}):
        with pytest.raises(ValueError, match="cannot be part of a fingerprint"):
            canonical(hidden)


@given(st.dictionaries(st.text(), values, max_size=4))
def test_json_is_read_as_it_was_written(value: dict) -> None:
    with tempfile.TemporaryDirectory() as folder, without_sync():
        write_json(Path(folder) / "a.json", value)
        assert read_json(Path(folder) / "a.json") == canonical(value)
        assert [path.name for path in Path(folder).iterdir()] == ["a.json"]


contents = st.dictionaries(st.sampled_from(["a", "b/c", "b/d", "e é"]), st.binary(max_size=40), min_size=1)


def seal(root: Path, files: dict[str, bytes], calls: Counter[str]) -> tuple[object, Path]:
    def compute(work: StageFolder) -> Out:
        calls["computed"] += 1
        for name, content in files.items():
            (work.path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
            (work.path / "out" / name).write_bytes(content)
        return Out(files=(work.ref("out", "images"),), share=0.1)

    store = Store(root)
    record = store.run("s", 1, settings={"a": 1}, inputs={}, seed=0, output=Out, compute=compute)
    return record, store.locate(record.output.files[0])


@given(contents, st.data())
def test_damage_to_anything_sealed_is_seen_and_computed_anew_and_nothing_else_is(
    files: dict[str, bytes], data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as folder, without_sync():
        root, calls = Path(folder), Counter()
        record, out = seal(root, files, calls)
        assert seal(root, files, calls)[0] == record
        assert calls["computed"] == 1
        victim = data.draw(
            st.sampled_from(
                sorted(p for p in out.parent.rglob("*") if p.is_file() and p.name != "timing.json")
            )
        )
        whole = victim.read_bytes()
        at = data.draw(st.integers(0, len(whole)))
        harm = data.draw(st.sampled_from(["flip", "cut", "add", "gone"]))
        if harm == "gone":
            victim.unlink()
        else:
            flipped = (
                whole[:at] + bytes([whole[at] ^ 0x20]) + whole[at + 1 :] if at < len(whole) else whole + b"\0"
            )
            victim.write_bytes({"flip": flipped, "cut": whole[:at], "add": whole + b"x"}[harm])
        harmless = victim.exists() and victim.read_bytes() == whole
        again, out = seal(root, files, calls)
        assert again.output == record.output
        assert digest_of(out) == record.output.files[0].digest
        if victim.name != "record.json":  # in a record a name may change to another that nothing follows from
            assert calls["computed"] == (1 if harmless else 2)


@given(contents, contents)
def test_a_folder_s_digest_is_that_of_its_content_and_an_export_holds_the_same(
    a: dict[str, bytes], b: dict[str, bytes]
) -> None:
    with tempfile.TemporaryDirectory() as folder, without_sync():
        root = Path(folder)
        (record, one), (other, two) = (
            seal(root / name, files, Counter()) for name, files in (("1", a), ("2", b))
        )
        assert (digest_of(one) == digest_of(two)) == (a == b)
        export(Store(root / "1"), artifacts_of(record), record, root / "runs" / "epoch")
        assert digest_of(root / "runs" / "epoch" / "out") == record.output.files[0].digest
        assert {p.relative_to(one).as_posix(): p.read_bytes() for p in one.rglob("*") if p.is_file()} == a
        assert (record.fingerprint == other.fingerprint) is True


@given(
    st.dictionaries(st.text(min_size=1), st.text(), min_size=1, max_size=5), st.randoms(use_true_random=False)
)
def test_the_listing_of_a_folder_has_one_digest_in_any_order(files: dict[str, str], random: object) -> None:
    entries = [{"md5": md5, "relpath": name} for name, md5 in files.items()]
    shuffled = list(entries)
    random.shuffle(shuffled)
    assert directory_object(entries) == directory_object(shuffled)
    changed = [dict(entries[0], md5=entries[0]["md5"] + "x"), *entries[1:]]
    assume(len(entries) > 0)
    assert directory_object(changed)[0] != directory_object(entries)[0]
