"""The command line: ``fscil`` and ``python -m flows``.

    fscil dataset=digits method=guided seed=0 [any Hydra override ...]
    fscil dataset=digits method=finetune,fixed_sd,guided seed=0,1,2      every combination, one after another
    fscil replay runs/digits/guided/seed-0/session-00/epoch-000          run an epoch's stages again and compare
          [--stages mine,compare] [--json]; or a run or MLflow run id with --session 0 --epoch 0|initial|test
    fscil trace runs/.../images/one/001-0000.png [--json]                where an image or adapter comes from; also an
                                                                         image id, a digest, digits/guided/A_last
    fscil report [runs [reports [.fscil]]]                               tables, plot data and the report page
    fscil study [--runs runs] [--out reports] [--state .fscil]           what the method does, measured on sealed runs
    fscil windows [generator=... windows=... any Hydra override ...]     which denoising step settles what
    fscil learners                                                       what each learner is, as Markdown (docs/learners.md)
    fscil profile <name>                                                 what `dvc repro` runs: miniature or paper
    fscil data | settings | cell ...                                     the stages of dvc.yaml
    fscil restore <run | path | digest> [--to folder]                    bring back what DVC keeps of a run
    fscil track [run ...] [tracking.uri=...]                             write MLflow again from the records
    fscil gc [--delete] [--days 7]                                       what no run names any more; shown before it goes
    fscil up [--prefect-port 4200] [--mlflow-port 5000] [--runs 1]       Prefect server, worker, MLflow UI, deployments
          [--host 127.0.0.1]
    fscil down                                                           end them

Exit codes: 0 done; 1 a run failed or a replay differs; 2 the command or a setting is wrong; 130 interrupted (Ctrl-C);
143 terminated (SIGTERM).
"""

import argparse
import itertools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from flows.cli import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_TERMINATED,
    EXIT_USAGE,
    Terminated,
    console,
    fail,
    known_errors,
    quieten,
    speak_plainly,
    terminable,
)
from flows.commands import cell, data, gc, profile, restore, settings, track
from flows.interrupts import interrupts_first
from flows.own_server import prefect_server, prefect_url

SWEPT = ("dataset", "method", "seed")


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, run what it says, return the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    speak_plainly()
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(__doc__)
        return 0 if arguments else EXIT_USAGE
    try:
        quieten("CRITICAL" if arguments[0] == "replay" else "WARNING")  # what a replay finds is its output
    except OSError as error:
        return fail(error, EXIT_USAGE)
    commands = {"replay": _replay, "trace": _trace, "report": _report, "study": _study, "windows": _windows}
    commands |= {"learners": _learners, "up": _up, "down": _down}
    commands |= {"data": data, "settings": settings, "cell": cell, "profile": profile}
    commands |= {"restore": restore, "gc": gc, "track": track}
    try:
        with terminable(), interrupts_first():
            return commands[arguments[0]](arguments[1:]) if arguments[0] in commands else _run(arguments)
    except BrokenPipeError:  # who reads has seen enough, as `| head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt as stop:
        ended = isinstance(stop, Terminated)
        said = "terminated" if ended else "interrupted"
        console.print(f"{said}; nothing sealed is lost - the same command goes on from here")
        return EXIT_TERMINATED if ended else EXIT_INTERRUPTED


def expand(arguments: Sequence[str]) -> list[list[str]]:
    """Every combination of comma-separated datasets, methods and seeds, other overrides kept.

    Raises:
        ValueError: an argument that is not ``name=value``.
    """
    axes = []
    for argument in arguments:
        name, sign, value = argument.partition("=")
        if not sign:
            raise ValueError(
                f"{argument!r} is neither a command nor an override name=value; see fscil --help"
            )
        axes.append([f"{name}={one}" for one in value.split(",")] if name in SWEPT else [argument])
    return [list(combination) for combination in itertools.product(*axes)]


def _run(arguments: Sequence[str]) -> int:
    from flows.config import ConfigError, load_config

    try:
        combinations = expand(arguments)
        configs = [load_config(combination) for combination in combinations]
    except (ConfigError, ValueError) as error:
        return fail(error, EXIT_USAGE)
    from flows.experiment import RunInProgress, fscil, preflight
    from flows.report import print_table

    try:
        prefect_url()
        for config in configs:
            preflight(config)
    except RunInProgress as error:
        return fail(error, EXIT_FAILED)
    except known_errors() as error:
        return fail(error, EXIT_USAGE)
    records = []
    try:
        with prefect_server():
            for combination, config in zip(combinations, configs, strict=True):
                chosen = dict(item.split("=", 1) for item in combination if item.partition("=")[0] in SWEPT)
                rest = [item for item in combination if item.partition("=")[0] not in SWEPT]
                console.rule(f"{config.dataset.name} · {config.method} · seed {config.seed}")
                records.append(fscil(chosen.get("dataset", "digits"), config.method, config.seed, rest))
    except known_errors() as error:
        return fail(error, EXIT_FAILED)
    print_table(records, config.runtime.runs, config.runtime.state)
    return 0


def _replay(arguments: Sequence[str]) -> int:
    from flows.config import refuse_keys
    from flows.replay import lines, replay_report

    parser = argparse.ArgumentParser("fscil replay", description="Run sealed stages again and compare.")
    parser.add_argument("what", help="an epoch's folder, or a run: folder, key or MLflow run id")
    parser.add_argument("--session", type=int, help="of a run")
    parser.add_argument("--epoch", help="of a run: its number, initial or test")
    parser.add_argument("--stages", default="all", help="such as mine,compare; all that ran by default")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("places", nargs="*", help="where things are here, such as dataset.root=data/digits")
    given = parser.parse_intermixed_args(arguments)
    try:
        refuse_keys([given.what, *given.places])
        with prefect_server():
            report = replay_report(given.what, given.session, given.epoch, given.stages, given.places)
    except known_errors() as error:
        return fail(error, EXIT_USAGE)
    print(report.model_dump_json(indent=1) if given.json else "\n".join(lines(report)))
    return 0 if report.equal else EXIT_FAILED


def _trace(arguments: Sequence[str]) -> int:
    from rich.console import Console

    from flows.trace import trace
    from flows.trace_text import lines, nodes, tree
    from tasks.store import StoreError

    parser = argparse.ArgumentParser(
        "fscil trace", description="From an image or a number back to what made it."
    )
    parser.add_argument("what", help="a file of a run, an image id, a digest, or dataset/method/column")
    parser.add_argument("--json", action="store_true", help="print it as JSON (flows/trace_shape.py)")
    for name, place in (("runs", "runs"), ("state", ".fscil")):
        parser.add_argument(f"--{name}", type=Path, default=Path(place), help=f"folder, {place} by default")
    given = parser.parse_args(arguments)
    try:
        found = trace(given.what, given.runs, given.state)
    except (ValueError, StoreError, OSError) as error:
        return fail(error, EXIT_USAGE)
    if given.json:
        print(found.model_dump_json(indent=1))
    elif (shown := Console()).is_terminal:
        shown.print(tree(nodes(found)))
    else:
        print("\n".join(lines(nodes(found))))
    return 0


def _report(arguments: Sequence[str]) -> int:
    from flows.report import build

    if len(arguments) > 3:
        return fail(
            ValueError("report takes up to three folders: fscil report [runs [reports [.fscil]]]"), EXIT_USAGE
        )
    runs, out, state = (Path(name) for name in (*arguments, *("runs", "reports", ".fscil")[len(arguments) :]))

    def written() -> list[Path]:
        if "DVC_STAGE" in os.environ:
            from flows.reproduce import read_profile, refuse_other_runs

            refuse_other_runs(read_profile(), runs, out)
        return build(runs, out, state)

    return _written(written)


def _study(arguments: Sequence[str]) -> int:
    from flows.study import build_study

    parser = argparse.ArgumentParser(
        "fscil study", description="Measure sealed runs; writes study.md and more."
    )
    for name, place in (("runs", "runs"), ("out", "reports"), ("state", ".fscil")):
        parser.add_argument(f"--{name}", type=Path, default=Path(place), help=f"folder, {place} by default")
    parser.add_argument(
        "--examples",
        type=int,
        default=40,
        help="how many are redrawn at most at each tuning and level, 40 by default",
    )
    parser.add_argument(
        "overrides", nargs="*", help="settings of the swapped prompts, such as windows.images=2"
    )
    chosen = parser.parse_args(arguments)
    if chosen.examples < 1:
        parser.error(f"--examples {chosen.examples}: give at least 1")
    return _written(
        lambda: build_study(chosen.runs, chosen.out, chosen.state, chosen.examples, chosen.overrides)
    )


def _windows(arguments: Sequence[str]) -> int:
    from flows.config import load_windows
    from flows.windows import write_windows

    return _written(lambda: write_windows(load_windows(arguments), Path("reports")))


def _learners(arguments: Sequence[str]) -> int:
    from flows.learners_page import learners_page

    argparse.ArgumentParser("fscil learners", description="Print docs/learners.md.").parse_args(arguments)
    print(learners_page(), end="")
    return 0


def _up(arguments: Sequence[str]) -> int:
    from flows.services import HOST, ServiceError, up

    parser = argparse.ArgumentParser(
        "fscil up", description="Start the server, a worker and the MLflow UI here."
    )
    for name, number, what in (
        ("prefect-port", 4200, "of the Prefect server"),
        ("mlflow-port", 5000, "of the MLflow UI"),
        ("runs", 1, "flow runs at once; the others wait"),
    ):
        parser.add_argument(f"--{name}", type=int, default=number, help=f"{what}, {number} by default")
    parser.add_argument("--host", default=HOST, help=f"address that the servers listen on, {HOST} by default")
    chosen = parser.parse_args(arguments)
    try:
        lines = up(chosen.prefect_port, chosen.mlflow_port, chosen.runs, chosen.host)
    except (ValueError, ServiceError) as error:
        return fail(error, EXIT_USAGE if isinstance(error, ValueError) else EXIT_FAILED)
    print("\n".join(lines))
    return 0


def _down(arguments: Sequence[str]) -> int:
    from flows.services import down

    argparse.ArgumentParser("fscil down", description="End what `fscil up` started.").parse_args(arguments)
    print(f"ended: {', '.join(down()) or 'nothing was running'}")
    return 0


def _written(write: Callable[[], list[Path]]) -> int:
    """Print which files were written, or why none could be."""
    try:
        paths = write()
    except known_errors() as error:
        return fail(error, EXIT_USAGE)
    for path in paths:
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
