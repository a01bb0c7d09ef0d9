"""Trace: an image, an adapter, a digest or a table's number, back to what made it."""

import json
import shutil
import statistics
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from flows.__main__ import main
from flows.lineage import LineageError
from flows.trace import TraceError, trace
from flows.trace_shape import AdapterTrace, ArtifactTrace, CellTrace, ImageTrace
from flows.trace_text import lines, nodes, safe, tree
from tasks.records import (
    AugmentedImage,
    EpochRecord,
    ExperimentRecord,
    Prediction,
    Provenance,
    SessionRecord,
    Triplet,
    Verdict,
)
from tasks.store import digest_of, read_json, read_lines, write_json, write_lines
from tests.conftest import Place

KEY = "digits/guided/seed-0"


@pytest.fixture
def runs(finished: Place, tmp_path: Path) -> Path:
    """A copy of the finished run's results, to be spoilt."""
    shutil.copytree(finished.run("guided"), tmp_path / "runs" / KEY)
    return tmp_path / "runs"


def epoch(runs: Path, session: int, number: int) -> tuple[Path, EpochRecord]:
    folder = runs / KEY / f"session-{session:02d}" / f"epoch-{number:03d}"
    return folder, EpochRecord.model_validate(read_json(folder / "record.json"))


def a_rewritten_image(folder: Path) -> tuple[AugmentedImage, Verdict]:
    """An image of A_1 whose prompt a verdict on A_0 rewrote."""
    verdicts = {v.augmented_id: v for v in read_lines(folder / "verdicts.jsonl", Verdict) if v.target_id}
    rows = read_lines(folder / "manifest.jsonl", AugmentedImage)
    row = next(row for row in rows if row.parent_id in verdicts)
    return row, verdicts[str(row.parent_id)]


# ------------------------------------------------------------------------------------------ images


def test_an_image_leads_back_to_prompts_answers_seed_adapter_and_origin(finished: Place) -> None:
    folder, record = epoch(finished.root / "runs", 0, 0)
    row, verdict = a_rewritten_image(folder)
    found = trace(str(folder / "images" / row.path), finished.root / "runs", finished.root / "state")
    assert isinstance(found, ImageTrace)
    assert (found.image_id, found.session, found.epoch, found.slot) == (row.id, 0, 1, row.slot)
    assert (found.run, found.class_name, found.source_id) == (KEY, row.path.split("/")[0], row.source_id)
    first, second = found.steps
    assert (first.image_id, first.epoch, first.adapter) == (row.parent_id, 0, None)
    assert first.judged is not None
    assert first.judged.prompt_next == verdict.prompt_next == second.prompt == row.prompt
    (target,) = [one for one in first.judged.comparisons if one.target]
    assert (target.original_id, target.answer) == (verdict.target_id, "different")
    assert target.caption_original != target.caption_augmented
    assert (second.seed, second.digest, second.intact) == (row.seed, row.digest, True)
    assert second.judged is None, "the session's last epoch judges nothing"

    said = {
        p.image_id: p for p in read_lines(folder.with_name("epoch-001") / "predictions.jsonl", Prediction)
    }
    _, after = epoch(finished.root / "runs", 0, 1)
    assert second.predicted is not None
    assert second.predicted.predicted == said[row.id].predicted
    assert second.predicted.classifier == after.train.output.classifier.digest

    assert record.tune is not None
    assert record.tune.output.adapter is not None
    assert found.adapter is not None
    assert found.adapter.tuning.adapter == record.tune.output.adapter.digest == second.adapter
    assert found.generator == record.tune.inputs["generator"]
    origin = Provenance.model_validate(read_json(finished.root / "state" / "runs" / KEY / "provenance.json"))
    assert found.origin.config_digest == origin.config_digest
    assert (found.origin.git_commit, found.origin.data_digest) == (origin.git_commit, origin.data_digest)
    assert found.origin.packages == origin.packages
    assert found.session_data == record.train.inputs["session"] == found.adapter.tuning.session_data
    assert found.commands == (f"fscil replay {folder} --stages regenerate",)


def test_path_id_and_digest_say_the_same(finished: Place) -> None:
    runs, state = finished.root / "runs", finished.root / "state"
    folder, _ = epoch(runs, 1, 0)
    row = read_lines(folder / "manifest.jsonl", AugmentedImage)[0]
    by_path = trace(str(folder / "images" / row.path), runs, state)
    assert isinstance(by_path, ImageTrace)
    assert trace(row.id, runs, state) == by_path
    assert trace(f"{KEY}/{row.id}", runs, state) == by_path
    assert trace(row.digest, runs, state).model_copy(update={"also_in": ()}) == by_path


def test_an_id_that_several_runs_have_is_to_be_said_with_its_run(runs: Path) -> None:
    shutil.copytree(runs / KEY, runs / "digits" / "twin" / "seed-0")
    row = read_lines(epoch(runs, 0, 0)[0] / "manifest.jsonl", AugmentedImage)[0]
    with pytest.raises(TraceError, match=f"2 runs have an image .*{KEY}/{row.id}"):
        trace(row.id, runs, runs)
    found = trace(row.digest, runs, runs)
    assert isinstance(found, ImageTrace)
    assert found.also_in == (str(runs / "digits/twin/seed-0/session-00/epoch-000/images" / row.path),)


def test_a_first_prompt_that_was_learned_names_where(finished: Place) -> None:
    runs = finished.root / "runs"
    manifest = runs / KEY / "session-02" / "initial" / "manifest.jsonl"
    base = "A picture of a {}"
    row = next(
        row
        for row in read_lines(manifest, AugmentedImage)
        if row.prompt != base.format(row.path.split("/")[0])
    )
    found = trace(row.id, runs, runs)
    assert isinstance(found, ImageTrace)
    assert found.first_prompt == "learned"
    earlier = trace(f"{KEY}/{found.learned_from[0]}", runs, runs)
    assert isinstance(earlier, ImageTrace)
    assert earlier.session == 1
    assert earlier.steps[-1].prompt.replace(earlier.class_name, found.class_name) == row.prompt


def test_a_spoilt_picture_is_told_and_no_later_record_is_read(runs: Path) -> None:
    folder, _ = epoch(runs, 0, 0)
    row = read_lines(folder / "manifest.jsonl", AugmentedImage)[0]
    for file in runs.glob(f"{KEY}/session-0[12]/*/record.json"):
        file.unlink()
        file.write_text("spoilt")
    (runs / KEY / "experiment.json").unlink()
    file = folder / "images" / row.path
    file.unlink()
    file.write_bytes(b"other")
    found = trace(str(file), runs / "nowhere", runs / "nowhere")
    assert isinstance(found, ImageTrace)
    assert [step.intact for step in found.steps] == [True, False]
    assert found.class_name == row.path.split("/")[0]
    assert found.origin.git_commit is None
    shown = "\n".join(lines(nodes(found)))
    assert "WHICH IT HAS NO MORE" in shown
    assert "neither the run's state nor its pointer is here" in shown


# ------------------------------------------------------------------------------------------ adapters and artifacts


def test_an_adapter_leads_back_to_failures_negatives_and_earlier_tunings(finished: Place) -> None:
    runs = finished.root / "runs"
    folder, record = epoch(runs, 1, 0)
    _, before = epoch(runs, 0, 0)
    assert record.tune is not None
    assert record.start.adapter is not None
    found = trace(str(folder / "adapter"), runs, runs)
    assert isinstance(found, AdapterTrace)
    assert found.tuning.adapter == digest_of(folder / "adapter")
    assert found.tuning.started_from == record.start.adapter.digest
    assert [(one.session, one.epoch, one.adapter) for one in found.before] == [
        (0, 0, record.start.adapter.digest)
    ]
    assert found.before[0].started_from is None
    assert sum(found.tuning.steps_drawn.values()) >= found.tuning.updates == 2
    assert found.settings["tuning"] == record.tune.settings["tuning"]

    triplets = read_lines(folder / "triplets.jsonl", Triplet)
    assert [one.original_id for one in found.failures] == [t.positive.id for t in triplets]
    assert all(one.predicted != one.label and one.predicted_class for one in found.failures)
    assert [n.image_id for n in found.failures[0].negatives] == list(triplets[0].negatives)
    assert before.tune is not None
    assert trace(found.tuning.adapter, runs, runs) == found
    assert trace(str(folder / "adapter" / "pytorch_lora_weights.safetensors"), runs, runs) == found


def test_tuned_examples_are_those_that_the_tuner_was_given(finished: Place, tmp_path: Path) -> None:
    from flows.config import config_here
    from flows.rerun import Rerun, read_recorded
    from tasks.records import Mining
    from tasks.tune_lora import examples_of

    runs = finished.root / "runs"
    folder, record = epoch(runs, 0, 0)
    found = trace(str(folder / "adapter"), runs, runs)
    assert isinstance(found, AdapterTrace)
    traced = {(example.prompt, example.level) for one in found.failures for example in one.examples}
    places = [f"runtime.state={finished.root / 'state'}"]
    config = config_here(folder, places)
    context = Rerun(read_recorded(folder), config, tmp_path)._context(config.runtime.state)
    assert record.mine is not None
    assert record.compare is not None
    assert isinstance(record.mine.output, Mining)
    given = list(examples_of(context, record.mine.output, record.compare.output.verdicts, 32, 0))
    assert {(example.prompt, example.level) for example in given} == traced
    assert len(given) == sum(len(one.examples) for one in found.failures)


@pytest.mark.parametrize(
    ("path", "what", "stage"),
    [
        ("session-00/epoch-001/classifier", "classifier", "train_classifier"),
        ("session-00/epoch-000/transcript.jsonl", "transcript", "vlm_compare"),
        ("session-00/initial/manifest.jsonl", "manifest", "regenerate"),
        ("session-02/test/test-predictions.jsonl", "predictions", "evaluate_test"),
    ],
)
def test_any_other_artifact_leads_to_its_stage(finished: Place, path: str, what: str, stage: str) -> None:
    runs = finished.root / "runs"
    found = trace(str(runs / KEY / path), runs, runs)
    assert isinstance(found, ArtifactTrace)
    assert (found.what, found.stage) == (what, stage)
    again = trace(found.digest, runs, runs)
    assert isinstance(again, ArtifactTrace)
    assert again.digest == found.digest == digest_of(runs / KEY / path)
    assert any("weights" in line or "read" in line for line in lines(nodes(found)))


# ------------------------------------------------------------------------------------------ cells


def test_a_cell_is_counted_again_from_session_records(runs: Path) -> None:
    twin = runs / "digits" / "guided" / "seed-1"
    shutil.copytree(runs / KEY, twin)
    write_json(twin / "experiment.json", {**read_json(twin / "experiment.json"), "seed": 1})
    shutil.copytree(twin, runs / "digits" / "guided" / "seed-2")
    (runs / "digits" / "guided" / "seed-2" / "experiment.json").unlink()
    file = twin / "session-02" / "record.json"
    content = read_json(file)
    for count in content["test"]["output"]["accuracy"]["counts"]:
        count["correct"] = count["total"]
    write_json(file, content)

    found = trace("digits/guided/a_last", runs, runs)
    assert isinstance(found, CellTrace)
    written = ExperimentRecord.model_validate(read_json(runs / KEY / "experiment.json"))
    last = SessionRecord.model_validate(read_json(runs / KEY / "session-02" / "record.json"))
    assert [seed.value for seed in found.seeds] == [written.a_last, 1.0]
    assert [seed.agrees for seed in found.seeds] == [True, False]
    assert found.mean == pytest.approx(statistics.fmean([written.a_last, 1.0]))
    assert found.std == pytest.approx(statistics.stdev([written.a_last, 1.0]))
    assert found.seeds[0].sessions[2].correct == sum(c.correct for c in last.test.output.accuracy.counts)
    counted, accuracy = found.seeds[0].sessions[2], last.test.output.accuracy
    assert counted.base_correct / counted.base_total == pytest.approx(accuracy.base)
    assert found.seeds[0].commands[0] == f"fscil replay {runs / KEY / 'session-00' / 'epoch-000'}"
    assert found.unfinished == (str(runs / "digits" / "guided" / "seed-2"),)
    assert "WHICH ITS experiment.json DOES NOT SAY" in "\n".join(lines(nodes(found)))


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("nonsense", "is no file here, no digest"),
        ("0" * 32, "no stage and no image below"),
        (
            "s00-e009-000-0000",
            "no image 's00-e009-000-0000' among those drawn for session 0 epoch 9 of the 1 runs",
        ),
        ("digits/guided/accuracy", "no column 'accuracy'; the tables have A_base"),
        ("digits/nothing/A_last", "no run below"),
        ("digits/guided/seconds", "stands in no record"),
    ],
)
def test_what_is_not_there_is_said(finished: Place, what: str, says: str, capsys) -> None:
    places = ["--runs", str(finished.root / "runs"), "--state", str(finished.root / "state")]
    assert main(["trace", what, *places]) == 2
    assert says in " ".join(capsys.readouterr().err.split())


def test_a_digest_that_is_only_read_is_said(finished: Place) -> None:
    runs = finished.root / "runs"
    _, record = epoch(runs, 0, 0)
    with pytest.raises(TraceError, match=r"records name it as an input, such as .*record\.json"):
        trace(str(record.train.inputs["backbone"]), runs, runs)


def test_a_folder_and_a_damaged_record_are_said(runs: Path) -> None:
    folder, _ = epoch(runs, 0, 0)
    with pytest.raises(TraceError, match="is no single thing"):
        trace(str(folder), runs, runs)
    none = folder.with_name("epoch-001") / "adapter"
    none.mkdir()
    with pytest.raises(TraceError, match="tuned no adapter"):
        trace(str(none), runs, runs)
    record = folder / "record.json"
    record.unlink()
    record.write_text("{}")
    with pytest.raises(LineageError, match="of another version or damaged"):
        trace(str(folder / "adapter"), runs, runs)


# ------------------------------------------------------------------------------------------ what is printed


def test_json_is_the_documented_shape(finished: Place, capsys) -> None:
    runs = finished.root / "runs"
    folder, _ = epoch(runs, 0, 0)
    row = read_lines(folder / "manifest.jsonl", AugmentedImage)[0]
    given = ["--runs", str(runs), "--state", str(finished.root / "state")]
    assert main(["trace", str(folder / "images" / row.path), "--json", *given]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["format"], shown["kind"]) == (1, "image")
    assert ImageTrace.model_validate(shown).image_id == row.id
    assert main(["trace", row.id, *given]) == 0
    plain = capsys.readouterr().out
    assert plain.startswith(f"image {row.id}: ")
    assert f"    epoch 1: {row.id}\n" in plain
    assert "\x1b" not in plain


def test_of_many_failures_and_tunings_some_are_listed(finished: Place) -> None:
    runs = finished.root / "runs"
    found = trace(str(epoch(runs, 1, 0)[0] / "adapter"), runs, runs)
    assert isinstance(found, AdapterTrace)
    many = found.model_copy(update={"before": found.before * 20, "failures": found.failures[:1] * 15})
    shown = list(lines(nodes(many)))
    assert [line.strip() for line in shown if " more" in line] == ["and 3 more", "and 8 more"]


def test_what_a_vlm_wrote_is_one_line_without_markup_or_controls(runs: Path) -> None:
    folder, _ = epoch(runs, 0, 0)
    rows = read_lines(folder / "verdicts.jsonl", Verdict)
    bad = "red [bold]and\nblue\x1b[31m \u202ebackwards"
    comparison = rows[0].comparisons[0].model_copy(update={"caption_original": bad})
    write_lines(
        folder / "verdicts.jsonl", [rows[0].model_copy(update={"comparisons": (comparison,)}), *rows[1:]]
    )
    found = nodes(trace(rows[0].augmented_id, runs, runs))
    expected = "original: red [bold]and blue\\x1b[31m \\u202ebackwards"
    assert expected in "\n".join(lines(found))
    console = Console(file=StringIO(), width=200, force_terminal=True, color_system=None)
    console.print(tree(found))
    assert isinstance(console.file, StringIO)
    assert expected in console.file.getvalue()
    assert safe("  a\t b ") == "a b"
