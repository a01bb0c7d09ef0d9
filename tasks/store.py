"""Sealing: a stage's output is written once, whole, and found again by what it was made from.

State lives below one root (``.fscil``), ignored by git and DVC:

    stages/<stage>/<fingerprint>/           a sealed stage: its files, timing.json, record.json
    stages/<stage>/<fingerprint>.partial/   work in progress; kept after a kill so that shards survive
    locks/  vlm/  runs/                     file locks, VLM answers, provenance
    tmp/                                    folders that blocks of running processes work in, each beside its lock

A stage computes in its ``.partial`` folder; its record is written last, everything is synced and the
folder renamed, so presence means complete. A ``.partial`` with a record lacks only its name and is given it.
Nothing sealed is written again. The fingerprint is a
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
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from filelock import Timeout
from pydantic import BaseModel

from tasks.disk import Lock, writing
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
    """Write a whole file or nothing: temporary sibling, fsync, rename, fsync of the folder.

    Raises:
        DiskError: the disk is full, fails or is read-only, or a file is where a folder should be.
    """
    data = content.encode() if isinstance(content, str) else content
    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder(path.parent)


def remove(path: Path) -> None:
    """Delete a file, a folder with all in it, or a link; never what a link points to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def clear_leftovers(paths: Iterable[Path]) -> None:
    """Remove, of some temporaries, those that no living process of this machine is writing."""
    for path in list(paths):
        owner = re.search(r"\.(\d+)(\.\d+)?\.tmp$", path.name)
        if owner is None or not _lives(int(owner[1])):
            with suppress(OSError):  # what cannot go does no harm
                remove(path)


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
    write_atomic(path, _as_text(value))


def _as_text(value: BaseModel | Mapping[str, object]) -> str:
    plain = value.model_dump(mode="json") if isinstance(value, BaseModel) else canonical(value)
    return json.dumps(plain, indent=1, ensure_ascii=False) + "\n"


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
    """How long a stage took, when it ended and where, and the memory it held; beside the record, never inside it.

    ``record`` is the digest of the record's file, by which a changed one is known; None in files of before it was kept.
    """

    seconds: float
    finished: str
    host: str
    peak_mib: float | None = None
    gpu_peak_mib: float | None = None
    record: Digest | None = None

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
        scrap: str | None = None,
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
            scrap: names (a glob) of what only a next attempt needs, deleted once the record is written.

        Raises:
            DiskError: the disk is full, fails or is read-only; what was there before is as it was.
        """
        mark = fingerprint(stage, version, settings, inputs, seed)
        work = self.root / "stages" / stage / f"{mark}.partial"
        with writing(work.parent), self.lock(f"{stage}-{mark}"):
            if (work / "record.json").is_file():
                _finish(work, scrap)  # killed after its last word
            sealed = self._sealed(stage, mark, output)
            if sealed is not None:
                return sealed
            if work.is_symlink() or not keep_partial:
                remove(work)
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
            _finish(work, scrap)
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
        return _timing(self.root / "stages" / record.stage / record.fingerprint)

    def _sealed(self, stage: str, mark: str, output: type[Output]) -> StageRecord[Output] | None:
        folder = self.root / "stages" / stage / mark
        if not folder.exists():
            return None
        try:
            content = (folder / "record.json").read_bytes()
            timing, found = _timing(folder), hashlib.md5(content, usedforsecurity=False).hexdigest()
            if timing is not None and timing.record not in (None, found):
                raise StoreError(f"record.json has digest {found}, it was sealed as {timing.record}")
            record: StageRecord[Output] = _record_type(output).model_validate_json(content)
            self.verify(artifacts_of(record.output))
        except (FileNotFoundError, NotADirectoryError, ValueError, StoreError) as error:
            aside = folder.with_name(f"{mark}.damaged")
            remove(aside)
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
        text = _as_text(record)
        timing = Timing(
            seconds=round(seconds, 3),
            finished=datetime.now(UTC).isoformat(),
            host=socket.gethostname(),
            peak_mib=memory.mib,
            gpu_peak_mib=memory.gpu_mib,
            record=Digest(hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()),
        )
        write_json(work / "timing.json", timing)
        write_atomic(work / "record.json", text)

    def _lock_path(self, name: str) -> Path:
        return self.root / "locks" / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.lock"

    def lock(self, name: str) -> Lock:
        """A lock that those who share this store wait for; the kernel frees it when its holder dies."""
        return Lock(self._lock_path(name))

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """An empty folder for as long as the block lasts; one that a kill leaves is removed by the next that asks.

        Whose block still runs is told by locks, not by process ids, which containers that share a store do not share.

        Raises:
            DiskError: the disk is full, fails or is read-only.
        """
        folder = self.root / "tmp" / f"{uuid.uuid4().hex}.tmp"
        held = Lock(folder.with_suffix(".lock"))
        self.clear_scratch()
        with writing(folder.parent), self.lock("tmp"):  # nobody clears between these two
            held.acquire()
            folder.mkdir()
        try:
            yield folder
        finally:
            remove(folder)
            Path(held.lock_file).unlink(missing_ok=True)
            held.release()

    def clear_scratch(self) -> None:
        """Remove the folders of :meth:`scratch` that no running block works in."""
        with self.lock("tmp"):
            for path in (self.root / "tmp").glob("*.lock"):
                with suppress(Timeout, OSError), Lock(path, timeout=0):  # what cannot go does no harm
                    remove(path.with_suffix(".tmp"))
                    path.unlink(missing_ok=True)

    def run_lock(self, key: str) -> Lock:
        """The lock of one run key; the kernel frees it when its holder dies."""
        path = self._lock_path(key)
        return Lock(path.with_name(f"run-{path.name}"), timeout=0)

    def run_locks(self) -> Iterable[Path]:
        """The files of the locks of all run keys that were ever run."""
        return (self.root / "locks").glob("run-*.lock")

    def gc_lock(self) -> Lock:
        """The lock that who deletes from the store holds, and that runs wait for before they begin."""
        return self.lock("gc")

    def track_lock(self, key: str) -> Lock:
        """The lock of one run key's runs in MLflow, held by the run itself and by who writes them again."""
        return self.lock(f"track-{key}")


def _finish(work: Path, scrap: str | None) -> None:
    """Give a folder whose record is written its name."""
    for path in work.glob(scrap) if scrap else ():
        path.unlink()
    _sync_tree(work)
    work.rename(work.with_suffix(""))
    _sync_folder(work.parent)


def _timing(folder: Path) -> Timing | None:
    """What a sealed folder says of its making; None where it is not there or damaged, which no result hangs on."""
    try:
        return Timing.model_validate_json((folder / "timing.json").read_bytes())
    except (FileNotFoundError, ValueError):
        return None


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

    A folder that already holds the same record and files is left alone.

    Raises:
        DiskError: the disk is full, fails or is read-only; what was there before is as it was.
    """
    text, sources = _as_text(record), {ref: store.locate(ref) for ref in refs}
    existing = folder / "record.json"
    if existing.is_file() and existing.read_bytes() == text.encode():
        other = [
            ref.name for ref, path in sources.items() if not _is_copy(path, folder / ref.name, ref.digest)
        ]
        if not other:
            return
        log.warning("%s in %s is not what its record says; put there anew", ", ".join(other), folder)
    temporary = folder.with_name(f".{folder.name}.tmp")
    with writing(folder.parent):
        remove(temporary)
        temporary.mkdir(parents=True)
        for ref, path in sources.items():
            link(path, temporary / ref.name)
        write_atomic(temporary / "record.json", text)
        remove(folder)
        temporary.rename(folder)
        _sync_folder(folder.parent)


def _is_copy(source: Path, target: Path, digest: Digest) -> bool:
    """Whether a target is the sealed source itself, by its names, or has its content."""
    files = list(_files_below(source)) if source.is_dir() else [source]
    names = [(file, target / file.relative_to(source)) for file in files]
    if all(name.is_file() and name.samefile(file) for file, name in names):
        return True
    return any(name.is_file() for _, name in names) and digest_of(target) == digest


def link(source: Path, target: Path) -> None:
    """Second names for a file, or for every file of a folder; copies where the file system has none.

    What is there already stays. What a symbolic link points to is copied: it belongs to somebody else.
    """
    if source.is_dir():
        for file in _files_below(source):
            link(file, target / file.relative_to(source))
        return
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_symlink():
        _copy(source, target)
        return
    try:
        os.link(source, target)
    except FileExistsError as error:
        if not target.exists():
            raise StoreError(f"{target} is a link that points nowhere; remove it") from error
    except OSError:  # another file system, or one without hard links
        _copy(source, target)


def _copy(source: Path, target: Path) -> None:
    temporary = target.with_name(f".{target.name}.{os.getpid()}.{threading.get_native_id()}.tmp")
    try:
        shutil.copy2(source, temporary)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
