"""docs/cost.md against the shipped settings: its counts of images and the hours that follow from them."""

from itertools import accumulate

import pytest

from flows.config import load_config
from tasks.augmentation import first_slots
from tasks.records import Digest, ImageRef, Session
from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "cost.md").read_text(encoding="utf-8")
RATE = 2.4  # images a second, as the page says
BASE_IMAGES = {"cub200": 30, "cifar100": 500, "miniimagenet": 500}  # of a class, published lists
ROWS = ("fixed_sd", "random", "first", "sd_vlm", "vlm", "guided")
SEEDS = 5


def images(dataset: str, method: str) -> tuple[int, int]:
    """Images of an epoch of the base session, and of all epochs of all sessions."""
    config = load_config([f"dataset={dataset}", f"method={method}", "generator=sd15", "vlm=openai"])
    data, epochs = config.dataset, config.stopping.max_epochs
    assert data.k_shot is not None
    held = round(data.holdout * BASE_IMAGES[dataset])
    ways = [data.n_base, *[data.n_way] * data.n_sessions]
    names = [f"class {label}" for label in range(sum(ways))]
    drawn = []
    for index, seen in enumerate(accumulate(ways)):
        shots = data.k_shot if index else BASE_IMAGES[dataset] - held
        new = range(seen - ways[index], seen)
        train = tuple(
            ImageRef(id=f"{label}/{n}", path=f"{label}/{n}.png", digest=Digest("0"), label=label)
            for label in new
            for n in range(shots)
        )
        session = Session(
            index=index, new_classes=tuple(new), seen_classes=tuple(range(seen)), train=train, val=(), test=(),
            val_rule="holdout",
        )  # fmt: skip
        drawn.append(len(first_slots(session, names, config.augmenter, ())))
    return drawn[0], epochs * sum(drawn)


@pytest.mark.parametrize("dataset", BASE_IMAGES)
def test_images_and_hours_of_one_row(dataset: str) -> None:
    base, all_sessions = images(dataset, "guided")
    hours = all_sessions / RATE / 3600
    assert f"| {dataset} | {base:,} | {all_sessions:,} | {hours:.1f} | {hours / 8:.1f} |" in PAGE


def test_the_tables_as_a_whole() -> None:
    total = SEEDS * sum(images(dataset, row)[1] for dataset in BASE_IMAGES for row in ROWS)
    hours = total / RATE / 3600
    assert f"**{total:,} images**" in PAGE
    assert f"| 1 GPU | {hours:,.0f} | {2 * hours:,.0f} USD |" in PAGE
    assert f"| 8 GPUs | {hours / 8:,.0f} | {2 * hours:,.0f} USD |" in PAGE
    least = sum(images(dataset, row)[1] for dataset in BASE_IMAGES for row in ("fixed_sd", "guided"))
    assert f"| {least / RATE / 3600:.0f} | {2 * least / RATE / 3600:.0f} USD |" in PAGE
