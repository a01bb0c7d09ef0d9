"""What differs between two files, and by how much: known answers."""

import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from flows.comparing import FileDifference, compare_files, files_of, values_differ


def compared(tmp_path: Path, name: str, old: bytes, new: bytes) -> FileDifference:
    for side, content in (("old", old), ("new", new)):
        (tmp_path / side).mkdir()
        (tmp_path / side / name).write_bytes(content)
    (found,) = compare_files({name: tmp_path / "old" / name}, {name: tmp_path / "new" / name})
    return found


def lines(*rows: object) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def test_equal_files_are_no_difference_and_missing_ones_are(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "x").write_bytes(b"1")
    (tmp_path / "y").write_bytes(b"1")
    folder = files_of(tmp_path / "a", "images")
    assert folder == {"images/b/x": tmp_path / "a" / "b" / "x"}
    assert files_of(tmp_path / "none", "images") == {}
    assert compare_files(folder, {"images/b/x": tmp_path / "y"}) == []
    assert [d.what for d in compare_files(folder, {"images/z": tmp_path / "y"})] == ["added", "missing"]


def test_pictures_by_psnr(tmp_path: Path) -> None:
    old, new = tmp_path / "old.png", tmp_path / "new.png"
    Image.new("RGB", (10, 10)).save(old)
    picture = Image.new("RGB", (10, 10))
    picture.putpixel((0, 0), (255, 255, 255))
    picture.save(new)
    found = compared(tmp_path, "p.png", old.read_bytes(), new.read_bytes())
    assert found.psnr == pytest.approx(20)
    assert found.sentence() == "p.png: PSNR 20.0 dB"


@pytest.mark.parametrize(
    ("size", "says"), [((10, 10), "the same pixels"), ((8, 10), "10 x 10 pixels -> 8 x 10")]
)
def test_the_same_pixels_in_other_bytes_and_other_sizes(tmp_path: Path, size, says: str) -> None:
    old, new = tmp_path / "old.png", tmp_path / "new.png"
    Image.new("RGB", (10, 10)).save(old)
    Image.new("RGB", size).save(new, compress_level=0)
    assert compared(tmp_path, "p.png", old.read_bytes(), new.read_bytes()).sentence() == f"p.png: {says}"


def test_a_damaged_picture_is_unreadable(tmp_path: Path) -> None:
    assert "unreadable" in compared(tmp_path, "p.png", b"one", b"two").sentence()


def test_weights_by_their_largest_difference(tmp_path: Path) -> None:
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file({"x": torch.tensor([1.0, -4.0]), "y": torch.zeros(2)}, a)
    save_file({"x": torch.tensor([1.0, -3.0]), "y": torch.full((2,), 0.5)}, b)
    found = compared(tmp_path, "w.safetensors", a.read_bytes(), b.read_bytes())
    assert (found.tensor, found.largest, found.relative) == ("x", 1.0, 0.25)
    save_file({"x": torch.zeros(2)}, b)
    (tmp_path / "again").mkdir()
    assert (
        "y is not in both"
        in compared(tmp_path / "again", "w.safetensors", a.read_bytes(), b.read_bytes()).sentence()
    )


def test_rows_by_their_names(tmp_path: Path) -> None:
    old = lines({"id": "a", "prompt": "x"}, {"id": "b", "prompt": "y"}, {"id": "c", "prompt": "z"})
    new = lines({"id": "a", "prompt": "x"}, {"id": "b", "prompt": "Y"}, {"id": "d", "prompt": "z"})
    found = compared(tmp_path, "m.jsonl", old, new)
    assert [(row.row, row.changes) for row in found.rows] == [
        ("b", ("prompt: 'y' -> 'Y'",)),
        ("c", ("only in the folder",)),
        ("d", ("only in the rerun",)),
    ]
    assert found.sentence().startswith("m.jsonl: 3 rows differ, b (prompt: 'y' -> 'Y'); c (only")


def test_rows_without_names_are_aligned(tmp_path: Path) -> None:
    rows = [{"label": 0, "centre": "a", "ssim": n} for n in range(4)]
    found = compared(
        tmp_path, "pairs.jsonl", lines(*rows), lines({"label": 9}, *rows[:3], {**rows[3], "ssim": 7})
    )
    assert [(row.row, row.changes) for row in found.rows] == [
        ("line 1 of the rerun", ("only in the rerun",)),
        ("line 4", ("ssim: 3 -> 7",)),
    ]


def test_rows_in_another_order_are_told(tmp_path: Path) -> None:
    a, b = {"id": "a"}, {"id": "b"}
    assert "another order" in compared(tmp_path, "m.jsonl", lines(a, b), lines(b, a)).sentence()


def test_values_of_a_record() -> None:
    assert values_differ({"a": {"b": 1}, "c": "x"}, {"a": {"b": 2}, "c": "x"}) == ["a.b: 1 -> 2"]
    assert values_differ({"l": [1.0, 2.0]}, {"l": [1.0, 2.5]}) == [
        "l: 1 of 2 differ, at most by 0.5 (relative 0.25)"
    ]
    assert values_differ({"l": [0.0]}, {"l": [1.0]}) == [
        f"l: 1 of 1 differ, at most by 1 (relative {math.inf})"
    ]
    assert values_differ({"l": [1]}, {"l": [1, 2]}) == ["l: [1] -> [1, 2]"]
    assert values_differ({"l": ["a", "b"]}, {"l": ["a", "c"]}) == ["l[1]: 'b' -> 'c'"]
    assert values_differ({}, {"new": 1}) == ["new: None -> 1"]
