"""Which classes, methods, epochs and slots are shown, what their cards say, and that few lines are read."""

from pathlib import Path

import pytest
from PIL import Image

from flows.gallery import (
    CARDS_PER_STRIP,
    CLASSES,
    METHODS_SHOWN,
    PICTURE_BYTES,
    SetPlace,
    drawn_set,
    embedded,
    ends,
    fitting,
    lead_slots,
    pick_classes,
    pick_methods,
    read_some,
    set_places,
    shown_classes,
    spread,
)
from flows.results import Run, collect
from tasks.records import AugmentedImage
from tasks.store import StoreError
from tests.helpers import fabricate_run


def runs_of(root: Path) -> list[Run]:
    return collect(root / "runs", root / "state")


def test_cards_follow_epochs_and_say_what_changed(tmp_path: Path) -> None:
    fabricate_run(tmp_path)
    shown = {one.name: one for one in shown_classes(runs_of(tmp_path))}
    assert {name: one.session for name, one in shown.items()} == {"zero": 0, "one": 0, "two": 1}
    (strip,) = shown["two"].strips
    assert [(card.session, card.epoch, card.level, card.rewritten) for card in strip.cards] == [
        (1, 0, "semantic", False),
        (1, 1, "none", True),
    ]
    assert [card.prompt for card in strip.cards] == ["A picture of a two", "A picture of a two, handwritten"]
    assert strip.cards[0].caption_original == "a handwritten one"
    assert [len(card.pictures) for card in strip.cards] == [2, 2]
    assert shown["zero"].strips[0].cards[0].level == "detail"
    assert [(card.session, card.epoch) for card in shown["zero"].strips[0].cards] == [(0, 0), (0, 1), (1, 1)]


def test_methods_without_images_have_no_strip_and_seeds_are_the_lowest(tmp_path: Path) -> None:
    fabricate_run(tmp_path, method="finetune")
    fabricate_run(tmp_path, method="fixed_sd", seed=1)
    fabricate_run(tmp_path, seed=3)
    fabricate_run(tmp_path, seed=2, sealed_sessions=1)
    shown = {one.name: one for one in shown_classes(runs_of(tmp_path))}
    assert [(s.method, s.seed, s.finished) for s in shown["one"].strips] == [
        ("fixed_sd", 1, True),
        ("guided", 2, False),
    ]


def test_of_many_methods_ours_and_the_ablation_are_shown(tmp_path: Path) -> None:
    fabricate_run(tmp_path)
    (run,) = runs_of(tmp_path)
    methods = ["cec_guided", "l2p_guided", "fixed_sd", "random", "first", "vlm", "guided", "a", "b"]
    chosen = pick_methods([run.model_copy(update={"method": method}) for method in methods])
    assert [one.method for one in chosen] == ["cec_guided", "fixed_sd", "random", "first", "vlm", "guided"]
    assert len(chosen) == METHODS_SHOWN


def test_classes_are_shared_out_between_sessions_and_datasets(tmp_path: Path) -> None:
    fabricate_run(tmp_path)
    places = set_places(runs_of(tmp_path)[0].folder)
    assert [name for name, _ in pick_classes([places], 2)] == ["zero", "two"]
    for n in range(CLASSES):
        fabricate_run(tmp_path, dataset=f"set{n}")
    shown = shown_classes(runs_of(tmp_path))
    assert sorted(one.dataset for one in shown) == ["digits", *(f"set{n}" for n in range(CLASSES))]


def test_the_classes_whose_prompts_changed_come_first(tmp_path: Path) -> None:
    fabricate_run(tmp_path, prompt=lambda name, epoch: name if name == "zero" else f"{name} {epoch}")
    places = set_places(runs_of(tmp_path)[0].folder)
    assert [name for name, _ in pick_classes([places], 2)] == ["one", "two"]


def places(*at: tuple[int, int]) -> list[SetPlace]:
    return [SetPlace(session=s, epoch=e, folder=Path("f"), judged=Path("j")) for s, e in at]


def test_of_a_session_the_ends_are_looked_at() -> None:
    all_sets = places((0, 0), (0, 1), (0, 2), (1, 0), (2, 0), (2, 1))
    assert ends(all_sets) == places((0, 0), (0, 2), (1, 0), (2, 0), (2, 1))


def test_long_strips_keep_their_beginning_and_their_end() -> None:
    sets = places(*((s, e) for s in range(1, 4) for e in range(10)))
    shown = [(place.session, place.epoch) for place in fitting(sets, 1)]
    assert shown == [(1, 0), (1, 1), (1, 2), (1, 3), (1, 4), (1, 5), (1, 6), (1, 8), (1, 9), (3, 9)]
    assert len(shown) == CARDS_PER_STRIP
    assert fitting(sets, 2) == places(*((2, e) for e in range(9)), (3, 9))
    few = places((1, 0), (1, 1), (2, 0), (2, 1))
    assert fitting(few, 1) == places((1, 0), (1, 1), (2, 1))


def test_spreading_keeps_the_last_and_no_item_twice() -> None:
    for length in range(1, 60):
        kept = spread(range(length), 10)
        assert len(kept) == len(set(kept)) == min(length, 10)
        assert (kept[0], kept[-1], kept) == (0, length - 1, sorted(kept))


def test_slots_that_were_rewritten_lead(tmp_path: Path) -> None:
    found = set_places(fabricate_run(tmp_path).folder)
    sets = [drawn_set(place, ["two"]) for place in found if place.session == 1]
    assert lead_slots(sets, "two") == ["two-0", "two-1"]  # both rewritten, the judged one first
    rows = sets[-1].images["two"]
    other = {**rows, "two-1": rows["two-1"].model_copy(update={"prompt": "once more"})}
    more = [*sets, sets[-1].model_copy(update={"images": {"two": other}})]
    assert lead_slots(more, "two") == ["two-1", "two-0"]


# ------------------------------------------------------------------------------------------ reading


def test_only_the_lines_of_the_classes_shown_are_parsed(tmp_path: Path) -> None:
    made = fabricate_run(tmp_path)
    place = set_places(made.folder)[0]
    path = place.folder / "manifest.jsonl"
    path.write_text(path.read_text().replace('"label":0', '"label":"broken"'))
    assert list(drawn_set(place, ["one"]).images["one"]) == ["one-0", "one-1"]
    with pytest.raises(StoreError, match=r"manifest\.jsonl, line 1, is not a AugmentedImage"):
        drawn_set(place, ["zero"])
    assert list(read_some(tmp_path / "missing.jsonl", AugmentedImage, None)) == []


def test_a_class_is_not_taken_for_another_whose_name_holds_it(tmp_path: Path) -> None:
    made = fabricate_run(tmp_path, prompt=lambda name, epoch: f'{name} unlike one and "two"')
    found = drawn_set(set_places(made.folder)[0], ["one"])
    assert {row.path.split("/")[0] for row in found.images["one"].values()} == {"one"}


def test_large_images_are_embedded_small(tmp_path: Path) -> None:
    Image.effect_noise((512, 256), 60).save(tmp_path / "large.png")
    Image.new("RGB", (32, 32)).save(tmp_path / "small.png")
    Image.effect_noise((96, 96), 90).save(tmp_path / "noise.png")
    large, small, noise = (embedded(tmp_path / f"{name}.png") for name in ("large", "small", "noise"))
    assert large.startswith("data:image/webp;base64,")
    assert noise.startswith("data:image/webp;base64,")
    assert max(len(large), len(noise)) < 2 * PICTURE_BYTES
    assert small.startswith("data:image/png;base64,")
