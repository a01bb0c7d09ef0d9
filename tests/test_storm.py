"""A part of `make storm`: an interrupt from the terminal, a request to end, and, slow, some runs of both halves."""

import os
import signal
import time
from pathlib import Path

import pytest

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


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_runs_that_are_killed_end_as_if_undisturbed(tmp_path: Path, digits: Path) -> None:
    assert storm.main(["--runs", "3", "--folder", str(tmp_path / "storm")]) == 0


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_runs_that_start_together_end_as_if_alone(tmp_path: Path, digits: Path) -> None:
    assert crowd.main(["--runs", "4", "--folder", str(tmp_path / "crowd")]) == 0
