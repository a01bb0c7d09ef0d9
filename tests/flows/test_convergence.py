import pytest

from flows.convergence import StoppingSettings, reason_to_stop


@pytest.mark.parametrize(
    ("accuracies", "says"),
    [
        ([0.5], None),
        ([0.5, 0.5], None),
        ([0.5, 0.6, 0.6], None),
        ([0.5, 0.4, 0.5], "not risen for 2 epochs"),
        ([0.5, 0.6, 0.55, 0.6], "not risen for 2 epochs"),
        ([0.1, 0.2, 0.3, 0.4, 0.5], "max_epochs=5"),
    ],
)
def test_rule(accuracies: list[float], says: str | None) -> None:
    reason = reason_to_stop(accuracies, StoppingSettings(max_epochs=5, patience=2))
    assert reason is None if says is None else says in reason


def test_nothing_to_judge() -> None:
    with pytest.raises(ValueError, match="first epoch"):
        reason_to_stop([], StoppingSettings(max_epochs=5, patience=2))
