"""Images from a provider over real HTTP: what is asked, kept, paid and refused; and the row that trains on them."""

import base64
import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from provider import Act, Provider, image_of, providing, refusal

from flows.config import ConfigError, ExperimentConfig, load_config
from tasks.context import EpochContext
from tasks.records import (
    ArtifactRef,
    AugmentationSet,
    AugmentedImage,
    Digest,
    ImageRef,
    LoopState,
    Session,
    StageRecord,
    Usage,
)
from tasks.regenerate import regenerate
from tasks.store import read_lines, write_json
from tasks.vlm.images_api import ImagesApi, ImagesApiSettings
from tasks.vlm.pacing import Backoff
from tasks.vlm.transport import BudgetError, VlmError, VlmUnavailableError

SETTINGS = ImagesApiSettings(
    base_url=None, api_key_env=None, timeout_s=5, max_retries=2, concurrency=2, requests_per_minute=None,
    tokens_per_minute=None, price_in=None, price_out=None, price_image=0.5, max_cost=None, model="painter-1",
    ask_size="64x64", quality="low", response_format=None, size=16, format="png", batch=4, every_epoch=False,
)  # fmt: skip
AT_ONCE = Backoff(first_s=0.01, limit_s=0.02)


def api(provider: Provider, folder: Path, **changes: object) -> ImagesApi:
    settings = SETTINGS.model_copy(update={"base_url": provider.base_url, **changes})
    return ImagesApi(settings, folder / "images", folder / "paid.jsonl", AT_ONCE)


def test_what_is_asked_and_what_comes_of_it(tmp_path: Path) -> None:
    with providing() as provider:
        images = api(provider, tmp_path).draw(["a cat", "a cat", "a longer prompt"], [1, 2, 1])
        assert provider.sent[0] == {
            "prompt": "a cat", "model": "painter-1", "size": "64x64", "n": 1, "quality": "low"
        }  # fmt: skip
    assert images.shape == (3, 3, 16, 16)
    assert torch.allclose(images[:, 0, 0, 0] * 255, torch.tensor([5.0, 5.0, 15.0]))


def test_an_image_is_paid_for_once_by_prompt_and_number(tmp_path: Path) -> None:
    with providing() as provider:
        prompts, seeds = ["a", "a", "b", "a"], [1, 2, 1, 1]
        first = api(provider, tmp_path)
        images = first.draw(prompts, seeds)
        again = api(provider, tmp_path)
        assert torch.equal(again.draw(prompts, seeds), images)
        assert provider.billed == {"a": 2, "b": 1}
        assert again.paid == first.paid == Usage(calls=3, prompt_tokens=30, completion_tokens=600, cost=1.5)
        assert again.usage_of(prompts, seeds) == first.paid
        api(provider, tmp_path, quality="high").draw(["a"], [1])
        assert provider.billed["a"] == 3


def test_prices_are_by_image_by_token_or_both() -> None:
    usage = Usage(calls=2, prompt_tokens=1_000_000, completion_tokens=500_000)
    by_token = {"price_in": 1.0, "price_out": 4.0}
    priced = [SETTINGS.model_copy(update=u) for u in ({}, by_token, {**by_token, "price_image": None})]
    assert [settings.cost(usage) for settings in priced] == [1.0, 4.0, 3.0]
    assert SETTINGS.model_copy(update={"price_image": None}).cost(usage) is None


def test_trouble_passes_and_what_was_drawn_is_kept(tmp_path: Path) -> None:
    broken = {"created": 0, "data": [{"b64_json": base64.b64encode(b"no picture").decode()}]}
    plan = [refusal(429, retry_after="0"), Act(drop=True), Act(body=broken), Act(), refusal(400, "not that")]
    with providing(*plan) as provider:
        with pytest.raises(VlmError, match=r"image model .* did not answer: BadRequestError.*not that"):
            api(provider, tmp_path, concurrency=1, max_retries=3).draw(["a", "b", "c"], [1, 1, 1])
        assert api(provider, tmp_path).draw(["a", "b", "c"], [1, 1, 1]).shape[0] == 3
        assert provider.billed == {"a": 1, "b": 1, "c": 1}


def png_of(width: int, height: int, rows: bytes) -> bytes:
    """A picture that says it has this size, and holds these packed rows."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def sent(*pictures: bytes) -> Act:
    return Act(
        body={"created": 0, "data": [{"b64_json": base64.b64encode(one).decode()} for one in pictures]}
    )


GOOD = png_of(1, 1, b"\0\1\2\3")


@pytest.mark.parametrize(
    ("act", "says"),
    [
        (sent(png_of(30_000, 30_000, b"\0")), "no picture that can be read"),
        (sent(png_of(64, 64, b"\0" * 100)), "no picture that can be read"),
        (sent(GOOD[:44]), "no picture that can be read"),
        (sent(), r"no image \(data"),
        (sent(GOOD, GOOD), r"no image \(data"),
        (Act(body={"data": [{"b64_json": 5}]}), r"no image \(data\.0\.b64_json"),
        (Act(body={"error": {"message": "billing"}}), "an error in place of an answer: billing"),
        (Act(flood=80 * 2**20), "more than 67,108,864 bytes"),
    ],
    ids=["bomb", "damaged within", "cut", "none", "two", "a number", "an error", "80 MB"],
)
def test_what_is_no_image_is_asked_for_again_and_never_kept(act: Act, says: str, tmp_path: Path) -> None:
    with providing(act) as provider:
        assert api(provider, tmp_path, timeout_s=60).draw(["a"], [1]).shape == (1, 3, 16, 16)
        assert provider.billed == {"a": 1}
    with providing(act) as provider, pytest.raises(VlmError, match=f"image model at .* sent .*{says}"):
        api(provider, tmp_path, timeout_s=60, max_retries=0).draw(["b"], [1])
    assert len(list(tmp_path.rglob("*.image"))) == 1


@pytest.mark.parametrize(
    "damage",
    [Path.unlink, lambda path: path.write_bytes(b""), lambda path: path.write_bytes(path.read_bytes()[:-9])],
    ids=["missing", "empty", "cut"],
)
@pytest.mark.parametrize("suffix", ["image", "json"])
def test_an_image_that_is_not_as_it_was_kept_is_bought_again_and_no_other(
    damage: Callable[[Path], object], suffix: str, tmp_path: Path
) -> None:
    with providing() as provider:
        drawn = api(provider, tmp_path).draw(["a", "b"], [1, 2])
        damage(min(tmp_path.rglob(f"*.{suffix}")))
        assert torch.equal(api(provider, tmp_path).draw(["a", "b"], [1, 2]), drawn)
        assert sorted(provider.billed.values()) == [1, 2]
        assert api(provider, tmp_path).usage_of(["a", "b"], [1, 2]).calls == 2


@pytest.mark.parametrize("usage", [7, {"input_tokens": None, "output_tokens": "many"}])
def test_absurd_counts_cost_no_image(usage: object, tmp_path: Path) -> None:
    with providing(Act(body={**image_of("a"), "usage": usage})) as provider:
        drawer = api(provider, tmp_path)
        assert drawer.draw(["a"], [1]).shape == (1, 3, 16, 16)
        assert drawer.paid == Usage(calls=1, cost=0.5)


@pytest.mark.parametrize("harm", ["cut", "bomb"])
def test_a_picture_that_cannot_be_decoded_is_not_kept_but_asked_for_again(tmp_path: Path, harm: str) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (90, 90), "red").save(buffer, "JPEG")
    data = buffer.getvalue()
    if harm == "cut":
        data = data[: len(data) * 2 // 3]  # its header is whole
    else:
        at = data.index(b"\xff\xc0") + 5
        data = data[:at] + struct.pack(">HH", 30_000, 30_000) + data[at + 4 :]
    broken = {"created": 0, "data": [{"b64_json": base64.b64encode(data).decode()}]}
    with providing(Act(body=broken)) as provider:
        assert api(provider, tmp_path).draw(["a"], [1]).shape[0] == 1
        assert len(provider.sent) == 2


def test_an_address_in_place_of_an_image_is_not_asked_for_again(tmp_path: Path) -> None:
    with providing(Act(body={"created": 0, "data": [{"url": "http://x/y.png"}]})) as provider:
        with pytest.raises(VlmError, match=r"set images_api\.response_format=b64_json"):
            api(provider, tmp_path).draw(["a"], [1])
        assert len(provider.sent) == 1


def test_the_budget_stops_and_a_higher_one_goes_on(tmp_path: Path) -> None:
    prompts, seeds = [f"p{n}" for n in range(6)], [1] * 6
    with providing() as provider:
        with pytest.raises(BudgetError, match=r"images_api\.max_cost=1\.7 .* has spent 1\.5 on 3 answers"):
            api(provider, tmp_path, max_cost=1.7, concurrency=1).draw(prompts, seeds)
        api(provider, tmp_path, max_cost=3.0).draw(prompts, seeds)
        assert sum(provider.billed.values()) == len(provider.billed) == 6


def test_nobody_there_is_found_by_the_check(tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"base_url": "http://127.0.0.1:9/v1"})
    with pytest.raises(
        VlmUnavailableError, match=r"no image model answers at .*correct images_api\.base_url"
    ):
        ImagesApi(settings, tmp_path).check()


# ------------------------------------------------------------------------------------------ the row


def row(provider: Provider, state: Path, *more: str) -> ExperimentConfig:
    return load_config(
        [
            "method=gpt4o_images", "augmenter.min_per_class=3", "images_api.api_key_env=null", "images_api.size=8",
            f"images_api.base_url={provider.base_url}", "images_api.batch=2", "images_api.price_image=0.25",
            "images_api.max_retries=0", f"runtime.state={state}", "runtime.device=cpu", *more,
        ]
    )  # fmt: skip


def context_of(config: ExperimentConfig) -> EpochContext:
    ref = ArtifactRef(path="split/0/session.json", digest=Digest("d"), kind="session")
    file = config.runtime.state / "stages" / ref.path
    file.parent.mkdir(parents=True, exist_ok=True)
    train = tuple(
        ImageRef(id=f"{c}-{n}", path=f"{c}/{n}.png", digest=Digest(f"{c}{n}"), label=c)
        for c in (0, 1)
        for n in (0, 1)
    )
    session = Session(
        index=0,
        new_classes=(0, 1),
        seen_classes=(0, 1),
        train=train,
        val=(),
        test=(),
        val_rule="leave_one_out",
    )
    write_json(file, session)
    return EpochContext(
        run="digits/gpt4o_images/seed-0", seed=0, session=0, epoch=0, session_ref=ref, start=LoopState(),
        class_names=("zero", "one"), n_base=2, dataset=config.dataset, runtime=config.runtime,
    )  # fmt: skip


def drawn(config: ExperimentConfig, context: EpochContext, epoch: int) -> StageRecord[AugmentationSet]:
    return regenerate.fn(context, epoch, config.augmenter, config.drawer, None, None)


def rows_of(config: ExperimentConfig, record: StageRecord[AugmentationSet]) -> list[AugmentedImage]:
    return read_lines(config.runtime.state / "stages" / record.output.manifest.path, AugmentedImage)


def test_the_row_draws_pays_resumes_and_shares_its_images_between_epochs(tmp_path: Path) -> None:
    with providing(*[Act()] * 4, refusal(400, "busy")) as provider:
        config = row(provider, tmp_path)
        context = context_of(config)
        with pytest.raises(VlmError, match="busy"):
            drawn(config, context, 0)
        first = drawn(config, context, 0)
        assert provider.billed == {"A picture of a zero": 3, "A picture of a one": 3}
        assert (first.output.count, first.output.usage.calls, first.output.usage.cost) == (6, 6, 1.5)
        later = context.model_copy(update={"start": LoopState(augmentation=first.output)})
        second = drawn(config, later, 1)
        assert sum(provider.billed.values()) == 6
        assert "usage" not in second.output.model_dump()
        one, two = rows_of(config, first), rows_of(config, second)
        assert [(r.slot, r.digest, r.seed) for r in one] == [(r.slot, r.digest, r.seed) for r in two]
        assert one[0].id != two[0].id == "s00-e001-000-0000"
        anew = row(provider, tmp_path, "images_api.every_epoch=true")
        assert drawn(anew, later, 1).output.usage.calls == 6
        assert sum(provider.billed.values()) == 12
    paid = (tmp_path / "runs" / context.run / "images-paid.jsonl").read_text().splitlines()
    assert len(paid) == 12


def test_only_what_can_change_an_image_is_in_its_identity() -> None:
    same = {
        "concurrency": 9,
        "price_image": 9.0,
        "max_cost": 9.0,
        "base_url": "http://x/v1",
        "timeout_s": 9.0,
    }
    assert SETTINGS.model_copy(update=same).identity == SETTINGS.identity
    for change in (
        {"model": "x"},
        {"quality": None},
        {"ask_size": "auto"},
        {"size": 8},
        {"every_epoch": True},
    ):
        assert SETTINGS.model_copy(update=change).identity != SETTINGS.identity


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["augmenter=images_api", "method=finetune"], "add images_api=openai"),
        (["method=gpt4o_images", "augmenter.prompts=rewritten"], "cannot learn from failures"),
        (["method=gpt4o_images", "augmenter.tuning=guided"], "cannot learn from failures"),
        (["method=gpt4o_images", "images_api.max_cost=3"], r"images_api\.max_cost=3 needs prices"),
        (["method=gpt4o_images", "images_api.ask_size=large"], r"images_api\.ask_size"),
    ],
)
def test_settings_that_do_not_fit_are_refused(overrides: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_config(overrides)


def test_a_higher_limit_or_another_price_is_the_same_run() -> None:
    usual, other = (
        load_config(
            [
                "method=gpt4o_images",
                f"images_api.price_image={p}",
                f"images_api.max_cost={p}",
                f"vlm.concurrency={p}",
            ]
        )
        for p in (1, 2)
    )
    assert usual.identity == other.identity
    assert load_config(["method=fixed_sd"]).identity.get("images_api") is None


def test_the_provider_of_the_tests_sends_a_picture() -> None:
    assert image_of("abc")["data"][0]["b64_json"].startswith("iVBOR")
