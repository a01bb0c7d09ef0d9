"""Hash seed, locale, time zone, umask and working directory change nothing: not a digest, not a byte of a table."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import pytest

from tests.conftest import ROOT, Place
from tests.flows.test_canaries import SHIPPED

ENVIRONMENTS = {
    "one": {"PYTHONHASHSEED": "1", "TZ": "Pacific/Kiritimati", "LC_ALL": "C"},
    "other": {
        "PYTHONHASHSEED": "random",
        "TZ": "America/St_Johns",
        "LC_ALL": "tr_TR.UTF-8",
        "LANG": "de_DE.UTF-8",
    },
}
ASCII = {
    "PYTHONUTF8": "0",
    "PYTHONCOERCECLOCALE": "0",
}  # with LC_ALL=C: no file or line can hold another letter
UMASKS = {"one": 0o077, "other": 0o002}


def started(
    name: str, where: Path, *command: str, more: Mapping[str, str] = MappingProxyType({})
) -> subprocess.Popen[bytes]:
    """A process of one of the environments, in a working directory of its own."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "LC_", "LANG", "PYTHON"))}
    set_here = {
        "PYTHONPATH": str(ROOT),
        "PREFECT_HOME": str(where / "prefect"),
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "300",
        **ENVIRONMENTS[name],
        **more,
    }
    where.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, *command], cwd=where, env=kept | set_here, umask=UMASKS[name],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def ended(process: subprocess.Popen[bytes]) -> bytes:
    out, err = process.communicate()
    assert process.returncode == 0, err.decode(errors="replace")[-3000:]
    return out


SCRIPT = """
import hashlib
from pathlib import Path
from flows.config import load_config
from flows.formats import comma_separated, latex, markdown, metrics_json
from flows.report_page import page
from flows.results import collect
from flows.tables import table
from tasks.datasets.benchmark import build_benchmark
from tasks.provenance import config_digest
from tasks.seeding import seed_for
from tasks.store import digest_of
from tests.helpers import fabricate_run

def said(name, text):
    print(name, hashlib.sha256(text.encode()).hexdigest())

here = Path.cwd()
for method in ("guided", "fixed_sd", "finetune"):
    config = load_config([f"method={method}"])
    said(method, config_digest({**config.identity, "dataset": None, "generator": None, "classifier": None}))
    fabricate_run(here, method=method, dataset="Işık ÄÖ 鳥")
classes = ("İ", "ı", "i", "I", "ä", "z", "Z", "a")  # Turkish and German sort and fold these otherwise
for number, name in enumerate(classes):
    for copy in range(8):
        file = here / "data" / name / f"{copy}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        from PIL import Image
        Image.new("RGB", (8, 8), (number * 30, copy * 30, 7)).save(file)
chosen = load_config(["dataset=imagefolder", f"dataset.root={here}/data", "dataset.n_base=2", "dataset.n_way=2",
                      "dataset.n_sessions=2", "dataset.k_shot=2",
                      "dataset.n_sessions=2", "dataset.k_shot=2"]).dataset
names = {"İ": "dotted", "ı": "dotless", "I": "capital", "Z": "capital z"}
chosen = chosen.model_copy(update={"class_names": names})
cut = build_benchmark(chosen)
said("classes", repr(cut.class_names))
said("benchmark", cut.digest)
said("seed", str(seed_for(3, 1, 2, "regenerate", "slot")))
runs = collect(here / "runs", here / "state")
rows = table(runs)
for name, text in (("markdown", markdown(rows, ["a"])), ("csv", comma_separated(rows)), ("latex", latex(rows)),
                   ("json", metrics_json(rows)), ("page", page(runs, rows, []))):
    said(name, text)
for folder in ("runs", "state"):
    files = sorted(p for p in (here / folder).rglob("*") if p.is_file() and p.name not in ("timing.json",))
    said(folder, repr([(p.relative_to(here).as_posix(), digest_of(p)) for p in files]))
"""


def test_what_is_sorted_written_and_drawn_is_the_same_in_any_environment(tmp_path: Path) -> None:
    (script := tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    running = [started(name, tmp_path / name, str(script)) for name in ENVIRONMENTS]
    one, other = (ended(process).decode("ascii").splitlines() for process in running)
    assert len(one) == 13
    assert one == other


@pytest.mark.slow
def test_an_experiment_is_equal_digest_by_digest_in_any_environment(finished: Place, tmp_path: Path) -> None:
    running = []
    for name in ENVIRONMENTS:
        place = Place(tmp_path / name, finished.data)
        command = ("-m", "flows", "dataset=digits", "method=guided", "seed=0", *place.overrides(*SHIPPED))
        running.append((place, started(name, place.root, *command, more=ASCII if name == "one" else {})))
    for place, process in running:
        ended(process)
        assert place.files("guided") == finished.files("guided")
