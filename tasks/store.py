"""Sealing: a stage's output is written once, whole, and found again by what it was made from.

State lives below one root (``.fscil``), ignored by git and DVC:

    stages/<stage>/<fingerprint>/           a sealed stage: its files, timing.json, record.json
    stages/<stage>/<fingerprint>.partial/   work in progress; kept after a kill so that shards survive
    locks/  vlm/  runs/                     file locks, VLM answers, provenance

A stage computes in its ``.partial`` folder; its record is written last, everything is synced and the
folder renamed, so presence means complete. Nothing sealed is written again. The fingerprint is a
sha256 of stage, version, the settings that the stage reads, its input digests and its seed; device,
workers and paths stay out, so the same work is the same folder whichever run asks for it.
"""

import hashlib
import json
import logging
import math
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from filelock import FileLock
from pydantic import BaseModel

from tasks.memory import PeakMemory
from tasks.records import ArtifactKind, ArtifactRef, Digest, Frozen, Output, StageRecord
from tasks.whereabouts import inside

log = logging.getLogger("fscil.store")

Row = TypeVar("Row", bound=BaseModel)


class StoreError(RuntimeError):
    """Something sealed is missing, damaged or held by another process; the message names it."""


# ------------------------------------------------------------------------------------------ digests


def digest_of(path: Path) -> Digest:
    """DVC's content id of a file (md5) or a folder (md5 of its listing, then ``.dir``).

    Raises:
        StoreError: the path does not exist, or the folder is empty.
    """
    if path.is_dir():
        listing = [
            {"md5": _md5(file), "relpath": file.relative_to(path).as_posix()} for file in _files_below(path)
        ]
        if not listing:
            raise StoreError(f"{path} is an empty folder and has no digest")
        return directory_object(listing)[0]
    if not path.is_file():
        raise StoreError(f"{path} does not exist")
    return Digest(_md5(path))


def directory_object(entries: Iterable[Mapping[str, str]]) -> tuple[Digest, str]:
    """DVC's object for a folder: its digest, and the listing of ``md5`` and ``relpath`` that the digest is of."""
    text = json.dumps(sorted(entries, key=lambda entry: entry["relpath"]), sort_keys=True)
    return Digest(hashlib.md5(text.encode(), usedforsecurity=False).hexdigest() + ".dir"), text


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _files_below(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


# ------------------------------------------------------------------------------------------ fingerprints


def canonical(value: object) -> object:
    """Reduce a value to what JSON writes the same way twice.

    Raises:
        ValueError: a value that has no single spelling (a set, a path, NaN, an object).
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{value!r} cannot be part of a fingerprint: it is not finite")
        return value
    if isinstance(value, BaseModel):
        return canonical(value.model_dump())
    if isinstance(value, Mapping):
        return {str(key): canonical(value[key]) for key in sorted(value, key=str)}
    if isinstance(value, list | tuple):
        return [canonical(item) for item in value]
    raise ValueError(f"{value!r} of {type(value).__name__} cannot be part of a fingerprint")


def fingerprint(
    stage: str, version: int, settings: Mapping[str, object], inputs: Mapping[str, Digest | None], seed: int
) -> str:
    """The identity of a stage's work: 64 hexadecimal digits of sha256."""
    identity = {"stage": stage, "version": version, "settings": settings, "inputs": inputs, "seed": seed}
    text = json.dumps(canonical(identity), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


# ------------------------------------------------------------------------------------------ atomic files


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a whole file or nothing: temporary sibling, fsync, rename, fsync of the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    data = content.encode() if isinstance(content, str) else content
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def clear_leftovers(paths: Iterable[Path]) -> None:
    """Remove, of some temporaries, those that no living process of this machine is writing."""
    for path in list(paths):
        owner = re.search(r"\.(\d+)(\.\d+)?\.tmp$", path.name)
        if owner is None or not _lives(int(owner[1])):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # somebody else's
    return True


def write_json(path: Path, value: BaseModel | Mapping[str, object]) -> None:
    """Write a model or mapping as indented JSON with a final newline, atomically."""
    plain = value.model_dump(mode="json") if isinstance(value, BaseModel) else canonical(value)
    write_atomic(path, json.dumps(plain, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict[str, object]:
    """Read a JSON object.

    Raises:
        StoreError: missing, not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise StoreError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise StoreError(f"{path} does not hold a JSON object")
    return value


def write_lines(path: Path, rows: Iterable[BaseModel]) -> None:
    """Write models as JSON lines, atomically."""
    write_atomic(path, "".join(row.model_dump_json() + "\n" for row in rows))


def read_lines(path: Path, kind: type[Row]) -> list[Row]:
    """Read JSON lines back into models.

    Raises:
        StoreError: the file is missing or a line does not parse; the message names file and line.
    """
    try:
        lines = path.read_bytes().removesuffix(b"\n").split(b"\n")
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror}") from error
    rows: list[Row] = []
    for number, line in enumerate(lines if lines != [b""] else [], start=1):
        try:
            rows.append(kind.model_validate_json(line))
        except ValueError as error:
            raise StoreError(f"{path}, line {number}, is not a {kind.__name__}: {error}") from error
    return rows


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_tree(folder: Path) -> None:
    for file in _files_below(folder):
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    for sub in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        _sync_folder(sub)


# ------------------------------------------------------------------------------------------ the store


class Timing(Frozen):
    """How long a stage took, when it ended and where, and the memory it held; beside the record, never inside it."""

    seconds: float
    finished: str
    host: str
    peak_mib: float | None = None
    gpu_peak_mib: float | None = None

    @property
    def timestamp_ms(self) -> int:
        """The end of the stage in milliseconds since 1970."""
        return int(datetime.fromisoformat(self.finished).timestamp() * 1000)


class StageFolder:
    """The folder that a stage computes in, and the references to what it writes there."""

    def __init__(self, path: Path, prefix: str) -> None:
        """Args: path: where to write; prefix: ``<stage>/<fingerprint>`` of the references."""
        self.path = path
        self._prefix = prefix

    def ref(self, name: str, kind: ArtifactKind) -> ArtifactRef:
        """Reference to a file or folder that the stage has written, with its digest."""
        return ArtifactRef(path=f"{self._prefix}/{name}", digest=digest_of(self.path / name), kind=kind)


class Store:
    """Sealed stages below a root, plus run folders attached as further places to find them."""

    def __init__(self, root: Path) -> None:
        """Args: root: the state folder, made when first written to."""
        self.root = root
        self._attached: dict[str, Path] = {}

    def run(
        self,
        stage: str,
        version: int,
        *,
        settings: Mapping[str, object],
        inputs: Mapping[str, Digest | None],
        seed: int,
        output: type[Output],
        compute: Callable[[StageFolder], Output],
        keep_partial: bool = False,
    ) -> StageRecord[Output]:
        """Return the sealed record of this work, computing and sealing it first if need be.

        Args:
            stage: the stage's name.
            version: raised by hand whenever the stage's code changes its result.
            settings: only what this stage reads.
            inputs: digests of what it reads, by name.
            seed: where its randomness starts.
            output: the type of the record's output.
            compute: does the work in the folder it is given.
            keep_partial: a killed attempt's folder is handed to the next one (for stages with shards).

        Raises:
            StoreError: a damaged record that cannot be moved aside, or a failing disk.
        """
        mark = fingerprint(stage, version, settings, inputs, seed)
        with self.lock(f"{stage}-{mark}"):
            sealed = self._sealed(stage, mark, output)
            if sealed is not None:
                return sealed
            work = self.root / "stages" / stage / f"{mark}.partial"
            if work.exists() and not keep_partial:
                shutil.rmtree(work)
            work.mkdir(parents=True, exist_ok=True)
            for leftover in work.rglob(".*.tmp"):
                leftover.unlink()
            began, memory = time.monotonic(), PeakMemory()
            with inside(stage):
                result = compute(StageFolder(work, f"{stage}/{mark}"))
            record: StageRecord[Output] = _record_type(output)(
                stage=stage,
                version=version,
                fingerprint=mark,
                settings=canonical(settings),
                inputs=inputs,
                seed=seed,
                output=result,
            )
            self._seal(work, record, time.monotonic() - began, memory)
            return record

    def locate(self, ref: ArtifactRef) -> Path:
        """Where a reference's file or folder is: in the state, or in an attached run folder.

        Raises:
            StoreError: it is in neither.
        """
        path = self.root / "stages" / ref.path
        if path.exists():
            return path
        stage, mark, name = ref.path.split("/", 2)
        if (folder := self._attached.get(f"{stage}/{mark}")) is not None and (folder / name).exists():
            return folder / name
        raise StoreError(f"{ref.kind} {ref.path} is not in {self.root} nor in an attached run folder")

    def attach(self, record: StageRecord, folder: Path) -> None:
        """Let references of a sealed stage be found in an exported epoch folder too."""
        self._attached[f"{record.stage}/{record.fingerprint}"] = folder

    def timing(self, record: StageRecord) -> Timing | None:
        """How long the stage took, if this machine's state still knows."""
        path = self.root / "stages" / record.stage / record.fingerprint / "timing.json"
        return Timing.model_validate_json(path.read_text()) if path.is_file() else None

    def _sealed(self, stage: str, mark: str, output: type[Output]) -> StageRecord[Output] | None:
        folder = self.root / "stages" / stage / mark
        if not folder.exists():
            return None
        try:
            record: StageRecord[Output] = _record_type(output).model_validate_json(
                (folder / "record.json").read_text("utf-8")
            )
            self.verify(artifacts_of(record.output))
        except (OSError, ValueError, StoreError) as error:
            aside = folder.with_name(f"{mark}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
            log.warning(
                "sealed stage %s/%s is damaged (%s); moved aside and computed anew", stage, mark, error
            )
            return None
        return record

    def verify(self, refs: Iterable[ArtifactRef]) -> None:
        """Check that each artifact is there and is the content its reference names.

        Raises:
            StoreError: one is missing or has other content.
        """
        for ref in refs:
            found = digest_of(self.locate(ref))
            if found != ref.digest:
                raise StoreError(f"{ref.path} has digest {found}, its record says {ref.digest}")

    def _seal(self, work: Path, record: StageRecord, seconds: float, memory: PeakMemory) -> None:
        timing = Timing(
            seconds=round(seconds, 3),
            finished=datetime.now(UTC).isoformat(),
            host=socket.gethostname(),
            peak_mib=memory.mib,
            gpu_peak_mib=memory.gpu_mib,
        )
        write_json(work / "timing.json", timing)
        write_json(work / "record.json", record)
        _sync_tree(work)
        final = work.with_name(record.fingerprint)
        work.rename(final)
        _sync_folder(final.parent)

    def _lock_path(self, name: str) -> Path:
        folder = self.root / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.lock"

    def lock(self, name: str) -> FileLock:
        """A lock that those who share this store wait for; the kernel frees it when its holder dies."""
        return FileLock(self._lock_path(name))

    def run_lock(self, key: str) -> FileLock:
        """The lock of one run key; the kernel frees it when its holder dies."""
        return FileLock(self._lock_path(f"run-{key}"), timeout=0)


def _record_type(output: type[Output]) -> type[StageRecord[Output]]:
    return StageRecord[output]  # type: ignore[valid-type]


def artifacts_of(value: object) -> Iterator[ArtifactRef]:
    """Every reference inside a model, mapping or sequence."""
    if isinstance(value, ArtifactRef):
        yield value
    elif isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from artifacts_of(getattr(value, name))
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from artifacts_of(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from artifacts_of(item)


# ------------------------------------------------------------------------------------------ results


def export(store: Store, refs: Iterable[ArtifactRef], record: BaseModel, folder: Path) -> None:
    """Hard-link sealed artifacts into a results folder, record last, whole or not at all.

    A folder that already holds the same record is left alone.
    """
    text = json.dumps(record.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n"
    existing = folder / "record.json"
    if existing.is_file() and existing.read_text("utf-8") == text:
        return
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for ref in refs:
        link(store.locate(ref), temporary / ref.name)
    write_atomic(temporary / "record.json", text)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    _sync_folder(folder.parent)


def link(source: Path, target: Path) -> None:
    """Second names for a file, or for every file of a folder; copies where the file system has none.

    What is there already stays.
    """
    if source.is_dir():
        for file in _files_below(source):
            link(file, target / file.relative_to(source))
        return
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copy2(source, target)
