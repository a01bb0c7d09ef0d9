"""What of the settings a stage's fingerprint covers."""

import pytest

from flows.config import load_config
from tasks.loading import learner_identity


@pytest.mark.parametrize(
    ("override", "changes"),
    [
        ("learner.incremental.learning_rate=1e-5", {"incremental"}),
        ("learner.base.passes=9", {"base"}),
        ("learner.temperature=3.0", {"base", "incremental", None}),
        ("classifier.checkpoint=elsewhere", set()),
    ],
)
def test_a_setting_changes_only_the_stages_that_read_it(override: str, changes: set[str | None]) -> None:
    usual, other = (load_config(["dataset=digits", *more]).learner for more in ([], [override]))
    readings = ("base", "incremental", None)
    assert {r for r in readings if learner_identity(usual, r) != learner_identity(other, r)} == changes
