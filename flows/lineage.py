"""A run's results folder, read backwards: which epoch made what, without reading more records than it takes.

Epochs are numbered by session and epoch; -1 is a session's ``initial`` folder, so that the set which an epoch starts
with always lies in the folder of the epoch before.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Self, TypeVar

from pydantic import ValidationError

from tasks.provenance import config_digest
from tasks.records import (
    ArtifactRef,
    AugmentationSet,
    AugmentedImage,
    Digest,
    EpochRecord,
    Frozen,
    Provenance,
    SessionRecord,
    StageRecord,
)
from tasks.store import StoreError, read_json, read_lines
from tasks.versions import pointer_of, read_pointer

STAGES = ("train", "evaluate", "mine", "compare", "tune", "regenerate")
"""An epoch's stages, as EpochRecord calls them."""

INITIAL = -1
"""The "epoch" whose folder holds a session's first set."""

Row = TypeVar("Row", bound=Frozen)
Drawn = StageRecord[AugmentationSet]

_PLACE = re.compile(r"session-(\d+)/(?:epoch-(\d+)|initial)$")


class LineageError(ValueError):
    """A record or a file is not where it was looked for; the message says what and where."""


class RunFolder:
    """``runs/<dataset>/<method>/seed-<n>``, or a copy of it anywhere."""

    def __init__(self, root: Path) -> None:
        """Args: root: the folder that holds config.json."""
        self.root = root
        self._epochs: dict[tuple[int, int], EpochRecord] = {}
        self._places: list[tuple[int, int]] | None = None

    @classmethod
    def containing(cls, path: Path) -> Self:
        """The run that a file or folder lies in.

        Raises:
            LineageError: neither it nor a folder above holds a config.json.
        """
        for parent in (path, *path.parents):
            if (parent / "config.json").is_file() and not (parent / "record.json").is_file():
                return cls(parent)
        raise LineageError(
            f"no config.json in or above {path}; give something below runs/<dataset>/<method>/seed-<n>"
        )

    @property
    def key(self) -> str:
        """``<dataset>/<method>/seed-<n>``, wherever the folder is now."""
        config = read_json(self.root / "config.json")
        dataset = config["dataset"]
        assert isinstance(dataset, dict), "written from DatasetSettings"
        return f"{dataset['name']}/{config['method']}/seed-{config['seed']}"

    def provenance(self, state: Path) -> Provenance | None:
        """Who made the run, as a state folder or else the run's pointer says; None where neither does.

        What they say of another run of the same key, with other settings, is not told.
        """
        file, pointer = state / "runs" / self.key / "provenance.json", pointer_of(self.root)
        known = None
        if file.is_file():
            known = read_record(file, Provenance)
        elif pointer.is_file() and (meta := read_pointer(pointer).meta):
            known = Provenance.model_validate(meta)
        ours = config_digest(read_json(self.root / "config.json"))
        return known if known is not None and known.config_digest == ours else None

    def folder(self, session: int, epoch: int) -> Path:
        """The folder of an epoch, or a session's ``initial``; it need not be there."""
        return (
            self.root / f"session-{session:02d}" / ("initial" if epoch == INITIAL else f"epoch-{epoch:03d}")
        )

    def place(self, folder: Path) -> tuple[int, int]:
        """Session and epoch of a folder below the run. Raises LineageError for another folder."""
        if (found := _PLACE.search(folder.as_posix())) is None:
            raise LineageError(f"{folder} is neither session-<nn>/epoch-<nnn> nor session-<nn>/initial")
        return int(found[1]), INITIAL if found[2] is None else int(found[2])

    def epoch(self, session: int, epoch: int) -> EpochRecord:
        """The record of an epoch. Raises LineageError if it is missing or of another version."""
        if (session, epoch) not in self._epochs:
            file = self.folder(session, epoch) / "record.json"
            self._epochs[session, epoch] = read_record(file, EpochRecord)
        return self._epochs[session, epoch]

    def session(self, session: int) -> SessionRecord:
        """The record of a sealed session. Raises LineageError if it is missing or of another version."""
        return read_record(self.root / f"session-{session:02d}" / "record.json", SessionRecord)

    def drawn(self, session: int, epoch: int) -> Drawn | None:
        """The stage that drew the set which an epoch starts with; None if there is none."""
        if epoch > 0:
            return self.epoch(session, epoch - 1).regenerate
        file = self.folder(session, INITIAL) / "record.json"
        return read_record(file, Drawn) if file.is_file() else None

    def places(self) -> list[tuple[int, int]]:
        """Session and epoch of every folder with a record, in the order of the run; listed once, nothing is read."""
        if self._places is None:
            names = ("session-*/epoch-*/record.json", "session-*/initial/record.json")
            self._places = sorted(self.place(file.parent) for name in names for file in self.root.glob(name))
        return self._places

    def back_from(self, session: int, epoch: int) -> Iterator[tuple[int, int]]:
        """Places up to and including this one, latest first."""
        return (place for place in reversed(self.places()) if place <= (session, epoch))

    def stages(self, session: int, epoch: int) -> list[StageRecord]:
        """The stages that were sealed in a folder."""
        if epoch == INITIAL:
            drawn = self.drawn(session, 0)
            return [drawn] if drawn is not None else []
        return list(stages_by_name(self.epoch(session, epoch)).values())

    def file_of(self, ref: ArtifactRef, session: int, epoch: int) -> Path:
        """The file or folder of a reference, looked for from an epoch backwards.

        Raises:
            LineageError: no epoch up to there made it, or it is not in that epoch's folder any more.
        """
        mark = ref.path.rsplit("/", 1)[0]
        for place in self.back_from(session, epoch):
            if any(f"{stage.stage}/{stage.fingerprint}" == mark for stage in self.stages(*place)):
                found = self.folder(*place) / ref.name
                if not found.exists():
                    raise LineageError(f"{found} is missing; its record says that it is {ref.digest}")
                return found
        raise LineageError(
            f"{ref.kind} {ref.digest} was made by no epoch of {self.root} up to session {session} epoch {epoch}"
        )

    def tuned_at(self, adapter: Digest, session: int, epoch: int) -> tuple[int, int] | None:
        """The epoch that tuned an adapter, looked for backwards."""
        for place in self.back_from(session, epoch):
            record = self.epoch(*place) if place[1] != INITIAL else None
            output = record.tune.output if record and record.tune else None
            if output and output.adapter and output.adapter.digest == adapter:
                return place
        return None

    def image(self, session: int, epoch: int, name: str) -> AugmentedImage | None:
        """The row of an image of the set which an epoch starts with, by id."""
        manifest = self.folder(session, epoch - 1) / "manifest.jsonl"
        rows = rows_with(manifest, AugmentedImage, name) if manifest.is_file() else []
        return next((row for row in rows if row.id == name), None)


def stages_by_name(record: EpochRecord) -> dict[str, StageRecord]:
    """The stages that an epoch ran."""
    return {name: stage for name in STAGES if (stage := getattr(record, name)) is not None}


def read_record(file: Path, kind: type[Row]) -> Row:
    """Read a record. Raises LineageError if it is missing, damaged or of another version."""
    try:
        return kind.model_validate(read_json(file))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        name = ".".join(str(step) for step in first["loc"])
        raise LineageError(f"{file} is of another version or damaged: {name}: {first['msg']}") from None
    except StoreError as error:
        raise LineageError(str(error)) from error


def rows_with(file: Path, kind: type[Row], text: str) -> list[Row]:
    """The JSON lines of a file that hold a text; the others are not parsed.

    Raises:
        LineageError: the file is missing or such a line does not parse.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
        return [kind.model_validate_json(line) for line in lines if text in line]
    except OSError as error:
        raise LineageError(f"cannot read {file}: {error.strerror}") from error
    except ValueError:
        read_lines(file, kind)  # says which line
        raise
