"""`make bench`: what the project promises to be faster than, measured in one run.

    python -m tests.benchmarks [PART ...] [--clock wall|cpu] [--rounds N] [--device cpu|cuda] [--out FILE]

Prints one table and writes it as Markdown. PART is similarity, mining, drawing, tuning or orchestration; all by
default. On a GPU only similarity is measured. The exit status is 1 where a promise does not hold.
"""

import argparse
import platform
import sys
from importlib import import_module
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from tests.benchmarks.measuring import CLOCKS, Plan, Row

PARTS = ("similarity", "mining", "drawing", "tuning", "orchestration")
HEADS = ("what", "measured", "ratio", "promised", "")
MARKS = {True: "ok", False: "MISSED", None: ""}


def main(arguments: list[str]) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks")
    parser.add_argument("parts", nargs="*", metavar="PART", help=" | ".join(PARTS))
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, default=Path("reports/bench.md"))
    chosen = parser.parse_args(arguments)
    if unknown := set(chosen.parts) - set(PARTS):
        parser.error(f"unknown part {', '.join(sorted(unknown))}; it is one of {', '.join(PARTS)}")
    plan = Plan(chosen.clock, chosen.rounds, torch.device(chosen.device))
    parts = chosen.parts or (PARTS if chosen.device == "cpu" else PARTS[:1])
    rows = [row for part in parts for row in import_module(f"tests.benchmarks.{part}").rows(plan)]
    _show(rows, _conditions(plan))
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.write_text(_markdown(rows, _conditions(plan)), encoding="utf-8")
    return int(any(row.holds is False for row in rows))


def _conditions(plan: Plan) -> str:
    device = platform.machine()
    if plan.device.type == "cuda":
        device = torch.cuda.get_device_name(plan.device)
    return (
        f"All ratios are from this one run, contenders in turn, best of {plan.rounds}; {plan.clock} time; "
        f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}."
    )


def _cells(row: Row) -> tuple[str, ...]:
    return row.what, row.figure, row.ratio, row.goal, MARKS[row.holds]


def _show(rows: list[Row], conditions: str) -> None:
    table = Table(*HEADS, caption=conditions)
    for row in rows:
        table.add_row(*_cells(row))
    Console().print(table)


def _markdown(rows: list[Row], conditions: str) -> str:
    lines = [HEADS, ("---", "---:", "---:", "---:", "---"), *map(_cells, rows)]
    return "\n".join(["| " + " | ".join(cells) + " |" for cells in lines] + ["", conditions, ""])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
