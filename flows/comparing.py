"""What differs between a sealed stage's files and those of its rerun, and by how much.

Pictures are compared byte by byte, then by PSNR; weights byte by byte, then tensor by tensor; lists of rows by row.
"""

import difflib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from pydantic import ConfigDict
from safetensors import SafetensorError
from safetensors.torch import load_file

from tasks.datasets.pictures import SUFFIXES
from tasks.images import UnreadableImageError, load_image
from tasks.records import Frozen

SHOWN = 5
"""Rows of a file that a sentence names."""

_KEYS = ("id", "image_id", "augmented_id", "centre", "key")
_ONLY = {True: "only in the folder", False: "only in the rerun"}

JsonRow = dict[str, object]


class RowDifference(Frozen):
    """One row of a list: its id or line, and which of its fields differ, as ``name: recorded -> replayed``."""

    row: str
    changes: tuple[str, ...]


class FileDifference(Frozen):
    """One file that came out otherwise.

    ``psnr`` in dB, None where pixels are the same and only the file's bytes differ; ``largest`` absolute difference
    of any weight, in ``tensor``, and ``relative`` to the largest weight there: infinite where all of them are 0.
    """

    model_config = ConfigDict(allow_inf_nan=True)

    file: str
    what: Literal["missing", "added", "image", "weights", "rows", "bytes"]
    psnr: float | None = None
    largest: float | None = None
    relative: float | None = None
    tensor: str | None = None
    rows: tuple[RowDifference, ...] = ()
    note: str | None = None

    def sentence(self) -> str:
        """The difference in words."""
        if self.note is not None:
            return f"{self.file}: {self.note}"
        if self.what == "image":
            return f"{self.file}: " + ("the same pixels" if self.psnr is None else f"PSNR {self.psnr:.1f} dB")
        if self.what == "weights":
            return f"{self.file}: at most {self.largest:.2g} in {self.tensor} (relative {self.relative:.2g})"
        if self.what == "rows":
            count = "1 row differs" if len(self.rows) == 1 else f"{len(self.rows)} rows differ"
            return f"{self.file}: {count}, {'; '.join(map(_row_sentence, self.rows[:SHOWN]))}"
        return f"{self.file}: {self.what}"


def _row_sentence(row: RowDifference) -> str:
    return f"{row.row} ({', '.join(row.changes)})"


def files_of(artifact: Path, name: str) -> dict[str, Path]:
    """The files of an artifact by their name in an epoch's folder; none if it is not there."""
    if artifact.is_dir():
        return {f"{name}/{p.relative_to(artifact).as_posix()}": p for p in artifact.rglob("*") if p.is_file()}
    return {name: artifact} if artifact.is_file() else {}


def compare_files(recorded: Mapping[str, Path], replayed: Mapping[str, Path]) -> list[FileDifference]:
    """Every file that is missing, added or otherwise."""
    found = []
    for name in sorted({*recorded, *replayed}):
        if name not in replayed:
            found.append(FileDifference(file=name, what="added", note="the rerun does not make it"))
        elif name not in recorded:
            found.append(FileDifference(file=name, what="missing", note="is missing in the folder"))
        elif recorded[name].read_bytes() != replayed[name].read_bytes():
            found.append(_compare(name, recorded[name], replayed[name]))
    return found


def _compare(name: str, old: Path, new: Path) -> FileDifference:
    suffix = old.suffix.lower()
    try:
        if suffix in SUFFIXES:
            return _images(name, old, new)
        if suffix == ".safetensors":
            return _weights(name, old, new)
        if suffix == ".jsonl":
            return _rows(name, old, new)
    except (UnreadableImageError, SafetensorError, ValueError) as error:
        return FileDifference(file=name, what="bytes", note=f"unreadable: {str(error).splitlines()[0]}")
    return FileDifference(file=name, what="bytes", note="its bytes differ")


def _images(name: str, old: Path, new: Path) -> FileDifference:
    a, b = load_image(old, None), load_image(new, None)
    if a.shape != b.shape:
        sizes = f"{a.shape[2]} x {a.shape[1]} pixels -> {b.shape[2]} x {b.shape[1]}"
        return FileDifference(file=name, what="image", note=sizes)
    error = torch.mean((a - b) ** 2).item()
    return FileDifference(file=name, what="image", psnr=-10 * math.log10(error) if error else None)


def _weights(name: str, old: Path, new: Path) -> FileDifference:
    a, b = load_file(old), load_file(new)
    if {k: v.shape for k, v in a.items()} != {k: v.shape for k, v in b.items()}:
        odd = sorted(k for k in {*a, *b} if k not in a or k not in b or a[k].shape != b[k].shape)
        return FileDifference(file=name, what="weights", note=f"{odd[0]} is not in both, or of another shape")
    gaps = {k: (a[k].double() - b[k].double()).abs().max().item() for k in a if a[k].numel()}
    tensor = max(gaps, key=lambda key: gaps[key])
    size = a[tensor].double().abs().max().item()
    relative = gaps[tensor] / size if size else math.inf
    return FileDifference(file=name, what="weights", largest=gaps[tensor], relative=relative, tensor=tensor)


def _rows(name: str, old: Path, new: Path) -> FileDifference:
    a, b = _read(old), _read(new)
    key = next((key for key in _KEYS if _names(a, key) and _names(b, key)), None)
    rows = tuple(_by_name(_names(a, key), _names(b, key)) if key else _by_line(a, b))
    note = None if rows else "the same rows in another order or spelling"
    return FileDifference(file=name, what="rows", rows=rows, note=note)


def _read(file: Path) -> list[JsonRow]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def _names(rows: Sequence[JsonRow], key: str) -> dict[str, JsonRow]:
    """Rows by one of their fields; none where some lack it or share a value."""
    named = {str(row.get(key)): row for row in rows}
    return named if len(named) == len(rows) and all(key in row for row in rows) else {}


def _by_name(old: Mapping[str, JsonRow], new: Mapping[str, JsonRow]) -> Iterator[RowDifference]:
    for name in dict.fromkeys([*old, *new]):
        if name not in old or name not in new:
            yield RowDifference(row=name, changes=(_ONLY[name in old],))
        elif changes := values_differ(old[name], new[name]):
            yield RowDifference(row=name, changes=tuple(changes))


def _by_line(old: Sequence[JsonRow], new: Sequence[JsonRow]) -> Iterator[RowDifference]:
    """Rows without names, aligned so that one that was put in does not move all that follow."""
    for what, a, a_end, b, b_end in _edits(old, new):
        if what == "replace" and a_end - a == b_end - b:
            for n in range(a_end - a):
                changes = values_differ(old[a + n], new[b + n])
                yield RowDifference(row=f"line {a + n + 1}", changes=tuple(changes))
        elif what != "equal":
            for line in range(a, a_end):
                yield RowDifference(row=f"line {line + 1}", changes=(_ONLY[True],))
            for line in range(b, b_end):
                yield RowDifference(row=f"line {line + 1} of the rerun", changes=(_ONLY[False],))


def _edits(old: Sequence[JsonRow], new: Sequence[JsonRow]) -> Sequence[tuple[str, int, int, int, int]]:
    a, b = ([json.dumps(row, sort_keys=True) for row in rows] for rows in (old, new))
    return difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes()


# ------------------------------------------------------------------------------------------ values of a record


def values_differ(old: object, new: object, name: str = "") -> list[str]:
    """Which values of two JSON-like structures differ, as ``name: recorded -> replayed``; long series by how much."""
    if old == new:
        return []
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = sorted({*old, *new}, key=str)
        return [
            s for k in keys for s in values_differ(old.get(k), new.get(k), f"{name}.{k}" if name else str(k))
        ]
    if isinstance(old, list | tuple) and isinstance(new, list | tuple) and len(old) == len(new):
        if all(isinstance(value, int | float) for value in (*old, *new)):
            return [f"{name}: {_series(old, new)}"]
        return [
            s
            for n, (a, b) in enumerate(zip(old, new, strict=True))
            for s in values_differ(a, b, f"{name}[{n}]")
        ]
    return [f"{name}: {old!r} -> {new!r}"]


def _series(old: Sequence[float], new: Sequence[float]) -> str:
    gaps = [abs(a - b) for a, b in zip(old, new, strict=True)]
    size = max(abs(a) for a in old)
    relative = max(gaps) / size if size else math.inf
    return f"{sum(gap > 0 for gap in gaps)} of {len(gaps)} differ, at most by {max(gaps):.2g} (relative {relative:.2g})"
