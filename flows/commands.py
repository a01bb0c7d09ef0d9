"""The commands beside running an experiment: DVC's stages, bringing back what was kept, deleting what nothing names."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from flows.cli import EXIT_FAILED, EXIT_USAGE, fail, known_errors
from flows.own_server import prefect_server
from flows.warm import await_turn, run_warm


def data(arguments: Sequence[str]) -> int:
    """``fscil data <dataset>``: describe a dataset for `dvc repro`."""
    from flows.reproduce import read_profile, write_data

    parser = argparse.ArgumentParser("fscil data", description="Write reports/data/<dataset>.json.")
    parser.add_argument("dataset", help="a name in configs/dataset")
    try:
        print(write_data(parser.parse_args(arguments).dataset, read_profile()))
    except known_errors() as error:
        return fail(error, EXIT_USAGE)
    return 0


def settings(arguments: Sequence[str]) -> int:
    """``fscil settings``: what each row of the profile reads."""
    from flows.reproduce import read_profile, write_settings

    argparse.ArgumentParser("fscil settings", description="Write reports/settings.").parse_args(arguments)
    try:
        print(f"{len(write_settings(read_profile()))} rows in reports/settings")
    except known_errors() as error:
        return fail(error, EXIT_USAGE)
    return 0


def cell(arguments: Sequence[str]) -> int:
    """``fscil cell <dataset> <method> <seed>``: one experiment of the profile."""
    if (code := run_warm(["cell", *arguments])) is not None:
        return code
    parser = argparse.ArgumentParser("fscil cell", description="Run one experiment of params.yaml.")
    parser.add_argument("dataset", help="a name in configs/dataset")
    parser.add_argument("method", help="a name in configs/method")
    parser.add_argument("seed", type=int)
    chosen = parser.parse_args(arguments)
    from flows.config import refuse_keys
    from flows.experiment import fscil
    from flows.reproduce import overrides_of, read_profile, write_cell

    try:
        overrides = overrides_of(read_profile())
        refuse_keys(overrides)
        with prefect_server():
            record = fscil(chosen.dataset, chosen.method, chosen.seed, overrides)
        await_turn()
        print(write_cell(record))
    except known_errors() as error:
        return fail(error, EXIT_FAILED)
    return 0


def profile(arguments: Sequence[str]) -> int:
    """``fscil profile <name>``: choose what `dvc repro` runs."""
    from flows.reproduce import choose_profile

    parser = argparse.ArgumentParser("fscil profile", description="Choose what `dvc repro` runs.")
    parser.add_argument("name", help="one of configs/profile: miniature or paper")
    try:
        chosen = choose_profile(parser.parse_args(arguments).name)
    except known_errors() as error:
        return fail(error, EXIT_USAGE)
    rows = len(chosen.datasets) * len(chosen.methods) * len(chosen.seeds)
    print(f"params.yaml is the profile {chosen.profile}: {rows} experiments; run them with `dvc repro`")
    return 0


def restore(arguments: Sequence[str]) -> int:
    """``fscil restore <run | path | digest>``: bring back what DVC keeps."""
    from flows.restore import restore as bring_back

    parser = argparse.ArgumentParser("fscil restore", description="Bring back a kept run or a part of it.")
    parser.add_argument(
        "what", help="digits/guided/seed-0, a path such as runs/.../session-01/epoch-002, or a digest"
    )
    parser.add_argument("--to", type=Path, default=None, help="another folder; where it was by default")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="results folder, runs by default")
    chosen = parser.parse_args(arguments)
    try:
        print(bring_back(chosen.what, chosen.runs, chosen.to).sentence())
    except known_errors() as error:
        return fail(error, EXIT_FAILED)
    return 0


def gc(arguments: Sequence[str]) -> int:
    """``fscil gc``: show what nothing names any more; with ``--delete``, delete it."""
    from flows.garbage import collect_garbage, garbage, nothing_running

    parser = argparse.ArgumentParser("fscil gc", description="Show what nothing names any more.")
    parser.add_argument("--delete", action="store_true", help="delete what is shown")
    parser.add_argument("--days", type=float, default=7, help="spare what is younger, 7 by default")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="results folder, runs by default")
    parser.add_argument("--state", type=Path, default=Path(".fscil"), help="state folder, .fscil by default")
    chosen = parser.parse_args(arguments)
    try:
        with nothing_running(chosen.state):
            found = garbage(chosen.runs, chosen.state, chosen.days)
            print("\n".join(found.lines()), flush=True)
            if chosen.delete:
                collect_garbage(found, chosen.runs, chosen.state)
        print("deleted" if chosen.delete else "nothing was deleted; add --delete to do so")
    except known_errors() as error:
        return fail(error, EXIT_FAILED)
    return 0


def track(arguments: Sequence[str]) -> int:
    """``fscil track``: write MLflow again from the records; exit code 1 where a run was another process'."""
    from flows.config import load_config
    from flows.track import BUSY
    from flows.track import track as write

    parser = argparse.ArgumentParser("fscil track", description="Write MLflow again from the records.")
    parser.add_argument(
        "keys", nargs="*", help="runs such as digits/guided/seed-0 (all by default), tracking.uri=..."
    )
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="results folder, runs by default")
    parser.add_argument("--state", type=Path, default=Path(".fscil"), help="state folder, .fscil by default")
    chosen = parser.parse_args(arguments)
    try:
        settings = load_config([key for key in chosen.keys if "=" in key]).tracking
        keys = [key for key in chosen.keys if "=" not in key]
        busy = False
        for told in write(chosen.runs, chosen.state, settings, keys):
            print(told.sentence(), flush=True)
            busy |= told.status == BUSY
    except known_errors() as error:
        return fail(error, EXIT_FAILED)
    return EXIT_FAILED if busy else 0
