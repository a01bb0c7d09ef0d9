"""What the study measures against answers worked out by hand, and the study of one small experiment."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from flows.__main__ import main
from flows.config import ConfigError, load_config, stored_config
from flows.experiment import seal_split
from flows.measures import ContrastChange, SetMeasure, TuningMeasure, class_distance, contrast, matching
from flows.reading import features
from flows.results import collect
from flows.study import build_study, measure
from flows.study_page import Place, SetRow, Study, TuningRow, changes, lines, page
from tasks.datasets.benchmark import build_benchmark
from tasks.diffusion.tuning import TuningExample
from tasks.loading import image_cache
from tasks.miniature.reader import Reading
from tasks.records import AugmentedImage, EpochRecord, Session
from tasks.store import Store, StoreError, digest_of, read_lines
from tests.conftest import Place as Finished
from tests.helpers import fabricate_run, files_opened

QUICK = [
    "windows.images=1",
    "windows.subjects=[two,seven]",
    *(f"~windows.pairs.{what}" for what in ("colour", "form", "category", "style")),
]
LOOKS = {0: {"form": "digit", "style": "handwritten", "colour": "white", "background": "black"}}


def reading(category: str = "zero", **changes: str) -> Reading:
    seen = {"form": "digit", "style": "handwritten", "colour": "white", "background": "black"}
    return Reading(category=category, weight="bold", pose="upright", **{**seen, **changes})


# ------------------------------------------------------------------------------------------ by hand


def test_shares_count_what_is_read_as_the_class_looks() -> None:
    read = [reading(), reading(colour="red"), reading("one", form="die"), reading("unknown")]
    assert matching(read, [0, 0, 0, 0], LOOKS, ("zero", "one")) == {
        "form": 0.75, "style": 1.0, "colour": 0.75, "background": 1.0, "all": 0.5, "category": 0.5,
    }  # fmt: skip


def test_an_empty_set_has_no_shares() -> None:
    with pytest.raises(ValueError, match="no image to read"):
        matching([], [], LOOKS, ("zero",))


def test_the_distance_is_taken_class_by_class() -> None:
    zeros, ones = torch.zeros(2, 1), torch.ones(2, 1)
    swapped = class_distance({0: ones, 1: zeros}, {0: zeros, 1: ones})
    assert swapped == pytest.approx(8 + 1 - 2)  # k(1, 1) = 8, k(0, .) = 1: the pooled sets would be equal
    assert class_distance({0: zeros, 1: ones}, {0: zeros, 1: ones}) == 0
    assert class_distance({0: zeros, 1: ones[:1]}, {0: ones, 1: zeros}) == pytest.approx(7)
    assert class_distance({0: zeros}, {1: ones}) is None


def test_no_image_outweighs_the_others_by_the_size_of_its_features() -> None:
    flat = torch.linspace(0, 1, 3)[:, None, None, None].expand(3, 3, 32, 32)
    seen = features(flat)
    assert seen.square().mean(1).tolist() == pytest.approx([1, 1, 1], abs=1e-4)
    assert not torch.allclose(seen[0], seen[2], atol=0.01)


def test_contrast_is_the_mean_over_images_and_over_their_own_negatives() -> None:
    rng = torch.Generator().manual_seed(0)
    a, b = torch.rand(2, 3, 16, 16, generator=rng)
    like = [
        TuningExample("p", "detail", a, torch.stack([a, a]), 0),
        TuningExample("p", "detail", b, b[None], 1),
    ]
    assert contrast(torch.stack([a, b]), like) == pytest.approx((1, 1))
    assert contrast(torch.stack([b, a]), like)[0] < 0.2
    mixed = [TuningExample("p", "detail", a, torch.stack([a, b]), 0)]
    between = contrast(b[None], [TuningExample("p", "detail", a, b[None], 0)])[0]
    assert contrast(a[None], mixed) == pytest.approx((1, (1 + between) / 2))


def place(method: str, seed: int, epoch: int = 0) -> Place:
    return Place(dataset="digits", method=method, seed=seed, session=0, epoch=epoch)


def sets(method: str, *values: float) -> list[SetRow]:
    shares = dict.fromkeys(("form", "style", "colour", "background", "category"), 1.0)
    return [
        SetRow(
            place=place(method, seed), found=SetMeasure(images=4, shares={**shares, "all": v}, distance=None)
        )
        for seed, v in enumerate(values)
    ]


def tuning(method: str, seed: int, level: str, positive: tuple[float, float]) -> TuningRow:
    change = ContrastChange(level=level, examples=2, positive=positive, negative=(0.25, 0.125))
    return TuningRow(place=place(method, seed), found=TuningMeasure(levels=(change,)))


def test_lines_are_means_over_seeds() -> None:
    found = lines(
        [*sets("guided", 0.5, 1.0), *sets("fixed_sd", 0.25)], "digits", lambda one: one.shares["all"]
    )
    assert found["guided"][0, 0].mean == 0.75
    assert found["guided"][0, 0].std == pytest.approx(0.5 / 2**0.5)
    assert (found["fixed_sd"][0, 0].n, found["fixed_sd"][0, 0].std) == (1, None)
    assert lines(sets("guided", 0.5), "digits", lambda one: one.distance) == {}
    assert lines(sets("guided", 0.5), "birds", lambda one: 1.0) == {}


def test_changes_average_a_runs_tunings_before_the_seeds() -> None:
    rows = [
        tuning("guided", 0, "semantic", (0.25, 0.5)),
        tuning("guided", 0, "semantic", (0.25, 1.0)),
        tuning("guided", 1, "semantic", (0.5, 0.5)),
        tuning("guided", 0, "detail", (0.5, 0.5)),
    ]
    found = changes(rows, "digits")
    assert list(found) == [("guided", "semantic"), ("guided", "detail")]
    before, after = found["guided", "semantic"]
    assert (before.mean, before.n) == (0.125, 2)  # seeds 0 and 0.25
    assert after.mean == pytest.approx((0.625 + 0.375) / 2)


def test_the_page_says_what_was_left_out() -> None:
    study = Study(
        sets=tuple(sets("guided", 0.5, 1.0)), tunings=(), real=(), windows={}, skipped=("a: (b), since c",)
    )
    text = page(study, [])
    assert "| guided | 0.0 | 2 | 100.0 ± 0.0 |" in text
    assert "| 75.0 ± 35.4 |" in text
    assert "- a: (b), since c" in text
    assert "(b) digits" not in text


# ------------------------------------------------------------------------------------------ a real run


@pytest.fixture(scope="module")
def studied(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("study")
    build_study(finished.root / "runs", out, finished.root / "state", 3, QUICK)
    return out


def test_every_set_and_every_tuning_is_measured(finished: Finished, studied: Path) -> None:
    study = Study.model_validate_json((studied / "study.json").read_text())
    records = [
        EpochRecord.model_validate_json(file.read_text())
        for file in sorted(finished.run("guided").glob("session-*/epoch-*/record.json"))
    ]
    assert [(r.place.session, r.place.epoch) for r in study.sets] == [(r.session, r.epoch) for r in records]
    tuned = [(r.session, r.epoch) for r in records if r.tune and r.tune.output.adapter]
    assert [(r.place.session, r.place.epoch) for r in study.tunings] == tuned
    assert tuned
    assert all(change.examples <= 3 for row in study.tunings for change in row.found.levels)
    assert any(
        change.positive[0] != change.positive[1] for row in study.tunings for change in row.found.levels
    ), "the adapter changed nothing"
    assert [row.session for row in study.real] == [0, 1, 2]
    assert study.real[0].found.looks[3]["form"] == "digit"
    assert [settling.what for settling in study.windows["digits"].settlings] == ["background"]
    assert study.skipped == ()


def test_only_images_of_new_classes_count_and_real_images_are_train_and_validation(
    finished: Finished, studied: Path
) -> None:
    study = Study.model_validate_json((studied / "study.json").read_text())
    for row in study.sets:
        folder = finished.run("guided") / f"session-{row.place.session:02d}" / f"epoch-{row.place.epoch:03d}"
        record = EpochRecord.model_validate_json((folder / "record.json").read_text())
        session = Session.model_validate_json(
            next(
                file.read_text()
                for file in (finished.root / "state/stages/split").glob(
                    f"*/session-{record.session:02d}-train.json"
                )
            )
        )
        drawn = read_lines(
            finished.root / "state/stages" / record.start.augmentation.manifest.path, AugmentedImage
        )
        new = [image for image in drawn if image.label in session.new_classes]
        assert row.found.images == len(new) > 0
        assert len(drawn) > len(new) or record.session == 0
        measured = next(real for real in study.real if real.session == record.session).found
        assert measured.images == len(
            [i for i in session.train + session.val if i.label in session.new_classes]
        )


def test_the_page_and_the_plots_are_there(studied: Path) -> None:
    text = (studied / "study.md").read_text()
    assert all(f"({part})" in text for part in "abde")
    assert "study-digits.png" in text
    assert (studied / "study-digits.png").read_bytes()[:4] == b"\x89PNG"
    assert "<svg" in (studied / "study-digits.svg").read_text()


def test_a_second_study_measures_nothing_anew_and_writes_the_same_bytes(
    finished: Finished, studied: Path, tmp_path: Path
) -> None:
    stages = finished.root / "state" / "stages"
    before = {path: path.stat().st_mtime_ns for path in stages.glob("study_*/*/record.json")}
    assert before
    build_study(finished.root / "runs", tmp_path, finished.root / "state", 3, QUICK)
    assert {path: path.stat().st_mtime_ns for path in stages.glob("study_*/*/record.json")} == before
    for path in studied.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


def test_no_test_image_is_opened(finished: Finished, tmp_path: Path) -> None:
    """Measured anew, by a process' memory that holds no picture, with every file that is opened noted."""
    state = tmp_path / "state"
    shutil.copytree(finished.root / "state", state, ignore=shutil.ignore_patterns("study_*", "mlflow*"))
    image_cache.cache_clear()
    with files_opened() as opened:
        measure(collect(finished.root / "runs", state), state, 3, QUICK)
    parts = {path.parent.parent.name for path in opened if path.suffix == ".png" and "digits" in path.parts}
    assert parts == {"train"}


def test_other_splits_with_the_same_session_are_not_taken_for_the_runs(
    finished: Finished, tmp_path: Path
) -> None:
    """A state that has lost the run's own split: fewer sessions, or other words, and the first session in common."""
    (run,) = collect(finished.root / "runs", finished.root / "state")
    config = stored_config(run.folder)
    words = {"zero": "nought"}
    for changed in ({"n_sessions": 1}, {"class_names": words}):
        other = config.model_copy(update={"dataset": config.dataset.model_copy(update=changed)})
        split = seal_split(Store(tmp_path / "state"), other, build_benchmark(other.dataset)).output
        own = next((finished.root / "state" / "stages" / "split").glob("*/session-00-train.json"))
        assert split.train[0].digest == digest_of(own)
    with pytest.raises(StoreError, match="no longer holds the session"):
        measure([run], tmp_path / "state", 3, QUICK)


def test_runs_without_images_have_accuracies_alone(tmp_path: Path) -> None:
    fabricate_run(tmp_path, method="finetune")
    build_study(tmp_path / "runs", tmp_path / "out", tmp_path / "state", 3)
    text = (tmp_path / "out" / "study.md").read_text()
    assert "| digits | finetune | 1 | 66.7 | 50.0 |" in text
    assert "(a)" not in text


def test_settings_of_another_version_are_named_with_their_file(tmp_path: Path) -> None:
    config = load_config([]).identity
    (tmp_path / "config.json").write_text(json.dumps(config | {"tuning": config["tuning"] | {"colour": 1}}))
    with pytest.raises(ConfigError, match=r"config\.json was written by another version \(tuning\.colour"):
        stored_config(tmp_path / "session-00")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert stored_config(tmp_path / "session-00").tuning.border == 0.5
    with pytest.raises(ConfigError, match=r"no config\.json in or above"):
        stored_config(tmp_path.parent)


def test_no_runs_is_said_with_the_remedy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "--runs", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "holds no run; start one with" in " ".join(capsys.readouterr().err.split())
