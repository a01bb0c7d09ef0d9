"""Planted keys: a whole guided run in a process of its own, against a provider that gives the key away wherever it
can, in answers, headers and refusals. It fails, goes on and ends; then nothing that was written or printed holds a
key, nor did the command line of any of its processes.
"""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.canaries import CANARIES, holding
from tests.conftest import ROOT, Place
from tests.vlm.provider import Act, Provider, completion_of, image_of, providing, refusal

WEIGHTS = ROOT / "tasks" / "miniature" / "weights"
SHIPPED = (
    f"generator.path={WEIGHTS}/generator",
    f"classifier.checkpoint={WEIGHTS}/classifier",
)  # from any folder
SENT = CANARIES["SOME_VENDORS_KEY"]


def environment(place: Place) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")}
    return kept | {
        "PREFECT_HOME": str(place.root / "prefect"),
        "PREFECT_LOGGING_LEVEL": "DEBUG",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "300",
        "OPENAI_LOG": "debug",
        "OMP_NUM_THREADS": "1",
        "DO_NOT_TRACK": "1",
        **CANARIES,
    }


def asking_a_vlm(provider: Provider) -> list[str]:
    return [
        "method=guided", "vlm=openai_compatible", "vlm.model=fake-1", f"vlm.base_url={provider.base_url}",
        "vlm.api_key_env=SOME_VENDORS_KEY", "vlm.max_retries=1", *SHIPPED,
    ]  # fmt: skip


def buying_images(provider: Provider) -> list[str]:
    return [
        "method=gpt4o_images", "images_api.model=painter-1", f"images_api.base_url={provider.base_url}", "images_api.size=8",
        "images_api.api_key_env=SOME_VENDORS_KEY", "images_api.max_retries=1", *SHIPPED[1:],
    ]  # fmt: skip


def run(place: Place, *settings: str) -> tuple[int, set[bytes]]:
    """The exit code, and the command lines of all processes seen meanwhile."""
    chosen = place.overrides("dataset.n_sessions=1", *settings, tracking=True)
    command = [sys.executable, "-m", "flows", "dataset=digits", *chosen]
    with (place.root / "printed").open("ab") as printed:
        process = subprocess.Popen(
            command, cwd=place.root, env=environment(place) | {"PYTHONPATH": str(ROOT)},
            stdout=printed, stderr=subprocess.STDOUT,
        )  # fmt: skip
    seen: set[bytes] = set()
    ended = threading.Event()
    watcher = threading.Thread(target=_watch, args=(seen, ended))
    watcher.start()
    code = process.wait()
    ended.set()
    watcher.join()
    return code, seen


def _watch(seen: set[bytes], ended: threading.Event) -> None:
    while not ended.wait(0.5):
        for file in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                seen.add(file.read_bytes())
                seen.add(file.with_name("comm").read_bytes())
            except OSError:
                continue


def initialise(place: Place) -> None:
    """Where a run's versions are kept."""
    init = [sys.executable, "-m", "dvc", "init", "--no-scm", "--quiet"]
    subprocess.run(init, cwd=place.root, env=environment(place), check=True)


def assert_none_is_found(place: Place, seen: set[bytes]) -> None:
    """Neither in a file, nor in a row, nor in a command line."""
    assert (place.root / "mlflow.db").is_file()
    assert list((place.root / "prefect").rglob("*.db")), "Prefect's database was looked through"
    assert list((place.root / ".dvc" / "cache").rglob("*")), "and DVC's cache"
    assert list(holding(place.root)) == []
    assert [line for line in seen if any(key.encode() in line for key in CANARIES.values())] == []


@pytest.mark.slow
def test_no_planted_key_is_found_in_anything_that_a_run_leaves(tmp_path: Path, digits: Path) -> None:
    place = Place(tmp_path, digits)
    initialise(place)
    told = refusal(401, f"Incorrect API key provided: {SENT}", x_your_key=SENT)
    echo = Act(headers={"x-your-key": SENT}, body={**completion_of(f"a digit, {SENT}"), "model": SENT})
    bad = [
        Act(body=f"{SENT} is no JSON"),
        refusal(500, SENT),
        refusal(429, SENT, retry_after="0"),
        echo,
        echo,
    ]

    with providing(told, answer=lambda _: f"YES {SENT}") as provider:
        refused, lines = run(place, *asking_a_vlm(provider))
        provider.plan[:] = [*bad, *[told] * 8]
        failed, more = run(place, *asking_a_vlm(provider))
        provider.plan[:] = []
        ended, most = run(place, *asking_a_vlm(provider))
        assert provider.keys == {SENT}
    said = (tmp_path / "printed").read_text(errors="replace")
    assert (refused, ended) == (2, 0), said[-2000:]
    assert failed in (1, 2)
    assert "***" in said, "the provider's words were shown, without the key"
    assert list((tmp_path / "runs").rglob("transcript.jsonl"))
    report = [sys.executable, "-m", "flows", "report", "runs", "reports", "state"]
    shown = subprocess.run(
        report,
        cwd=tmp_path,
        env=environment(place) | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        check=True,
    )
    assert not any(key.encode() in shown.stdout + shown.stderr for key in CANARIES.values())
    assert (tmp_path / "reports" / "report.html").is_file()
    assert_none_is_found(place, lines | more | most)


@pytest.mark.slow
def test_no_planted_key_is_found_in_what_a_run_leaves_that_buys_its_images(
    tmp_path: Path, digits: Path
) -> None:
    place = Place(tmp_path, digits)
    initialise(place)
    told = refusal(401, f"Incorrect API key provided: {SENT}", x_your_key=SENT)
    echo = Act(
        headers={"x-your-key": SENT}, body={**image_of("a digit"), "revised_prompt": SENT, "model": SENT}
    )
    with providing(told) as provider:
        refused, lines = run(place, *buying_images(provider))
        provider.plan[:] = [
            echo,
            Act(body=f"{SENT} is no JSON"),
            refusal(500, SENT),
            echo,
            refusal(400, SENT),
        ]
        failed, more = run(place, *buying_images(provider))
        provider.plan[:] = [echo]
        ended, most = run(place, *buying_images(provider))
        assert provider.keys == {SENT}
    said = (tmp_path / "printed").read_text(errors="replace")
    assert (refused, failed, ended) == (1, 1, 0), said[-2000:]
    assert "***" in said, "the provider's words were shown, without the key"
    assert list((tmp_path / "state").rglob("*.image")), "what was bought was looked through"
    assert_none_is_found(place, lines | more | most)
