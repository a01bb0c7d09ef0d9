"""A deployment whose worker, run or server is killed: what was sealed stays, and the same call goes on from there."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.canaries import holding
from tests.conftest import QUICK, Place
from tests.crowd import twice
from tests.deployment import Clone
from tests.storm import not_kept, sealed

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]
STARTED = Path(".fscil", "stages")


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Iterator[Clone]:
    made = Clone(tmp_path_factory.mktemp("killed") / "clone")
    try:
        yield made
    finally:
        made.make("down")
    assert list(holding(made.root)) == [], "a planted key was left"


def until(true: Callable[[], object], seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.05)


def pid_of(clone: Clone, service: str) -> int:
    return int((clone.root / ".fscil" / "services" / f"{service}.pid").read_text().split()[0])


def kill_group(clone: Clone, service: str) -> None:
    """What the kernel, a scheduler or a lost machine does: no chance to say anything."""
    group = pid_of(clone, service)
    os.killpg(group, signal.SIGKILL)
    until(lambda: not alive(group))


def alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def started(clone: Clone, seed: int, *more: str) -> None:
    """Ask for a run without waiting for it."""
    overrides = [*QUICK, f"seed={seed}", *more]
    done = clone.start("fscil/digits", watch=False, overrides=overrides)
    assert done.returncode == 0, done.stdout + done.stderr


def ended(clone: Clone, seed: int) -> bool:
    return (clone.root / "runs" / "digits" / "guided" / f"seed-{seed}" / "experiment.json").is_file()


def up(clone: Clone) -> None:
    done = clone.make("up")
    assert done.returncode == 0, done.stderr + done.stdout


@pytest.mark.parametrize(("service", "stage"), [("worker", "mine_failures"), ("server", "tune_lora")])
def test_the_same_call_goes_on_after_a_kill(clone: Clone, service: str, stage: str, finished: Place) -> None:
    up(clone)
    clone.forget_runs()
    apart = f"tracking.experiment=killed-{service}"
    started(clone, 0, apart)
    until(lambda: list((clone.root / STARTED / stage).glob("*.partial")))
    kill_group(clone, service)
    before = sealed(clone.root / ".fscil")
    assert before
    up(clone)
    until(lambda: ended(clone, 0) or not clone.working(), 900)  # a run waits a while for its server
    if not ended(clone, 0):
        started(clone, 0, apart)
        until(lambda: ended(clone, 0))
    assert {path: path.stat().st_mtime_ns for path in before} == before, "something sealed was computed again"
    until(lambda: not clone.working())
    assert Place(clone.root).files("guided") == finished.files("guided")
    assert twice(Place(clone.root)) == [], "MLflow has a point twice"
    assert list((clone.root / STARTED).glob("*/*.partial")) == []
    assert not_kept(Place(clone.root).run("guided")) == []
