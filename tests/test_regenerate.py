"""Stage 6 with a fake generator: what is written, and what a memory that is too small or a kill leave."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flows.config import ExperimentConfig, load_config
from tasks import loading
from tasks.collapse import CollapseError
from tasks.context import EpochContext
from tasks.images import encoded, load_image
from tasks.records import ArtifactRef, AugmentationSet, AugmentedImage, Digest, ImageRef, LoopState, Session
from tasks.regenerate import regenerate
from tasks.shards import Drawn, Order, Shard, ShardDrawer, draw_parcel, drawn_by, packed
from tasks.store import digest_of, read_lines, write_json
from tasks.whereabouts import with_place

SIZE, SHOTS = 8, 7


class Fake:
    """Images whose red tells the batch they were drawn in, their green the seed; more than ``fits`` is halved.

    The blue is stripes, or, once it has collapsed, as flat as the rest for the first ``flat`` of each call.
    """

    def __init__(self, batch: int, fits: int, dies_after: int | None = None, flat: int = 0) -> None:
        self.batch, self.fits, self.dies_after, self.calls, self.flat = batch, fits, dies_after, 0, flat

    def use_adapter(self, folder: Path | None) -> None:
        assert folder is None

    def draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        self.calls += 1
        if self.dies_after is not None and self.calls > self.dies_after:
            raise KeyboardInterrupt
        while self.batch > self.fits:
            self.batch //= 2
        images = torch.zeros(len(prompts), 3, SIZE, SIZE)
        images[:, 0] = self.batch / 255
        images[:, 1] = torch.tensor([seed % 251 / 255 for seed in seeds])[:, None, None]
        images[self.flat :, 2, :, ::2] = 1
        return images


class Place:
    """One session of one class in a store of its own."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.monkeypatch = root, monkeypatch
        train = tuple(
            ImageRef(id=f"o{n}", path=f"{n}.png", digest=Digest(f"o{n}"), label=0) for n in range(SHOTS)
        )
        session = Session(
            index=0, new_classes=(0,), seen_classes=(0,), train=train, val=(), test=(), val_rule="leave_one_out"
        )  # fmt: skip
        (root / "stages" / "before" / "0").mkdir(parents=True)
        write_json(root / "stages" / "before" / "0" / "session.json", session)

    def config(self, *overrides: str) -> ExperimentConfig:
        fixed = [
            "generator.batch=4",
            f"generator.size={SIZE}",
            "augmenter.min_per_class=1",
            "runtime.threads=1",
            *overrides,
        ]
        return load_config([f"runtime.state={self.root}", "method=fixed_sd", *fixed])

    def draw(self, fake: Fake, *overrides: str) -> tuple[AugmentationSet, list[AugmentedImage], Path]:
        config = self.config(*overrides)
        session = self.root / "stages" / "before" / "0" / "session.json"
        context = EpochContext(
            run="r", seed=0, session=0, epoch=0,
            session_ref=ArtifactRef(path="before/0/session.json", digest=digest_of(session), kind="session"),
            start=LoopState(), class_names=("bird",), n_base=1, dataset=config.dataset, runtime=config.runtime,
        )  # fmt: skip
        self.monkeypatch.setattr(loading, "_generator", lambda *_: fake)
        drawn = regenerate.fn(context, 0, config.augmenter, config.generator, None, None).output
        rows = read_lines(context.store.locate(drawn.manifest), AugmentedImage)
        return drawn, rows, context.store.locate(drawn.images)

    def partial(self) -> list[str]:
        return sorted(path.name for path in self.root.glob("stages/regenerate/*.partial/shard-*"))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    return Place(tmp_path, monkeypatch)


def batches(rows: list[AugmentedImage], images: Path) -> set[int]:
    return {round(float(load_image(images / row.path, None)[0, 0, 0]) * 255) for row in rows}


@pytest.mark.parametrize("kind", ["png", "webp"])
def test_images_are_stored_as_chosen_without_loss(place: Place, kind: str) -> None:
    drawn, rows, images = place.draw(Fake(4, fits=4), f"generator.format={kind}")
    assert drawn.count == len(rows) == SHOTS
    assert drawn.batch_shape == (4, 3, SIZE, SIZE)
    assert {Path(row.path).suffix for row in rows} == {f".{kind}"}
    assert all(digest_of(images / row.path) == row.digest for row in rows)
    for row in rows:
        assert round(float(load_image(images / row.path, None)[1, 0, 0]) * 255) == row.seed % 251
    assert not list(images.parent.glob("shard-*"))


def test_the_record_keeps_the_batch_that_fitted_and_all_images_share_it(place: Place) -> None:
    drawn, rows, images = place.draw(Fake(4, fits=2))
    assert drawn.batch_shape == (2, 3, SIZE, SIZE)
    assert batches(rows, images) == {2}


def test_memory_that_runs_short_on_the_way_begins_the_set_anew(place: Place) -> None:
    fake = Fake(4, fits=4)
    draw = fake.draw

    def shrinking(prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        fake.fits = 4 if fake.calls == 0 else 1
        return draw(prompts, seeds)

    fake.draw = shrinking  # type: ignore[method-assign]
    drawn, rows, images = place.draw(fake)
    assert drawn.batch_shape == (1, 3, SIZE, SIZE)
    assert batches(rows, images) == {1}
    assert fake.calls == 4, "one shard, the one that did not fit, and both again"


def test_a_killed_attempt_is_taken_up_with_the_batch_that_fitted(place: Place) -> None:
    with pytest.raises(KeyboardInterrupt):
        place.draw(Fake(4, fits=2, dies_after=1))
    assert place.partial() == ["shard-2-000000.jsonl"]
    fresh = Fake(4, fits=4)  # another process, with more memory left
    drawn, rows, images = place.draw(fresh)
    assert fresh.calls == 1, "the sealed shard is not drawn again"
    assert drawn.batch_shape == (2, 3, SIZE, SIZE)
    assert batches(rows, images) == {2}


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def short_of_a_line(path: Path) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]))


@pytest.mark.parametrize(
    "damage", [flipped, Path.unlink, lambda path: path.write_bytes(b""), short_of_a_line]
)
@pytest.mark.parametrize("which", ["images/bird/*.png", "shard-*.jsonl"])
def test_a_shard_that_a_power_cut_damaged_is_drawn_again(
    place: Place, which: str, damage: Callable[[Path], None]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        place.draw(Fake(4, fits=4, dies_after=1))
    damage(min(place.root.glob(f"stages/regenerate/*.partial/{which}")))
    fresh = Fake(4, fits=4)
    _, rows, images = place.draw(fresh)
    assert fresh.calls == 2
    assert len(rows) == SHOTS
    assert [digest_of(images / row.path) for row in rows] == [row.digest for row in rows]


def test_a_collapsed_generator_s_set_is_not_sealed(place: Place) -> None:
    with pytest.raises(CollapseError, match=r"7 of 7 generated images are near-constant \(bird 7") as caught:
        place.draw(Fake(4, fits=4, flat=4))
    assert with_place(caught.value).startswith("regenerate: 7 of 7")
    assert not [path for path in place.root.glob("stages/regenerate/*") if path.suffix != ".partial"]


def test_few_blank_images_are_told_and_kept(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    drawn, _, _ = place.draw(Fake(4, fits=4, flat=1))
    assert drawn.count == SHOTS
    assert "2 of 7 generated images are near-constant (bird 2" in caplog.text


# ------------------------------------------------------------------------------------------ drawn elsewhere


def workers(fits: list[int]) -> ShardDrawer:
    """Draws as :class:`Fake` does, each shard on the next worker, of which each has a memory of its own."""
    memories = iter(fits)

    def elsewhere(order: Order, shards: Sequence[Shard]) -> Iterator[Drawn]:
        for shard in shards:
            fake = Fake(shard.batch, next(memories))
            files = tuple(encoded(image, ".png") for image in fake.draw(shard.prompts, shard.seeds))
            yield Drawn(start=shard.start, batch=fake.batch, files=files)

    return elsewhere


@pytest.mark.parametrize(("fits", "batch"), [([4, 4], 4), ([4, 2, 4, 4], 2), ([2, 4, 4], 2)])
def test_shards_drawn_elsewhere_share_one_batch_and_are_what_one_process_draws(
    place: Place, tmp_path: Path, fits: list[int], batch: int
) -> None:
    with drawn_by(workers(fits)):
        drawn, rows, images = place.draw(Fake(4, fits=0))  # this process could not even draw one
    assert drawn.batch_shape == (batch, 3, SIZE, SIZE)
    assert batches(rows, images) == {batch}
    (tmp_path / "here").mkdir()
    alone, _, _ = Place(tmp_path / "here", place.monkeypatch).draw(Fake(4, fits=batch))
    assert alone == drawn


def test_a_parcel_carries_the_adapter_and_refuses_other_weights(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "stages" / "tune_lora" / "0" / "adapter"
    folder.mkdir(parents=True)
    (folder / "weights").write_bytes(b"lora")
    adapter = ArtifactRef(path="tune_lora/0/adapter", digest=digest_of(folder), kind="adapter")
    config = place.config()
    context = EpochContext(
        run="r", seed=0, session=0, epoch=1, session_ref=adapter, start=LoopState(), class_names=("bird",),
        n_base=1, dataset=config.dataset, runtime=config.runtime,
    )  # fmt: skip
    seen: list[bytes] = []

    class Adapted(Fake):
        def use_adapter(self, folder: Path | None) -> None:
            assert folder is not None
            assert tmp_path not in folder.parents
            seen.append((folder / "weights").read_bytes())

    monkeypatch.setattr(loading, "_generator", lambda *_: Adapted(4, fits=4))
    parcel = packed(Order(context=context, generator=config.generator, adapter=adapter))
    shard = Shard(start=0, prompts=("a bird",), seeds=(9,), batch=4)
    assert len(draw_parcel(parcel, shard).files) == 1
    assert seen == [b"lora"]
    with pytest.raises(ValueError, match="same weights on every machine"):
        draw_parcel(parcel.model_copy(update={"weights": Digest("other")}), shard)
