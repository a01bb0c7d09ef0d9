"""Replay: an epoch's images from adapter, prompts and seeds, bit for bit, or a report of what differs."""

import shutil
from pathlib import Path

import pytest

from flows.__main__ import main
from tasks.records import AugmentedImage
from tasks.store import read_lines, write_lines
from tests.conftest import Place


@pytest.fixture
def copy(finished: Place, tmp_path: Path) -> Path:
    """The finished run's results alone, somewhere else: no state, as on another machine."""
    shutil.copytree(finished.run("guided"), tmp_path / "guided" / "seed-0")
    return tmp_path / "guided" / "seed-0"


@pytest.mark.parametrize("folder", ["session-00/initial", "session-00/epoch-000", "session-02/epoch-000"])
def test_an_epoch_comes_out_identical(copy: Path, prefect_server: None, folder: str, capsys) -> None:
    assert main(["replay", str(copy / folder)]) == 0
    assert "identical: " in capsys.readouterr().out


def test_another_seed_is_reported(copy: Path, prefect_server: None, capsys) -> None:
    manifest = copy / "session-00" / "epoch-000" / "manifest.jsonl"
    rows = read_lines(manifest, AugmentedImage)
    write_lines(manifest, [rows[0].model_copy(update={"seed": rows[0].seed + 1}), *rows[1:]])
    assert main(["replay", str(manifest.parent)]) == 1
    assert f"{len(rows) - 1} of {len(rows)} images identical" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("folder", "says"), [("nowhere", "no record.json"), ("session-00/epoch-001", "drew no images")]
)
def test_what_cannot_be_replayed_is_said(
    copy: Path, prefect_server: None, folder: str, says: str, capsys
) -> None:
    assert main(["replay", str(copy / folder)]) == 2
    assert says in " ".join(capsys.readouterr().err.split())
