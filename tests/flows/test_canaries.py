"""Planted keys: a whole guided run in a process of its own, against a provider that gives the key away wherever it
can, in answers, headers and refusals. It fails, goes on and ends; then nothing that was written or printed holds a
key, nor did the command line of any of its processes.
"""

import os
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT, Place
from tests.vlm.provider import Act, Provider, completion_of, providing, refusal

CANARIES = {
    name: f"canary-{number}-8f3e-{name.lower().replace('_', '-')}"
    for number, name in enumerate(
        (
            "OPENAI_API_KEY", "SOME_VENDORS_KEY", "HF_TOKEN", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN",
            "PREFECT_API_KEY", "PREFECT_API_AUTH_STRING", "AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY", "DVC_STUDIO_TOKEN",
        )
    )
}  # fmt: skip
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


def run(place: Place, provider: Provider, *more: str) -> tuple[int, set[bytes]]:
    """The exit code, and the command lines of all processes seen meanwhile."""
    chosen = place.overrides(
        "dataset.n_sessions=1", "vlm=openai_compatible", "vlm.model=fake-1", f"vlm.base_url={provider.base_url}",
        "vlm.api_key_env=SOME_VENDORS_KEY", "vlm.max_retries=1", *SHIPPED, *more, tracking=True,
    )  # fmt: skip
    command = [sys.executable, "-m", "flows", "dataset=digits", "method=guided", *chosen]
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


def holding(folder: Path) -> Iterator[tuple[str, str]]:
    """Files below a folder, and rows of its databases, that hold a planted key."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink():
            text = path.read_bytes()
            yield from ((str(path), name) for name, key in CANARIES.items() if key.encode() in text)
        if path.suffix == ".db":
            with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as database:
                dump = "\n".join(database.iterdump())
            yield from ((f"{path}, a row", name) for name, key in CANARIES.items() if key in dump)


@pytest.mark.slow
def test_no_planted_key_is_found_in_anything_that_a_run_leaves(tmp_path: Path, digits: Path) -> None:
    place = Place(tmp_path, digits)
    subprocess.run(
        [sys.executable, "-m", "dvc", "init", "--no-scm", "--quiet"],
        cwd=tmp_path,
        env=environment(place),
        check=True,
    )
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
        refused, lines = run(place, provider)
        provider.plan[:] = [*bad, *[told] * 8]
        failed, more = run(place, provider)
        provider.plan[:] = []
        ended, most = run(place, provider)
        assert provider.keys == {SENT}
    said = (tmp_path / "printed").read_text(errors="replace")
    assert (refused, ended) == (2, 0), said[-2000:]
    assert failed in (1, 2)
    assert "***" in said, "the provider's words were shown, without the key"
    assert (tmp_path / "mlflow.db").is_file()
    assert list((tmp_path / "prefect").rglob("*.db")), "Prefect's database was looked through"
    assert list((tmp_path / "runs").rglob("transcript.jsonl"))
    assert list((tmp_path / ".dvc" / "cache").rglob("*")), "and DVC's cache"
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
    assert list(holding(tmp_path)) == []
    assert [
        line for line in lines | more | most if any(key.encode() in line for key in CANARIES.values())
    ] == []
