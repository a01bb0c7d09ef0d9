"""`make storm`: experiments that are killed at every kind of moment until they end, and what that cost.

    python -m tests.storm [--runs N] [--at-once K] [--seed S] [--folder PLACE]

Each run is a quick guided experiment with tracking and DVC of its own. It is killed one to three times, at moments
drawn from the seed: while one of the six stages works, while one is sealed, while an epoch is exported, while MLflow
or DVC is written, or at any time; by SIGKILL, and in some runs by SIGINT or SIGTERM, which must end it in order. Then
the same command runs to its end, and all it left is compared with an undisturbed run. The exit status is 1 if anything
was lost, computed twice or left behind.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from rich.console import Console
from rich.table import Table

from tasks.records import AugmentedImage
from tasks.store import digest_of, read_lines
from tasks.versions import Versions, pointer_of, read_pointer
from tests.conftest import ROOT, Place

MOMENTS = {
    **{
        stage: f"state/stages/{stage}/*.partial"
        for stage in (
            "train_classifier",
            "evaluate",
            "mine_failures",
            "vlm_compare",
            "tune_lora",
            "regenerate",
        )
    },
    "sealing": "state/stages/*/*.partial/timing.json",
    "exporting": "runs/digits/guided/seed-0/session-*/.*.tmp",
    "MLflow": "mlflow.db-journal",
    "DVC's cache": "runs/digits/guided/.*seed-0.*.tmp",
    "any time": "",
}
SIGNALS = {signal.SIGKILL: -9, signal.SIGINT: 130, signal.SIGTERM: 143}
MEASURED = ("seconds/", "memory_mib/", "system/")  # metrics of the machine, which differ from run to run
ORDERLY_S = 5.0
LOADED_S = 15.0  # where other runs work at the same time
LATE_S = 20.0  # a run that is about to end when it is asked to stop may end as it would have
PATIENCE_S = 600


@dataclass
class Outcome:
    """What one run went through and what was found wrong with it afterwards."""

    moments: list[str] = field(default_factory=list)
    signals: list[str] = field(default_factory=list)
    stops_s: list[float] = field(default_factory=list)
    kept: int = 0
    faults: list[str] = field(default_factory=list)


def main(arguments: list[str]) -> int:
    """Run the storm; print the table; 1 where something was lost."""
    parser = argparse.ArgumentParser(prog="python -m tests.storm")
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--at-once", type=int, default=max(1, (os.cpu_count() or 2)))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=None, help="where to work; a temporary one by default")
    chosen = parser.parse_args(arguments)
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell's background job hands on that it is ignored
    root = chosen.folder or Path(tempfile.mkdtemp(prefix="fscil-storm-"))
    reference = Place(made(root / "undisturbed"))
    finish(reference.root, reference)
    orderly_s = ORDERLY_S if chosen.at_once == 1 else LOADED_S
    console = Console(stderr=True)
    with ThreadPoolExecutor(chosen.at_once) as pool:
        futures = [
            pool.submit(weather, root, reference, chosen.seed, i, orderly_s) for i in range(chosen.runs)
        ]
        outcomes = []
        for number, future in enumerate(futures):
            outcomes.append(future.result())
            told = "; ".join(outcomes[-1].faults) or "equal"
            console.print(
                f"run {number}: {', '.join(outcomes[-1].moments)}: {told}", markup=False, highlight=False
            )
    Console().print(table(outcomes))
    never = set(MOMENTS) - {moment for outcome in outcomes for moment in outcome.moments}
    if missed := never if chosen.runs >= 2 * len(MOMENTS) else set():
        console.print(f"no run was stopped while: {', '.join(sorted(missed))}")
    return int(bool(missed) or any(outcome.faults for outcome in outcomes))


def weather(root: Path, reference: Place, seed: int, number: int, orderly_s: float) -> Outcome:
    """One run: killed, started again, ended, compared."""
    dice, outcome = random.Random(f"{seed}-{number}"), Outcome()
    place = Place(made(root / f"run-{number:02d}"))
    kept: dict[Path, int] = {}
    for attempt in range(dice.randint(1, 3)):
        names = list(MOMENTS)
        moment = names[(number + attempt) % len(names)] if attempt == 0 else dice.choice(names)
        number_of_signal = dice.choices(list(SIGNALS), (8, 1, 1))[0]
        if not strike(place, moment, number_of_signal, dice, outcome, orderly_s):
            break
        kept = finished_work(place) | kept  # known by when it was first there
    outcome.kept = len(kept)
    try:
        finish(place.root, place)
        outcome.faults += differences(place, reference, kept)
    except (Exception, SystemExit) as error:
        outcome.faults.append(f"{type(error).__name__}: {error}")
    if not outcome.faults:
        shutil.rmtree(place.root)
    return outcome


def strike(
    place: Place, moment: str, number: signal.Signals, dice: random.Random, outcome: Outcome, orderly_s: float
) -> bool:
    """Start the run and stop it at a moment, in order within so many seconds; False if it ended before."""
    seen = signs_of(place, moment)
    process = start(place)
    until = time.monotonic() + (dice.uniform(5, 60) if not MOMENTS[moment] else PATIENCE_S)
    while process.poll() is None and time.monotonic() < until:
        if signs_of(place, moment) - seen:
            time.sleep(dice.choice((0.0, 0.0, dice.uniform(0, 0.5))))
            break
        time.sleep(0.003)
    if process.poll() is not None:
        outcome.moments.append(f"{moment} (missed)")
        return False
    began = time.monotonic()
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does, to all that the run has started too
    else:
        process.send_signal(number)
    code = process.wait()
    took = time.monotonic() - began
    outcome.moments.append(moment)
    outcome.signals.append(number.name)
    said = (place.root / "log").read_text(errors="replace")
    if number != signal.SIGKILL:
        outcome.stops_s.append(took)
        if code not in (SIGNALS[number], 0):
            outcome.faults.append(f"{number.name} ended it with {code}: {' '.join(said.split())[-300:]}")
        elif code == 0 and took > LATE_S:
            outcome.faults.append(f"{number.name} was not heeded")
        elif code and took > orderly_s:
            outcome.faults.append(f"{number.name} was heeded only after more than {orderly_s:g} s")
        elif code and "the same command goes on from here" not in said:
            outcome.faults.append(f"{number.name} without a sentence on how to resume")
    return True


def signs_of(place: Place, moment: str) -> set[tuple[Path, int]]:
    """The files by which a moment is known, and when they were written: a kill may have left some."""
    found = set()
    for path in place.root.glob(MOMENTS[moment]) if MOMENTS[moment] else ():
        with suppress(FileNotFoundError):
            found.add((path, path.stat().st_mtime_ns if path.is_file() else 0))
    return found


# ------------------------------------------------------------------------------------------ running


def made(root: Path) -> Path:
    """A folder with a DVC repository of its own."""
    root.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"DO_NOT_TRACK": "1"}
    command = [sys.executable, "-m", "dvc", "init", "--no-scm", "--quiet"]
    subprocess.run(command, cwd=root, env=environment, check=True)
    return root


def start(place: Place, seed: int = 0, log: str = "log") -> subprocess.Popen[bytes]:
    """The experiment's command, in a process of its own, writing what it says to a file of the place."""
    overrides = place.overrides("runtime.threads=1", tracking=True)
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")}
    environment = kept | {
        "PREFECT_HOME": str(place.root / "prefect"),
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "300",
        "OMP_NUM_THREADS": "1",
        "DO_NOT_TRACK": "1",
        "TMPDIR": str(place.root / "tmp"),
    }
    (place.root / "tmp").mkdir(exist_ok=True)
    with (place.root / log).open("wb") as told:
        return subprocess.Popen(
            [sys.executable, "-m", "flows", "dataset=digits", "method=guided", f"seed={seed}", *overrides],
            cwd=ROOT, env=environment, stdout=told, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip


def finish(root: Path, place: Place) -> None:
    """Run the command to its end."""
    if code := start(place).wait():
        raise SystemExit(f"{root} ended with {code}:\n{(root / 'log').read_text(errors='replace')[-3000:]}")


# ------------------------------------------------------------------------------------------ comparing


def finished_work(place: Place) -> dict[Path, int]:
    """When each sealed record, each image of a finished shard and each VLM answer was written."""
    state = place.root / "state"
    answered = (state / "vlm").rglob("[!.]*.json")
    written = sealed(state) | {path: path.stat().st_mtime_ns for path in answered}
    for shard in state.glob("stages/regenerate/*.partial/shard-*.jsonl"):
        for row in read_lines(shard, AugmentedImage):
            image = shard.parent / "images" / row.path
            written[shard.parent.with_suffix("") / "images" / row.path] = image.stat().st_mtime_ns
    return written


def sealed(state: Path) -> dict[Path, int]:
    """When the record of each sealed stage in a state folder was written."""
    records = state.glob("stages/*/*/record.json")
    return {path: path.stat().st_mtime_ns for path in records if path.parent.suffix != ".partial"}


def differences(place: Place, reference: Place, kept: dict[Path, int]) -> list[str]:
    """What is not as after an undisturbed run; empty where nothing is."""
    checks: dict[str, Callable[[], bool]] = {
        "a result differs": lambda: place.files("guided") != reference.files("guided"),
        "something finished was lost or done again": lambda: (
            [path for path, at in kept.items() if not path.is_file() or path.stat().st_mtime_ns != at] != []
        ),
        "a VLM answer was paid twice": lambda: paid(place) > len(answers(place)),
        "VLM answers are others": lambda: answers(place) != answers(reference),
        "MLflow has other points": lambda: points(place) != points(reference),
        "MLflow has a point twice": lambda: any(n > 1 for n in Counter(point_keys(place)).values()),
        "DVC does not keep the results whole": lambda: bool(not_kept(place.run("guided"))),
        "something temporary was left": lambda: bool(leftovers(place)),
        "a process was left": lambda: bool(processes(place)),
    }
    return [name for name, wrong in checks.items() if wrong()]


def paid(place: Place) -> int:
    """How many VLM answers were paid: a line each in the run's ledger."""
    ledgers = (place.root / "state" / "runs").rglob("vlm-paid.jsonl")
    return sum(len(ledger.read_text().splitlines()) for ledger in ledgers)


def answers(place: Place) -> set[str]:
    """The VLM answers that are kept, by what was asked."""
    return {path.name for path in (place.root / "state" / "vlm").rglob("*.json")}


def rows(place: Place) -> list[tuple[str, str, int, float]]:
    """Run name, metric, step and value of every point in MLflow."""
    with sqlite3.connect(f"file:{quote(str(place.root))}/mlflow.db?mode=ro", uri=True) as database:
        return database.execute(
            "select runs.name, metrics.key, metrics.step, metrics.value "
            "from metrics join runs using (run_uuid)"
        ).fetchall()


def points(place: Place) -> set[tuple[str, str, int, float]]:
    """All points but those that measure the machine."""
    return {row for row in rows(place) if not row[1].startswith(MEASURED)}


def point_keys(place: Place) -> list[tuple[str, str, int]]:
    """Which points there are, of whatever value."""
    return [row[:3] for row in rows(place)]


def not_kept(folder: Path) -> list[str]:
    """What DVC's cache lacks of a folder as its pointer names it, or holds otherwise; empty where it is whole."""
    versions = Versions.around(folder)
    if versions is None or not pointer_of(folder).is_file():
        return [f"{folder} has no pointer"]
    cache = versions.repository / ".dvc" / "cache" / "files" / "md5"
    digest = read_pointer(pointer_of(folder)).digest
    faults = [] if digest == digest_of(folder) else [f"{pointer_of(folder)} names {digest}"]
    if damage := _damage(cache, digest):
        return [*faults, *damage]
    listed = {entry["md5"] for entry in json.loads((cache / digest[:2] / digest[2:]).read_text("utf-8"))}
    return faults + [fault for md5 in sorted(listed) for fault in _damage(cache, md5)]


def _damage(cache: Path, name: str) -> list[str]:
    kept = cache / name[:2] / name[2:]
    if not kept.is_file():
        return [f"{name} is missing"]
    holds = digest_of(kept)
    return [] if holds == name.removesuffix(".dir") else [f"{name} holds {holds}"]


def leftovers(place: Place) -> list[Path]:
    """What is neither sealed nor a result; torch makes a folder for its compiler in any process, and keeps it."""
    temporary = (path for path in place.root.glob("tmp/*") if not path.name.startswith("torchinductor_"))
    return [
        *temporary,
        *(
            path
            for path in place.root.rglob("*")
            if path.name.endswith((".partial", ".tmp", ".damaged", "-journal"))
            and not {"prefect", "tmp"} & set(path.relative_to(place.root).parts[:1])
        ),
    ]


def processes(place: Place, patience_s: float = 10.0) -> list[str]:
    """Processes that still work in the place, so many seconds after the run ended."""
    until = time.monotonic() + patience_s
    while time.monotonic() < until:
        found = [p.parent.name for p in Path("/proc").glob("[0-9]*/environ") if _works_in(p, place.root)]
        if not found:
            return []
        time.sleep(0.2)
    return found


def _works_in(environ: Path, root: Path) -> bool:
    try:
        return f"PREFECT_HOME={root}/".encode() in environ.read_bytes()
    except OSError:
        return False


def table(outcomes: list[Outcome]) -> Table:
    """How often each moment was met, and what was lost."""
    met = Counter(moment for outcome in outcomes for moment in outcome.moments)
    bad = Counter(moment for outcome in outcomes if outcome.faults for moment in outcome.moments)
    sent = Counter(name for outcome in outcomes for name in outcome.signals)
    stops = [seconds for outcome in outcomes for seconds in outcome.stops_s]
    shown = Table(
        title=f"{len(outcomes)} runs, {sum(sent.values())} stops ({', '.join(f'{n} {k}' for k, n in sent.items())})"
    )
    for heading in ("stopped while", "times", "in runs with a fault"):
        shown.add_column(heading)
    for moment in sorted({*MOMENTS, *met}):
        shown.add_row(moment, str(met[moment]), str(bad[moment]))
    shown.caption = (
        f"slowest of {len(stops)} orderly stops {max(stops, default=0):.1f} s, "
        f"{sum(s > ORDERLY_S for s in stops)} of them over the {ORDERLY_S:.0f} s promised on a free machine; "
        f"{sum(o.kept for o in outcomes):,} records, images and answers were finished when stopped; "
        f"faults: {', '.join(sorted({f for o in outcomes for f in o.faults})) or 'none'}"
    )
    return shown


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
