"""Any override and any stored settings are taken or refused in the project's own words."""

import json
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from flows.__main__ import expand
from flows.config import ConfigError, ExperimentConfig, load_config, stored_config
from tasks.store import StoreError
from tests.properties.conftest import LONG
from tests.properties.hostile import anything
from tests.properties.refusing import or_refused

KEYS = (
    "dataset", "method", "seed", "tuning", "tuning.learning_rate", "tuning.updates", "tuning.clip", "dataset.root",
    "dataset.holdout", "dataset.class_names", "dataset.class_order", "mining.gap", "vlm.base_url", "vlm.price_in",
    "learner", "learner.base.learning_rate", "augmenter.base_prompt", "+new", "~tuning", "++a.b", "hydra.run.dir", "generator",
)  # fmt: skip
VALUES = (
    "", "null", "nan", ".nan", ".inf", "-1", "0", "1e999", "true", "[1,2", "{a:1}", "{", "[]", "${seed}", "${oc.env:HOME}",
    "${", "'", '"', "a=b", "../..", "digits", "guided", "\\", "\n", "é", "$", "${nope}", "1,2", "*", "choice(1,2)",
)  # fmt: skip

overrides = st.one_of(
    st.builds("{}={}".format, st.sampled_from(KEYS), st.sampled_from(VALUES) | st.text(max_size=8)),
    st.text(max_size=20),
)
few = settings() if LONG else settings(max_examples=12)


@few
@given(st.lists(overrides, min_size=1, max_size=2))
def test_any_override_is_composed_or_refused(given_overrides: list[str]) -> None:
    try:
        config = load_config(given_overrides)
    except ConfigError:
        return
    assert isinstance(config, ExperimentConfig)
    json.dumps(config.identity, allow_nan=False)


@given(st.lists(overrides, max_size=3))
def test_any_arguments_are_combinations_or_refused(arguments: list[str]) -> None:
    try:
        combinations = expand(arguments)
    except ValueError:
        assert any("=" not in argument for argument in arguments)
        return
    assert combinations
    assert all(len(combination) == len(arguments) for combination in combinations)


@few
@given(st.data())
def test_stored_settings_are_read_or_refused(data: st.DataObject) -> None:
    stored = load_config([]).identity
    for _ in range(data.draw(st.integers(0, 2))):
        group = data.draw(st.sampled_from(sorted(stored)))
        if isinstance(stored[group], dict) and stored[group] and data.draw(st.booleans()):
            stored[group][data.draw(st.sampled_from(sorted(stored[group])))] = data.draw(anything)
        else:
            stored[group] = data.draw(anything)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(stored))
        with or_refused((ConfigError, StoreError), "config.json"):
            assert isinstance(stored_config(Path(folder)), ExperimentConfig)
