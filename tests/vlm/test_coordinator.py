import pytest
from fake_vlm import SETTINGS, FakeVlm, image, pair

from tasks.records import Usage
from tasks.vlm.client import Picture, Request
from tasks.vlm.coordinator import CHUNK, Coordinator, JudgeResult, PairToJudge
from tasks.vlm.prompts import COMPARE, DESCRIBE


def names(**values: int) -> dict[str, str]:
    return {Picture.of(image(value), 64).digest: name for name, value in values.items()}


def judge(client: FakeVlm, *pairs: PairToJudge) -> JudgeResult:
    return Coordinator(client, SETTINGS).judge_all(pairs, lambda _prompt: True)


def test_eq_1_one_difference_rewrites_and_none_keeps() -> None:
    vlm = FakeVlm(names(dog=1, cat=2))
    result = judge(vlm, pair("a", 1, {"o1": 1, "o2": 2}), pair("b", 2, {"o2": 2}))
    semantic, detail = result.verdicts
    assert [c.answer for c in semantic.comparisons] == ["similar", "different"]
    assert (semantic.level, semantic.prompt_next, semantic.target_id) == ("semantic", "like cat", "o2")
    assert (detail.level, detail.prompt_next, detail.target_id) == ("detail", "A picture of 0", None)


def test_without_originals_the_sum_of_eq_1_is_empty_and_the_prompt_stays() -> None:
    (verdict,) = judge(FakeVlm(names(dog=1)), pair("a", 1, {})).verdicts
    assert (verdict.level, verdict.prompt_next, verdict.comparisons) == ("detail", "A picture of 0", ())


def test_nothing_to_judge_asks_nothing() -> None:
    result = judge(FakeVlm({}))
    assert result == JudgeResult([], [], Usage(), 0)


def test_each_image_is_captioned_once_and_each_caption_pair_judged_once() -> None:
    vlm = FakeVlm(names(dog=1, cat=2) | {Picture.of(image(3), 64).digest: "cat"})
    originals = {"o1": 2, "o2": 3, "o3": 2}  # o3 is the same picture as o1, o2 has the same caption
    result = judge(vlm, pair("a", 1, originals), pair("b", 1, originals), pair("c", 2, originals))
    assert vlm.count(DESCRIBE) == 3
    assert vlm.count(COMPARE) == 2  # (dog, cat) and (cat, cat) for nine comparisons
    assert sum(len(v.comparisons) for v in result.verdicts) == 9
    assert result.usage == Usage(calls=6, prompt_tokens=60, completion_tokens=12)
    assert [e.messages[-1].content[0]["text"] for e in result.exchanges[:5]] == [DESCRIBE] * 3 + [COMPARE] * 2


def test_rewritings_spread_over_the_originals_that_differ() -> None:
    vlm = FakeVlm(names(dog=1, cat=2, cow=3, hen=4))
    pairs = [pair(f"a{n}", 1, {"o0": 1, "o1": 2, "o2": 3, "o3": 4}) for n in range(4)]
    other = pair("b", 1, {"p1": 2, "p2": 3}, label=1)
    verdicts = judge(vlm, *pairs, other).verdicts
    assert [v.target_id for v in verdicts] == ["o1", "o2", "o3", "o1", "p1"]
    assert [v.prompt_next for v in verdicts] == ["like cat", "like cow", "like hen", "like cat", "like cat"]


def test_the_current_prompt_stands_in_the_request_for_a_new_one() -> None:
    vlm = FakeVlm(names(dog=1, cat=2))
    judge(vlm, PairToJudge("a", image(1), "a dog by the sea", 0, [("o", image(2))]))
    assert 'the first image is "a dog by the sea".' in vlm.asked[-1].messages[-1].text


def test_an_unparsed_answer_is_asked_once_more_then_similar_and_counted() -> None:
    vlm = FakeVlm(names(dog=1, cat=2, cow=3), lambda _a, b, _n: "NO" if b == "cow" else "Hard to say")
    result = judge(vlm, pair("a", 1, {"o1": 2}), pair("b", 1, {"o1": 2, "o2": 3}))
    assert [r.sample for r in vlm.asked if r.messages[-1].text == COMPARE] == [0, 0, 1]
    assert [c.answer for v in result.verdicts for c in v.comparisons] == ["unparsed", "unparsed", "different"]
    assert [(v.level, v.target_id) for v in result.verdicts] == [("detail", None), ("semantic", "o2")]
    assert result.unparsed == 2


def test_a_second_answer_that_parses_counts() -> None:
    vlm = FakeVlm(names(dog=1, cat=2), lambda _a, _b, sample: "NO" if sample else "")
    result = judge(vlm, pair("a", 1, {"o1": 2}))
    assert (result.verdicts[0].level, result.unparsed) == ("semantic", 0)


def test_without_a_caption_there_is_no_judgement() -> None:
    vlm = FakeVlm({Picture.of(image(1), 64).digest: "  ", Picture.of(image(2), 64).digest: "cat"})
    result = judge(vlm, pair("a", 1, {"o": 2}))
    assert (vlm.count(DESCRIBE), vlm.count(COMPARE)) == (3, 0)  # the silent one was asked twice
    assert (result.verdicts[0].level, result.unparsed) == ("detail", 1)


def test_a_rewriting_that_says_nothing_keeps_the_prompt_but_stays_semantic() -> None:
    class Silent(FakeVlm):
        def text(self, request: Request) -> str:
            text = super().text(request)
            return "" if text.startswith('"like') else text

    (verdict,) = judge(Silent(names(dog=1, cat=2)), pair("a", 1, {"o": 2})).verdicts
    assert (verdict.level, verdict.prompt_next) == ("semantic", "A picture of 0")


def test_rewritten_prompts_are_kept_under_the_encoders_limit() -> None:
    vlm = FakeVlm(names(dog=1) | {Picture.of(image(2), 64).digest: "cat " * 50})
    result = Coordinator(vlm, SETTINGS).judge_all(
        [pair("a", 1, {"o": 2})], lambda prompt: len(prompt.split()) <= 5
    )
    assert result.verdicts[0].prompt_next == "like cat cat cat cat"


def test_with_fixed_prompts_levels_stay_and_no_rewriting_is_asked_for() -> None:
    vlm = FakeVlm(names(dog=1, cat=2))
    pairs = [pair("a", 1, {"o1": 1, "o2": 2}), pair("b", 2, {"o2": 2})]
    result = Coordinator(vlm, SETTINGS).judge_all(pairs, None)
    assert (len(vlm.asked), vlm.count(DESCRIBE), vlm.count(COMPARE)) == (5, 2, 3)
    semantic, detail = result.verdicts
    assert (semantic.level, semantic.prompt_next, semantic.target_id) == ("semantic", "A picture of 0", None)
    assert (detail.level, detail.prompt_next) == ("detail", "A picture of 0")


def test_many_images_go_in_chunks_and_progress_reaches_its_total() -> None:
    count = CHUNK + 10
    vlm = FakeVlm(names(**{f"n{v}": v for v in range(count)}))
    told: list[tuple[str, int, int]] = []
    pairs = [pair(f"a{v}", v, {"o": 0}) for v in range(1, count)]
    result = Coordinator(vlm, SETTINGS).judge_all(pairs, lambda _p: True, lambda *step: told.append(step))
    assert vlm.count(DESCRIBE) == count
    assert {phase: (done, total) for phase, done, total in told} == {
        "captions": (count, count),
        "judgements": (count - 1, count - 1),
        "rewrites": (count - 1, count - 1),
    }
    assert len(result.exchanges) == result.usage.calls == 3 * count - 2


def test_equal_work_gives_equal_results() -> None:
    pairs = [pair("a", 1, {"o1": 2, "o2": 3}), pair("b", 2, {"o1": 2, "o2": 3})]
    first, second = (judge(FakeVlm(names(dog=1, cat=2, cow=3)), *pairs) for _ in range(2))
    assert first == second


def test_one_image_in_two_pairs_is_refused() -> None:
    with pytest.raises(ValueError, match="'a' stands in two pairs"):
        judge(FakeVlm(names(dog=1)), pair("a", 1, {}), pair("a", 1, {}))
