"""A part of `make storm`: an interrupt from the terminal, a request to end, and, slow, some runs of both halves."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tasks.records import Digest
from tasks.store import digest_of
from tasks.versions import Versions, pointer_of
from tests import crowd, storm
from tests.conftest import Place


@pytest.fixture(autouse=True)
def interrupts_are_heeded() -> None:
    """A background job of a shell ignores them, and so would what it starts."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_that_is_asked_to_end_ends_in_order(
    tmp_path: Path, digits: Path, number: signal.Signals, code: int
) -> None:
    place = Place(storm.made(tmp_path / "place"))
    process = storm.start(place)
    seen = place.root / "state" / "stages"
    while not list(seen.glob("evaluate/*")):
        assert process.poll() is None, (place.root / "log").read_text()
        time.sleep(0.02)
    began = time.monotonic()
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does, to the run and to all that it started
    else:
        process.send_signal(number)
    assert process.wait(120) == code
    assert time.monotonic() - began < storm.LOADED_S, (
        "it waited for a server that the interrupt had ended too"
    )
    said = " ".join((place.root / "log").read_text().split())
    assert "nothing sealed is lost - the same command goes on from here" in said
    assert "Traceback" not in said
    assert not storm.processes(place)


SLOW_TO_STOP = """
import pathlib, signal, sys, time
def stop(*_):
    time.sleep(1)
    print("the same command goes on from here")
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
pathlib.Path("state/stages/evaluate/0.partial").mkdir(parents=True)
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("orderly_s", "faults"), [(0.5, ["SIGTERM was heeded only after more than 0.5 s"]), (30, [])]
)
def test_a_stop_that_takes_longer_than_promised_is_a_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, orderly_s: float, faults: list[str]
) -> None:
    def start(place: Place) -> subprocess.Popen[bytes]:
        with (place.root / "log").open("wb") as told:
            return subprocess.Popen([sys.executable, "-c", SLOW_TO_STOP], cwd=place.root, stdout=told)

    monkeypatch.setattr(storm, "start", start)
    place, outcome = Place(tmp_path), storm.Outcome()
    assert storm.strike(place, "evaluate", signal.SIGTERM, random.Random(0), outcome, orderly_s)
    assert outcome.faults == faults


def test_a_run_that_has_the_machine_to_itself_stops_as_soon_as_promised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed = []

    def weather(root: Path, reference: Place, seed: int, number: int, orderly_s: float) -> storm.Outcome:
        allowed.append(orderly_s)
        return storm.Outcome()

    monkeypatch.setattr(storm, "weather", weather)
    monkeypatch.setattr(storm, "finish", lambda root, place: None)
    for at_once in ("1", "2"):
        folder = tmp_path / at_once
        assert storm.main(["--runs", "1", "--at-once", at_once, "--folder", str(folder)]) == 0
    assert allowed == [storm.ORDERLY_S, storm.LOADED_S]


def test_a_missing_a_cut_and_a_swapped_object_of_dvcs_cache_are_noticed(tmp_path: Path) -> None:
    place = Place(storm.made(tmp_path / "place"))
    run = place.run("guided")
    assert storm.not_kept(run) == [f"{run} has no pointer"]
    run.mkdir(parents=True)
    for name, text in (("one", "first"), ("two", "second")):
        (run / name).write_text(text)
    versions = Versions.around(run)
    assert versions is not None
    listing = versions.keep(run, {})
    one, two = digest_of(run / "one"), digest_of(run / "two")
    assert storm.not_kept(run) == []
    for digest in (one, listing):
        with replaced(place, digest, None):
            assert storm.not_kept(run) == [f"{digest} is missing"]
        for other in ("fir", "second"):
            with replaced(place, digest, other) as kept:
                assert storm.not_kept(run) == [f"{digest} holds {digest_of(kept)}"]
    with replaced(place, one, None), replaced(place, two, ""):
        assert {fault.split()[0] for fault in storm.not_kept(run)} == {one, two}
    (run / "three").write_text("not kept yet")
    assert storm.not_kept(run) == [f"{pointer_of(run)} names {listing}"]


@contextmanager
def replaced(place: Place, digest: Digest, text: str | None) -> Iterator[Path]:
    """DVC's object of this name, deleted or with other content for a while."""
    kept = place.root / ".dvc" / "cache" / "files" / "md5" / digest[:2] / digest[2:]
    aside = kept.rename(place.root / digest)
    if text is not None:
        kept.write_text(text)
    yield kept
    aside.replace(kept)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_runs_that_are_killed_end_as_if_undisturbed(tmp_path: Path, digits: Path) -> None:
    assert storm.main(["--runs", "3", "--folder", str(tmp_path / "storm")]) == 0


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_runs_that_start_together_end_as_if_alone(tmp_path: Path, digits: Path) -> None:
    assert crowd.main(["--runs", "4", "--folder", str(tmp_path / "crowd")]) == 0
