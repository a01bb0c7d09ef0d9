"""A whole run that asks a paid provider, over real HTTP: it stops at its budget, goes on with a higher one, and
leaves the key, which the provider echoes wherever it can, in nothing that it writes or logs.
"""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flows.experiment import fscil
from flows.replay import replay_report
from tasks.records import ExperimentRecord
from tasks.vlm.transport import BudgetError
from tests.conftest import ROOT, Place
from tests.vlm.provider import Act, Provider, providing, refusal

KEY = "sk-planted-5d81e0"
COST = (1000 * 2.0 + 100 * 10.0) / 1e6
ANSWERS = 2 * 6 + 2 * 8  # two test images a class, of the classes seen in either session


def overrides(place: Place, provider: Provider, max_cost: float) -> list[str]:
    chosen = place.overrides(
        "dataset.n_sessions=1", "dataset.test_per_class=2", "vlm=openai_compatible", "vlm.model=fake-1",
        f"vlm.base_url={provider.base_url}", "vlm.api_key_env=SOME_KEY", "vlm.max_tokens=100", "vlm.max_side=16",
        "vlm.price_in=2", "vlm.price_out=10", f"vlm.max_cost={max_cost}",
    )  # fmt: skip
    return [override for override in chosen if not override.startswith("learner.")]


def run(place: Place, provider: Provider, max_cost: float) -> ExperimentRecord:
    return fscil("digits", "vlm_zero_shot", 0, overrides(place, provider, max_cost))


def test_a_paid_run_stops_goes_on_and_keeps_its_key_to_itself(
    tmp_path: Path,
    prefect_server: None,
    digits: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("SOME_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    place = Place(tmp_path)
    troubles = [refusal(500, f"your key {KEY} is fine, we are not"), refusal(429, KEY, retry_after="0")]
    with providing(Act(), Act(), *troubles, answer=lambda _q: f"It is a zero, says {KEY}.") as provider:
        with pytest.raises(BudgetError, match=r"raise vlm\.max_cost and give the same command again"):
            run(place, provider, max_cost=8.5 * COST)
        stopped_at = answers(provider)
        record = run(place, provider, max_cost=100 * COST)
        assert 0 < stopped_at <= 8
        assert answers(provider) == ANSWERS
        assert provider.keys == {KEY}
    assert (record.usage.calls, record.usage.cost) == (ANSWERS, pytest.approx(ANSWERS * COST))
    monkeypatch.delenv("SOME_KEY")
    sealed = place.run("vlm_zero_shot") / "session-01" / "test"
    again = replay_report(str(sealed), overrides=[f"runtime.state={tmp_path / 'other'}"])
    assert [stage.outcome for stage in again.stages] == ["identical"], "neither key nor provider is there"
    transcript = place.run("vlm_zero_shot") / "session-00" / "test" / "test-transcript.jsonl"
    asked = [json.loads(line)["reply"] for line in transcript.read_text().splitlines()]
    assert [reply["usage"]["cost"] for reply in asked] == [COST] * 12
    assert all("***" in reply["text"] for reply in asked)
    shown = capfd.readouterr()
    assert KEY not in caplog.text + shown.out + shown.err
    assert [
        path for path in tmp_path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()
    ] == []


def answers(provider: Provider) -> int:
    """Questions about images that were billed; a check's word is none of them."""
    return sum(count for text, count in provider.billed.items() if text.startswith("Which one"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_that_waits_for_a_hanging_provider_ends_when_it_is_asked_to(
    tmp_path: Path, digits: Path, number: signal.Signals, code: int
) -> None:
    place = Place(tmp_path)
    environment = os.environ | {"SOME_KEY": KEY, "PREFECT_HOME": str(tmp_path / "prefect")}
    with providing(Act(), *[Act(hang=100)] * 9) as provider:
        process = subprocess.Popen(
            [sys.executable, "-m", "flows", "dataset=digits", "method=vlm_zero_shot", *overrides(place, provider, 1)],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )  # fmt: skip
        while len(provider.sent) < 2:
            assert process.poll() is None
            time.sleep(0.05)
        time.sleep(1)
        began = time.monotonic()
        process.send_signal(number)
        said, _ = process.communicate(timeout=90)
    assert process.returncode == code, said
    assert time.monotonic() - began < 40, "of the 100 s that the provider takes"
    assert "the same command goes on from here" in " ".join(said.split())
