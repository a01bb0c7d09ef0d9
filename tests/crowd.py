"""The second half of `make storm`: experiments started together in one place, some twice, some killed, and what that cost.

    python -m tests.crowd [--runs N] [--seed S] [--folder PLACE]

Half as many seeds as runs, each started twice at the same time, with one store, one MLflow and one Prefect database.
Of two with the same key one must work and one refuse with a sentence; two are killed with -9 on the way. What did not
end is started again. Then every result is compared with one that had the machine to itself, and the databases are
checked. The exit status is 1 if anything differs.
"""

import argparse
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from filelock import Timeout
from rich.console import Console
from rich.table import Table

from tasks.store import Store, digest_of
from tests.conftest import Place
from tests.storm import MEASURED, finished_work, leftovers, made, not_kept, processes, start

REFUSED = "is already running in another process"
KILLED = -signal.SIGKILL


@dataclass
class Crowd:
    """What happened to the runs, and what was found wrong afterwards."""

    ends: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    rounds: int = 0
    seconds: float = 0.0


def main(arguments: list[str]) -> int:
    """Run the crowd; print the table; 1 where something differs."""
    parser = argparse.ArgumentParser(prog="python -m tests.crowd")
    parser.add_argument("--runs", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=None, help="where to work; a temporary one by default")
    chosen = parser.parse_args(arguments)
    root = chosen.folder or Path(tempfile.mkdtemp(prefix="fscil-crowd-"))
    seeds = list(range(max(1, chosen.runs // 2)))
    crowd, place = Crowd(), Place(made(root / "together"))
    began = time.monotonic()
    dice = random.Random(chosen.seed)
    while waiting := [seed for seed in seeds if not ended(place, seed)]:
        together(place, [*waiting, *waiting], crowd, kills=2 if crowd.rounds == 0 else 0, dice=dice)
        crowd.rounds += 1
        if crowd.rounds > len(seeds) + 2:
            crowd.faults.append(f"seeds {waiting} never ended")
            break
    crowd.seconds = time.monotonic() - began
    crowd.faults += differences(place, Place(made(root / "alone")), seeds)
    if never_begun(place) > crowd.ends["killed"]:
        crowd.faults.append("Prefect has a run that never began")
    Console().print(table(crowd, len(seeds)))
    return int(bool(crowd.faults))


def together(place: Place, seeds: list[int], crowd: Crowd, *, kills: int, dice: random.Random) -> None:
    """Start one run for each of the seeds at once, kill some, and wait for all."""
    before = finished_work(place)
    logs = [f"log-{crowd.rounds}-{number}" for number in range(len(seeds))]
    started = [start(place, seed, log) for seed, log in zip(seeds, logs, strict=True)]
    for _ in range(kills):
        time.sleep(dice.uniform(15, 40))
        if working := [process for process in started if process.poll() is None]:
            dice.choice(working).send_signal(signal.SIGKILL)
    for process, log in zip(started, logs, strict=True):
        crowd.ends[_end(process, (place.root / log), crowd.faults)] += 1
    if {path: path.stat().st_mtime_ns for path in before} != before:
        crowd.faults.append("something sealed was computed again")


def _end(process: subprocess.Popen[bytes], log: Path, faults: list[str]) -> str:
    code, said = process.wait(), log.read_text(errors="replace")
    if code == KILLED:
        return "killed"
    if code == 0:
        return "ended"
    if code == 1 and REFUSED in " ".join(said.split()):
        return "refused"
    faults.append(f"{log.name} ended with {code}: {' '.join(said.split())[-300:]}")
    return "failed"


def ended(place: Place, seed: int) -> bool:
    """Whether a seed's run is there as a whole."""
    return (run_of(place, seed) / "experiment.json").is_file()


def run_of(place: Place, seed: int) -> Path:
    """The results folder of a seed."""
    return place.run("guided").with_name(f"seed-{seed}")


# ------------------------------------------------------------------------------------------ comparing


def differences(place: Place, alone: Place, seeds: list[int]) -> list[str]:
    """What is not as where each run had the machine to itself."""
    for seed in seeds:
        if start(alone, seed).wait():
            raise SystemExit((alone.root / "log").read_text(errors="replace")[-3000:])
    other = [seed for seed in seeds if results(place, seed) != results(alone, seed)]
    unkept = [seed for seed in seeds if not_kept(run_of(place, seed))]
    checks = {
        f"results of seeds {other} differ": bool(other),
        f"DVC does not keep the results of seeds {unkept} whole": bool(unkept),
        "MLflow has a point twice": bool(twice(place)),
        "MLflow has other runs": runs_in(place) != runs_in(alone),
        "MLflow has other points": points_in(place) != points_in(alone),
        "a database is damaged": any(not sound(file) for file in place.root.rglob("*.db")),
        "a lock is still held": any(_held(place, seed) for seed in seeds),
        "something temporary was left": bool(leftovers(place)),
        "a process was left": bool(processes(place)),
    }
    return [name for name, wrong in checks.items() if wrong]


def results(place: Place, seed: int) -> dict[str, str]:
    """Digest of every file of a run but config.json, which names places."""
    folder = run_of(place, seed)
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "config.json")
    return {path.relative_to(folder).as_posix(): digest_of(path) for path in files}


def runs_in(place: Place) -> Counter[tuple[str, str]]:
    """How often each MLflow run stands there, by its name, the run that it belongs to, and its status."""
    with sqlite3.connect(f"file:{quote(str(place.root))}/mlflow.db?mode=ro", uri=True) as database:
        rows = database.execute(
            "select tags.value || '/' || name, status from runs join tags using (run_uuid) where tags.key = 'fscil.run'"
        )
        return Counter(rows.fetchall())


def points_in(place: Place) -> set[tuple[str, str, int, float]]:
    """Run, metric, step and value of every point but those that measure the machine."""
    with sqlite3.connect(f"file:{quote(str(place.root))}/mlflow.db?mode=ro", uri=True) as database:
        rows = database.execute(
            "select tags.value || '/' || runs.name, metrics.key, metrics.step, metrics.value "
            "from metrics join runs using (run_uuid) join tags using (run_uuid) where tags.key = 'fscil.run'"
        )
        return {row for row in rows if not row[1].startswith(MEASURED)}


def twice(place: Place) -> list[tuple[str, str, int]]:
    """Run id, metric and step of points that stand more than once; the machine's own measures may."""
    with sqlite3.connect(f"file:{quote(str(place.root))}/mlflow.db?mode=ro", uri=True) as database:
        return database.execute(
            "select run_uuid, key, step from metrics where key not like 'system/%' "
            "group by run_uuid, key, step having count(*) > 1"
        ).fetchall()


def never_begun(place: Place) -> int:
    """Prefect's flow runs that nobody went on with, as where a request was answered late and sent twice."""
    with sqlite3.connect(f"file:{quote(str(place.root))}/prefect/prefect.db?mode=ro", uri=True) as database:
        counted = database.execute(
            "select count(*) from flow_run where state_type in ('SCHEDULED', 'PENDING')"
        )
        return int(counted.fetchone()[0])


def sound(file: Path) -> bool:
    """Whether SQLite finds its database whole."""
    with sqlite3.connect(file) as database:
        return database.execute("pragma integrity_check").fetchone() == ("ok",)


def _held(place: Place, seed: int) -> bool:
    lock = Store(place.root / "state").run_lock(f"digits/guided/seed-{seed}")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    return False


def table(crowd: Crowd, seeds: int) -> Table:
    """How the runs ended, and what was wrong."""
    shown = Table(title=f"{seeds} seeds started twice at once, {crowd.rounds} rounds, {crowd.seconds:.0f} s")
    for heading in ("a run", "times"):
        shown.add_column(heading)
    for name, times in sorted(crowd.ends.items()):
        shown.add_row(name, str(times))
    shown.caption = f"faults: {'; '.join(crowd.faults) or 'none'}"
    return shown


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
