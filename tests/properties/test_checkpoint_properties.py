"""Whatever stands in a checkpoint's description or in the profile is taken, or refused with the file's name."""

import json
import tempfile
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from flows.config import ConfigError
from flows.reproduce import Profile, read_profile
from tasks.classification.backbone import BackboneSettings, CheckpointError, load_backbone
from tasks.learners.factory import make_learner
from tasks.learners.ncm import NcmSettings
from tests.properties.hostile import anything, damaged
from tests.properties.refusing import or_refused
from tests.tiny_vit import save_tiny_vit

VALUES = (
    None,
    True,
    -1,
    0,
    3,
    1.5,
    10**30,
    "",
    "x",
    "resnet18",
    [],
    [1],
    [0.0] * 3,
    ["a"] * 3,
    {},
    {"mean": 3},
)
PROFILE = {
    "profile": "p",
    "datasets": ["digits"],
    "methods": ["ncm"],
    "seeds": [0],
    "overrides": [],
    "at_once": 2,
}


@st.composite
def edited(draw: st.DrawFn, whole: dict[str, object]) -> bytes:
    """JSON with one or two of its values, at any depth, replaced, left out or put in; or with damaged bytes."""
    copy = deepcopy(whole)
    for _ in range(draw(st.integers(1, 2))):
        inner = [value for value in copy.values() if isinstance(value, dict)]
        place = draw(st.sampled_from([copy, *inner]))
        key = draw(st.sampled_from([*place, "pretrained_cfg", "new"]))
        if draw(st.booleans()):
            place[key] = deepcopy(draw(st.sampled_from(VALUES)))
        else:
            place.pop(key, None)
    text = json.dumps(copy).encode()
    return draw(st.sampled_from([text, draw(damaged(text)), b"[" * 50_000]))


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> BackboneSettings:
    return save_tiny_vit(tmp_path_factory.mktemp("vit"))


@given(data=st.data())
def test_any_description_of_a_classifier_is_taken_or_refused(
    vit: BackboneSettings, data: st.DataObject
) -> None:
    file = Path(str(vit.checkpoint)) / "config.json"
    whole = file.read_bytes()
    try:
        file.write_bytes(data.draw(edited(json.loads(whole))))
        with or_refused(
            CheckpointError,
            "config.json",
            "timm has no model",
            "classifier.size=16",
            "Choose another tag",
            "do not fit",
        ):
            assert torch.isfinite(load_backbone(vit).mean).all()
    finally:
        file.write_bytes(whole)


@given(data=st.data())
def test_any_state_of_a_learner_is_taken_or_refused(vit: BackboneSettings, data: st.DataObject) -> None:
    settings = NcmSettings(kind="ncm", backbone=vit, temperature=16.0, generated_weight=0.5)
    learner = make_learner(settings, 5, torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        learner.save(Path(folder))
        file = Path(folder) / "learner.json"
        file.write_bytes(data.draw(edited(json.loads(file.read_bytes()))))
        with or_refused(CheckpointError, "learner.json", "was written with"):
            learner.load(Path(folder))
            learner.save(Path(folder) / "again")


profiles = st.one_of(
    damaged(yaml.safe_dump(PROFILE).encode()),
    edited(PROFILE),
    anything.map(lambda value: yaml.safe_dump(value, allow_unicode=True).encode("utf-8", "surrogatepass")),
)


@given(profiles)
def test_any_profile_is_taken_or_refused(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "params.yaml"
        path.write_bytes(data)
        with or_refused(ConfigError, "params.yaml is no profile"):
            assert isinstance(read_profile(path), Profile)
