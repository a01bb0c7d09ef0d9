"""The page of a session: its numbers are those of the records, its pictures are small, others' text stays text."""

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flows import session_page as pages
from flows.session_page import artifact_key, escaped, mlflow_place, session_page
from tasks.tracking_runs import TrackingSettings
from tests.helpers import FabricatedRun, fabricate_run

EVIL = "a <script>alert(1)</script> | [two](http://example.org) ![x](y)"


def page_of(made: FabricatedRun, session: int) -> str:
    epochs = [record for record in made.epochs if record.session == session]
    return session_page(
        "digits · guided · session 1", made.sessions[session], epochs, made.session_folder(session), ["here"]
    )


def pictures_in(page: str) -> list[Image.Image]:
    found = re.findall(r"\(data:image/webp;base64,([^)]+)\)", page)
    return [Image.open(io.BytesIO(base64.b64decode(one, validate=True))) for one in found]


def test_it_says_what_the_records_say(tmp_path: Path) -> None:
    page = page_of(fabricate_run(tmp_path), 1)
    accuracy = "**Test accuracy 66.7%**, base 75.0%, novel 50.0%, after 2 epochs"
    assert accuracy in page, page[:300]
    rows = [line for line in page.splitlines() if re.match(r"\| \d", line)]
    assert [line.split(" | ")[4:] for line in rows] == [["2 / 1 / 1", "2", "6 |"], ["", "", " |"]]
    assert page.index("`A_0`, 6 images") < page.index("`A_1`, 6 images")
    assert len(pictures_in(page)) == 2
    assert page.endswith("- here")


def test_what_the_vlm_wrote_is_shown_as_it_is(tmp_path: Path) -> None:
    made = fabricate_run(tmp_path, prompt=lambda name, epoch: EVIL if epoch else f"A picture of a {name}")
    page = page_of(made, 0)
    assert "- epoch 0, zero: " in page
    assert "<script>" not in page
    assert "](http" not in page
    assert re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", escaped(EVIL)) == EVIL
    assert escaped("two\nlines  # here") == "two lines \\# here"


def test_a_method_that_draws_nothing_has_numbers_only(tmp_path: Path) -> None:
    page = page_of(fabricate_run(tmp_path, method="finetune"), 0)
    assert "Test accuracy" in page
    assert "### Drawn" not in page
    assert "rewrote" not in page


def test_many_large_pictures_stay_below_the_room(tmp_path: Path) -> None:
    made = fabricate_run(tmp_path, epochs=11)
    noise = np.random.default_rng(0)
    for path in made.session_folder(0).rglob("*.png"):
        path.unlink()  # a hard link of the state's file
        Image.fromarray(noise.integers(0, 256, (256, 256, 3), np.uint8)).save(path)
    page = page_of(made, 0)
    assert 50_000 < len(page) < 100_000
    assert re.findall(r"Contact sheet of (A_\d+)", page)[:: pages.SHEETS - 1] == ["A_0", "A_10"]


def test_a_sheet_that_cannot_be_small_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "ROOM", 100)
    assert pictures_in(page_of(fabricate_run(tmp_path), 0)) == []


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"uri": "https://mlflow.example.org/"}, "MLflow: [d/m/seed-0](page)"),
        ({"uri": "sqlite:///mlflow.db"}, "MLflow: [d/m/seed-0](page) (where `make ui` or `make up` runs)"),
        ({"enabled": False}, "MLflow: off for this run (`tracking=off`)"),
    ],
)
def test_mlflow_is_a_link_or_a_command(given: dict[str, object], said: str) -> None:
    settings = {
        "enabled": True,
        "strict": False,
        "uri": "",
        "ui": "http://h:5",
        "experiment": "fscil",
        "artifacts": "a",
    }
    tracking = TrackingSettings.model_validate(
        settings | {"grid_images": 1, "grid_side": 8, "traced_calls": 0, "machine_every_s": 0} | given
    )
    assert mlflow_place(tracking, "d/m/seed-0", "page") == said
    assert ("fscil track d/m/seed-0" in mlflow_place(tracking, "d/m/seed-0", None)) == tracking.enabled


def test_keys_are_those_that_prefect_takes() -> None:
    assert artifact_key("mini_ImageNet · sd+VLM", "seed 2") == "mini-imagenet-sd-vlm-seed-2"
