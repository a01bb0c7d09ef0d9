"""What the stages of dvc.yaml run: `fscil data`, `fscil settings` and `fscil cell`, by what params.yaml names.

params.yaml is one of configs/profile/, or a change of it. Each experiment of its matrix is one stage, which depends
on what it reads alone: the description of its data, its own settings as Hydra composes them without the groups that
the method never looks at, and the code. So DVC knows what a change concerns without running anything.
"""

import hashlib
import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from flows.config import CONFIGS, PROJECT, ConfigError, ExperimentConfig, choices, load_config
from flows.lineage import read_record
from tasks.datasets.benchmark import build_benchmark
from tasks.datasets.digits import write_digits
from tasks.records import ExperimentRecord, Frozen
from tasks.store import digest_of, read_json, write_json
from tasks.versions import Versions

PARAMS = PROJECT / "params.yaml"
REPORTS = Path("reports")
LOCK = Path("dvc.lock")

Cell = tuple[str, str, int]
"""An experiment of the profile: data set, method, seed."""


class Profile(Frozen):
    """What ``dvc repro`` runs: every dataset with every method and seed, under the same overrides.

    Attributes:
        at_once: experiments that are under way at a time, each with its share of the processor's threads.
    """

    profile: str
    datasets: tuple[str, ...] = Field(min_length=1)
    methods: tuple[str, ...] = Field(min_length=1)
    seeds: tuple[int, ...] = Field(min_length=1)
    overrides: tuple[str, ...]
    at_once: int = Field(1, ge=1)


def read_profile(path: Path = PARAMS) -> Profile:
    """Read params.yaml.

    Raises:
        ConfigError: it is missing or says something else.
    """
    try:
        return Profile.model_validate(yaml.safe_load(path.read_text("utf-8")))
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"{path} is no profile ({error}); take one of configs/profile: make profile PROFILE=miniature"
        ) from error


def choose_profile(name: str, target: Path = PARAMS) -> Profile:
    """Make a profile of configs/profile the one that ``dvc repro`` runs.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in choices("profile"):
        raise ConfigError(f"profile {name!r} is unknown; it is one of {', '.join(choices('profile'))}")
    shutil.copyfile(CONFIGS / "profile" / f"{name}.yaml", target)
    return read_profile(target)


def overrides_of(profile: Profile) -> list[str]:
    """Those of an experiment within ``dvc repro``: a run of other settings in its folder makes way."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = [f"runtime.threads={max(1, cores // profile.at_once)}"] if profile.at_once > 1 else []
    return [*share, *profile.overrides, "runtime.replace=true"]


# ------------------------------------------------------------------------------------------ the stages


def write_data(dataset: str, profile: Profile, out: Path = REPORTS) -> Path:
    """Describe a dataset: its sessions, how many images, and one digest of every image's content and place.

    The digits are written first where they are missing; other datasets need `make data`.

    Raises:
        ValueError: data that are missing or do not fit.
    """
    config = load_config([*profile.overrides, f"dataset={dataset}"])
    root = Path(config.dataset.root)
    if config.dataset.name == "digits":
        write_digits(root)
        if (versions := Versions.around(root)) is not None:
            versions.copy_in(root.parent)  # so that `dvc push` finds what data.dvc names
    benchmark = build_benchmark(config.dataset, cache=config.runtime.state / "datasets")
    described = {
        "dataset": benchmark.dataset,
        "split_rule": benchmark.split_rule,
        "classes": len(benchmark.class_names),
        "digest": benchmark.digest,
        "sessions": [
            {"session": s.index, "train": len(s.train), "val": len(s.val), "test": len(s.test)}
            for s in benchmark.sessions
        ],
    }
    target = out / "data" / f"{dataset}.json"
    write_json(target, described)
    return target


def write_settings(profile: Profile, out: Path = REPORTS) -> list[Path]:
    """The settings that each row reads, one file for each dataset and method; files of other rows go."""
    shutil.rmtree(out / "settings", ignore_errors=True)
    written = []
    for dataset in profile.datasets:
        for method in profile.methods:
            config = load_config([*profile.overrides, f"dataset={dataset}", f"method={method}"])
            target = out / "settings" / dataset / f"{method}.json"
            write_json(target, settings_read(config))
            written.append(target)
    return written


def settings_read(config: ExperimentConfig) -> Mapping[str, Any]:
    """What makes a run's result, without the seed and without the groups that its method never looks at."""
    augmenter = config.augmenter
    tunes = augmenter.tuning != "none"
    unread = {
        "classifier": True,  # part of the learner already
        "generator": not augmenter.draws,
        "images_api": not augmenter.draws,
        "vlm": not config.asks_vlm,
        "mining": not augmenter.learns,
        "tuning": not tunes,
        "stopping": config.zero_shot,
        "seed": True,
    }
    return {key: value for key, value in config.identity.items() if not unread.get(key)}


def cell_file(dataset: str, method: str, seed: int, out: Path = REPORTS) -> Path:
    """Where :func:`write_cell` writes."""
    return out / "cells" / dataset / method / f"seed-{seed}.json"


def write_cell(record: ExperimentRecord, out: Path = REPORTS) -> Path:
    """What one experiment came to: accuracies in percent, what was spent, and which record says so."""
    last = record.sessions[-1]
    accuracies = {
        "A_base": record.a_base,
        "A_last": record.a_last,
        "A_avg": record.a_avg,
        "novel": last.novel,
        "harmonic": last.harmonic,
    }
    rounded: dict[str, float | None] = {
        name: None if value is None else round(100 * value, 2) for name, value in accuracies.items()
    }
    spent: dict[str, float | None] = {
        "images": record.images_drawn,
        "vlm_calls": record.usage.calls,
        "vlm_tokens": record.usage.tokens,
        "epochs": record.epochs,
    }
    target = cell_file(record.dataset, record.method, record.seed, out)
    write_json(target, {**rounded, **spent, "record": _name_of(record)})
    return target


def refuse_other_runs(profile: Profile, runs: Path, out: Path = REPORTS) -> None:
    """Refuse to make tables of runs that are not those which `dvc repro` ran: another command took their place since.

    Raises:
        ConfigError: names them and what to do.
    """
    others = []
    for dataset, method, seed in product(profile.datasets, profile.methods, profile.seeds):
        if (told := cell_file(dataset, method, seed, out)).is_file():
            file = runs / dataset / method / f"seed-{seed}" / "experiment.json"
            found = _name_of(read_record(file, ExperimentRecord)) if file.is_file() else None
            if found != read_json(told).get("record"):
                others.append((dataset, method, seed))
    if others:
        shown = [f"{runs}/{dataset}/{method}/seed-{seed}" for dataset, method, seed in others[:3]]
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        remedy = " ".join("experiment@" + "-".join(map(str, cell)) for cell in others[:3])
        raise ConfigError(
            f"{', '.join(shown)}{more}: not what `dvc repro` ran, or gone; have it run again, which goes on from what "
            f"is sealed: dvc repro --single-item --force {remedy}{' ...' if more else ''}"
        )


def _name_of(record: ExperimentRecord) -> str:
    return hashlib.md5(record.model_dump_json().encode(), usedforsecurity=False).hexdigest()


# ------------------------------------------------------------------------------------------ what DVC is about to do


def will_run(cell: Cell, ran: Iterable[Cell], out: Path = REPORTS, lock: Path = LOCK) -> bool:
    """Whether `dvc repro` is going to run an experiment, as far as can be told without reading all that it depends on.

    Args:
        cell: the experiment.
        ran: those that it has run already; what dvc.lock says of their dependencies is so now.
        out: where reports are.
        lock: dvc.lock.
    """
    if not cell_file(*cell, out).exists():
        return True
    stages = _locked(lock, lock.stat().st_mtime_ns) if lock.is_file() else {}
    now = {path: digest for one in ran for path, digest in stages.get(one, {}).items()}
    for file in (out / "data" / f"{cell[0]}.json", out / "settings" / cell[0] / f"{cell[1]}.json"):
        if file.is_file():
            now[file.as_posix()] = digest_of(file)
    known = stages.get(cell)
    return known is None or any(now.get(path, digest) != digest for path, digest in known.items())


@lru_cache(maxsize=1)
def _locked(lock: Path, _changed: int) -> dict[Cell, dict[str, str]]:
    """What each experiment depended on when it was run: digests by path."""
    with suppress(OSError, yaml.YAMLError, ValueError, LookupError, TypeError):
        stages = yaml.safe_load(lock.read_text("utf-8"))["stages"].values()
        commands = [(stage["cmd"].split(), stage.get("deps", ())) for stage in stages]
        return {
            (words[4], words[5], int(words[6])): {dep["path"]: dep["md5"] for dep in deps}
            for words, deps in commands
            if words[:4] == ["python", "-m", "flows", "cell"]
        }
    return {}
