"""What of the settings a stage's fingerprint covers."""

import pytest

from flows.config import load_config
from tasks.loading import generator_identity, learner_identity


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


@pytest.mark.parametrize(
    ("override", "same"),
    [
        ("generator.scheduler=dpmsolver++", False),
        ("generator.batch=7", False),
        ("generator.path=elsewhere", True),
    ],
)
def test_what_changes_an_image_is_part_of_the_generators_identity(override: str, same: bool) -> None:
    usual, other = (load_config(["dataset=digits", *more]).generator for more in ([], [override]))
    assert usual != other
    assert (generator_identity(usual) == generator_identity(other)) == same
