"""Waiting by known answers: even spacing, what a server asks for, backoff, guessed tokens."""

from collections.abc import Mapping

import pytest

from tasks.vlm.pacing import Backoff, Guess, Pace, retry_after


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_requests_are_spaced_evenly_and_idle_time_is_not_saved_up() -> None:
    clock = Clock()
    pace = Pace(120, None, clock)
    assert [pace.reserve(10**6) for _ in range(3)] == [0.0, 0.5, 1.0]
    clock.now += 60
    assert [pace.reserve(0) for _ in range(2)] == [0.0, 0.5]


def test_tokens_wait_for_those_before_them_and_are_put_right() -> None:
    pace = Pace(None, 6000, Clock())  # 10 ms a token
    assert [pace.reserve(100), pace.reserve(50), pace.reserve(1)] == pytest.approx([0, 1, 1.5])
    pace.correct(reserved=100, used=300)
    assert pace.reserve(1) == pytest.approx(1.51 + 2)


def test_nonsense_of_a_server_does_not_hold_a_run_up_for_days() -> None:
    pace, guess = Pace(None, 6000, Clock()), Guess(per_image=100)
    pace.reserve(100)
    pace.correct(reserved=100, used=500_000_000)
    assert pace.reserve(1) == pytest.approx(40.96)
    guess.learn(300, 1, used=500_000_000)
    assert guess.tokens(300, 1) == 4096
    guess.learn(3000, 1, used=500_000_000)
    assert guess.tokens(3000, 1) == pytest.approx(4096 / 216 * 1116, abs=1), (
        "of those seen the largest excess"
    )


def test_the_stricter_of_two_limits_counts() -> None:
    pace = Pace(60, 6000, Clock())
    assert [pace.reserve(300), pace.reserve(1), pace.reserve(1)] == pytest.approx([0, 3, 4])


def test_without_limits_only_a_hold_is_waited_for() -> None:
    clock = Clock()
    pace = Pace(None, None, clock)
    assert pace.reserve(10**9) == pace.reserve(10**9) == 0
    pace.hold(5)
    pace.hold(2)
    clock.now += 1
    assert pace.reserve(1) == 4


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "3"}, 3),
        ({"retry-after": "0.25"}, 0.25),
        ({"retry-after": "-2"}, 0),
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25),
        ({"retry-after-ms": "soon", "retry-after": "9"}, 9),
        ({"retry-after": "Thu, 01 Jan 1970 00:02:00 GMT"}, 20),
        ({"retry-after": "Thu, 01 Jan 1970 00:00:10 GMT"}, 0),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "later"}, None),
        ({}, None),
    ],
)
def test_what_a_server_asks_for(headers: Mapping[str, str], seconds: float | None) -> None:
    assert retry_after(headers, now=100) == seconds


def test_backoff_doubles_up_to_its_limit_and_jitters_between_half_and_all() -> None:
    slow, quick = Backoff(1, 10, lambda: 1.0), Backoff(1, 10, lambda: 0.0)
    assert [slow.seconds(n) for n in (0, 1, 3, 4, 5000)] == [1, 2, 8, 10, 10]
    assert [quick.seconds(n) for n in (0, 1, 4)] == [0.5, 1, 5]


def test_a_guess_grows_with_what_the_server_counted_and_never_shrinks() -> None:
    guess = Guess(per_image=100)
    assert guess.tokens(300, 1) == 216
    guess.learn(300, 1, used=2160)
    assert guess.tokens(300, 1) == 2160
    guess.learn(300, 1, used=20)
    assert guess.tokens(0, 2) == 2160
