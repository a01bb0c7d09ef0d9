"""`make bench`: what the project promises to be faster than, measured in one run.

    python -m tests.benchmarks [PART ...] [--clock wall|cpu] [--rounds N] [--device cpu|cuda] [--out FILE]

Prints one table and writes it as Markdown, after each part, with the machine and the versions that it was measured with. PART is
similarity, mining, drawing, tuning, orchestration, records or ray; all of them by default, about ten minutes on two free cores.
On a GPU similarity and full_size are measured. The exit status is 1 where a promise does not hold.
"""

import argparse
import os
import platform
import re
import sys
import time
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tests.benchmarks.measuring import CLOCKS, Plan, Row

PARTS = {
    "cpu": ("similarity", "mining", "drawing", "tuning", "orchestration", "records", "ray"),
    "cuda": ("similarity", "full_size"),
}
VERSIONS = ("torch", "diffusers", "peft", "prefect", "scikit-image", "pytorch-msssim")
HEADS = ("what", "measured", "against", "promised", "")
MARKS = {True: "met", False: "MISSED", None: ""}


def main(arguments: list[str]) -> int:
    """Measure, print, write."""
    known = {part for parts in PARTS.values() for part in parts}
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks")
    parser.add_argument("parts", nargs="*", metavar="PART", help=" | ".join(sorted(known)))
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, default=Path("reports/bench.md"))
    chosen = parser.parse_args(arguments)
    if unknown := set(chosen.parts) - known:
        parser.error(f"unknown part {', '.join(sorted(unknown))}; it is one of {', '.join(sorted(known))}")
    plan = Plan(chosen.clock, chosen.rounds, torch.device(chosen.device))
    rows: list[Row] = []
    for part in chosen.parts or PARTS[chosen.device]:
        started = time.perf_counter()
        rows += import_module(f"tests.benchmarks.{part}").rows(plan)
        print(f"{part}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        chosen.out.write_text(_markdown(rows, _conditions(plan)), encoding="utf-8")
    _show(rows, _conditions(plan))
    return int(any(row.holds is False for row in rows))


def _conditions(plan: Plan) -> str:
    device = _processor()
    if plan.device.type == "cuda":
        device = torch.cuda.get_device_name(plan.device)
    versions = ", ".join(f"{name} {_version(name)}" for name in VERSIONS)
    return (
        f"All ratios are from this one run, contenders in turn, best of {plan.rounds}; {plan.clock} time; {device}, "
        f"{torch.get_num_threads()} threads of {os.cpu_count()} cores; Python {platform.python_version()}, {versions}."
    )


def _processor() -> str:
    """The processor's name where the system tells it, else its kind."""
    told = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", told.read_text(), re.M) if told.exists() else []
    return names[0] if names else platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def _cells(row: Row) -> tuple[str, ...]:
    return row.what, row.figure, row.ratio, row.goal, MARKS[row.holds]


def _show(rows: list[Row], conditions: str) -> None:
    table = Table(*HEADS, caption=conditions)
    for row in rows:
        table.add_row(*map(Text, _cells(row)))
    Console().print(table)


def _markdown(rows: list[Row], conditions: str) -> str:
    lines = [HEADS, ("---", "---:", "---:", "---:", "---"), *map(_cells, rows)]
    return "\n".join(["| " + " | ".join(cells) + " |" for cells in lines] + ["", conditions, ""])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
