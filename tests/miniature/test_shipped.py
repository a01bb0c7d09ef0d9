"""Damaged weights of the project's own are named before a run; weights from elsewhere are one's own affair."""

import json
import shutil
from pathlib import Path

import pytest

from flows.__main__ import main
from tasks.miniature import shipped
from tasks.store import digest_of
from tests.conftest import Place

LARGEST = "generator/unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The project's weights, as if they were here."""
    shutil.copytree(shipped.SHIPPED, tmp_path / "weights")
    monkeypatch.setattr(shipped, "SHIPPED", tmp_path / "weights")
    return tmp_path / "weights"


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_every_file_of_every_part_is_written_down_as_it_is(copy: Path) -> None:
    known = (copy / "digests.json").read_bytes()
    shipped.write_digests()
    assert (copy / "digests.json").read_bytes() == known, "run tasks.miniature.shipped.write_digests()"
    parts = {path.name for path in copy.iterdir() if path.is_dir()}
    assert {name.split("/")[0] for name in json.loads(known)} == parts
    for part in parts:
        shipped.refuse_damaged(copy / part)


@pytest.mark.parametrize("asked", ["generator", "generator/unet", LARGEST, "captioner/../generator"])
def test_a_flipped_byte_is_refused_by_name(copy: Path, asked: str) -> None:
    flip(copy / LARGEST)
    with pytest.raises(
        ValueError, match=rf"{LARGEST} is not the file that came with the project .*git checkout"
    ):
        shipped.refuse_damaged(copy / asked)
    shipped.refuse_damaged(copy / "captioner")


def test_a_missing_file_is_named(copy: Path) -> None:
    (copy / "classifier" / "config.json").unlink()
    with pytest.raises(ValueError, match=r"classifier/config\.json is missing"):
        shipped.refuse_damaged(copy / "classifier")


def test_weights_from_elsewhere_are_let_pass(copy: Path, tmp_path: Path) -> None:
    shutil.copytree(copy / "generator", tmp_path / "mine")
    flip(tmp_path / "mine" / "unet" / "diffusion_pytorch_model.safetensors")
    for path in (tmp_path / "mine", Path("owner/name"), tmp_path / "none"):
        shipped.refuse_damaged(path)


@pytest.mark.parametrize("part", ["generator", "classifier"])
def test_a_run_is_refused_before_any_compute(
    copy: Path, tmp_path: Path, digits: Path, capsys: pytest.CaptureFixture[str], part: str
) -> None:
    file = max((copy / part).rglob("*.safetensors"), key=lambda path: path.stat().st_size)
    before = digest_of(file)
    flip(file)
    place = Place(tmp_path)
    where = [f"generator.path={copy / 'generator'}", f"classifier.checkpoint={copy / 'classifier'}"]
    assert main(["dataset=digits", "method=fixed_sd", *place.overrides(*where)]) == 2
    said = "".join(capsys.readouterr().err.split())
    assert f"{file}isnotthefilethatcamewiththeproject(MD5{before})" in said
    assert not (place.root / "state" / "stages").exists()
