"""Shards that threads draw side by side are, bit for bit, those that one thread draws one after another."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from flows.config import load_config
from tasks import loading
from tasks.collapse import CollapseError
from tasks.context import EpochContext
from tasks.diffusion import adapters
from tasks.diffusion.generator import GeneratorSettings, StableDiffusion
from tasks.diffusion.recording import Recorder
from tasks.loading import generator_for
from tasks.records import ArtifactRef, Digest, LoopState
from tasks.shards import Drawn, Order, Shard, draw_shards
from tasks.store import digest_of

BATCH = 4
WORDS = ("one", "two", "three", "a red seven", "a handwritten four", "five", "the digit nine")


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def order_at(root: Path, threads: int | None, adapter: ArtifactRef | None = None, *more: str) -> Order:
    where = [f"runtime.state={root}", f"runtime.threads={'null' if threads is None else threads}"]
    config = load_config(
        ["dataset=digits", "method=guided", "generator.steps=5", f"generator.batch={BATCH}", *where, *more]
    )
    context = EpochContext(
        run="r", seed=0, session=0, epoch=0,
        session_ref=ArtifactRef(path="before/0/session.json", digest=Digest("d"), kind="session"),
        start=LoopState(), class_names=("one",), n_base=1, dataset=config.dataset, runtime=config.runtime,
    )  # fmt: skip
    return Order(context=context, generator=config.generator, adapter=adapter)


def shards(count: int) -> list[Shard]:
    """The last is smaller than a batch."""
    numbers = list(range(count * BATCH - 1))
    return [
        Shard(
            start=start,
            prompts=tuple(WORDS[n % len(WORDS)] for n in numbers[start : start + BATCH]),
            seeds=tuple(numbers[start : start + BATCH]),
            batch=BATCH,
        )
        for start in range(0, len(numbers), BATCH)
    ]


@pytest.fixture
def adapter(tmp_path: Path) -> ArtifactRef:
    """An adapter that shows in every image."""
    folder = tmp_path / "stages" / "tune_lora" / "0" / "adapter"
    folder.mkdir(parents=True)
    order = order_at(tmp_path, 1)
    model = generator_for(order.context, order.generator, None)
    torch.manual_seed(0)
    for parameter in model.begin_tuning(4, 4, 0):
        parameter.data += 0.05 * torch.randn_like(parameter)
    adapters.save(model.unet, folder)
    return ArtifactRef(path="tune_lora/0/adapter", digest=digest_of(folder), kind="adapter")


def test_bit_for_bit_with_and_without_an_adapter(
    tmp_path: Path, adapter: ArtifactRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Recorder.__init__, "__defaults__", (8,))  # recorded once seen so often
    work = shards(16)
    for used in (None, adapter):
        loading._generators.clear()
        one = list(draw_shards(order_at(tmp_path, 1, used), work))
        loading._generators.clear()
        assert list(draw_shards(order_at(tmp_path, 3, used), work)) == one
        models = list(loading._generators.values())
        assert [bool(model.recorder and model.recorder._recordings) for model in models] == [True] * 3
        assert list(draw_shards(order_at(tmp_path, 3, used), work[7:8])) == one[7:8], "one that a kill left"
        assert [drawn.start for drawn in one] == [shard.start for shard in work]
    assert list(draw_shards(order_at(tmp_path, 3), work)) != one, (
        "the adapter changes images, and does not stay"
    )


def test_each_thread_has_a_generator_of_its_own_and_one_core(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(2)
    seen: set[tuple[int, int, int]] = set()
    draw = StableDiffusion.draw

    def watched(self: StableDiffusion, prompts: list[str], seeds: list[int]) -> torch.Tensor:
        seen.add((id(self), torch.get_num_threads(), threading.get_ident()))
        return draw(self, prompts, seeds)

    monkeypatch.setattr(StableDiffusion, "draw", watched)
    list(draw_shards(order_at(tmp_path, None), shards(6)))
    assert {threads for _, threads, _ in seen} == {1}
    assert len({model for model, _, _ in seen}) == 2
    assert len({thread for _, _, thread in seen}) == 2
    assert torch.get_num_threads() == 2, "what comes after has all of them again"
    seen.clear()
    list(draw_shards(order_at(tmp_path, None, None, "generator.size=256"), shards(1)))
    assert {threads for _, threads, _ in seen} == {2}, "the operations of a large image are shared"


def test_no_generator_is_loaded_while_another_one_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading one makes new parameters of all modules in the process meta tensors for a while."""
    drawing: list[int] = []
    made: list[int] = []
    draw, load = StableDiffusion.draw, StableDiffusion.from_settings

    def watched(self: StableDiffusion, prompts: list[str], seeds: list[int]) -> torch.Tensor:
        drawing.append(seeds[0])
        try:
            return draw(self, prompts, seeds)
        finally:
            drawing.remove(seeds[0])

    def alone(settings: GeneratorSettings, device: torch.device) -> StableDiffusion:
        assert drawing == []
        made.append(1)
        return load(settings, device)

    monkeypatch.setattr(StableDiffusion, "draw", watched)
    monkeypatch.setattr(StableDiffusion, "from_settings", alone)
    loading._generators.clear()
    assert len(list(draw_shards(order_at(tmp_path, 3), shards(6)))) == 6
    assert len(made) == 3


def test_the_first_shard_that_fails_ends_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def broken(self: StableDiffusion, prompts: list[str], seeds: list[int]) -> torch.Tensor:
        calls.append(seeds[0])
        return torch.full((len(prompts), 3, 32, 32), torch.nan if seeds[0] == 2 * BATCH else 0.5)

    monkeypatch.setattr(StableDiffusion, "draw", broken)
    found: list[Drawn] = []
    with pytest.raises(CollapseError):
        found.extend(draw_shards(order_at(tmp_path, 2), shards(200)))
    assert len(calls) < 100
