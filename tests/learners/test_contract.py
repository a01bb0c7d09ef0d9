"""What every learner of the factory promises, with the settings that we recommend, on a tiny ViT.

A learner joins by being in ``LEARNERS`` and having a ``configs/learner/<kind>.yaml``.
"""

import gc
import weakref
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tasks.classification.backbone import CheckpointError
from tasks.learners.base import Learner, TrainingData
from tasks.learners.factory import LEARNERS, NAMED, LearnerSettings, make_learner
from tests.learners.given import recommended
from tests.tiny_vit import bars, save_tiny_vit

SESSIONS = (((0, 1, 2), (0, 1, 2)), ((3,), (0, 1, 2, 3)), ((4,), (0, 1, 2, 3, 4)))
ALL = SESSIONS[-1][1]
CPU = torch.device("cpu")

pytestmark = pytest.mark.parametrize("kind", sorted([*LEARNERS, *NAMED]))


@cache
def settings(kind: str, vit: Path) -> LearnerSettings:
    return recommended(kind, save_tiny_vit(vit, depth=4))


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vit")


def fresh(kind: str, vit: Path, n_classes: int = 5) -> Learner:
    names = [f"thing {label}" for label in range(n_classes)]
    return make_learner(settings(kind, vit), n_classes, CPU, names)


def data(session: int, per_class: int = 4) -> TrainingData:
    """A session's pictures: ``per_class`` originals of each new class, two generated ones of all seen."""
    new, seen = SESSIONS[session]
    images, labels = bars(per_class + 2, 5, seed=session)
    is_generated = torch.arange(len(labels)) % (per_class + 2) >= per_class
    keep = torch.isin(labels, torch.tensor(seen)) & (is_generated | torch.isin(labels, torch.tensor(new)))
    return TrainingData(images[keep], labels[keep], is_generated[keep])


def go_on(learner: Learner, start: int, folder: Path | None = None, seed: int = 0) -> Learner:
    """Learn the sessions from ``start`` on, two epochs each, and save after each."""
    for session in range(start, len(SESSIONS)):
        for epoch in range(2):
            learner.begin_session(*SESSIONS[session])
            learner.learn(data(session), seed=10 * seed + epoch)
        if folder is not None:
            learner.save(folder / str(session))
    return learner


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@cache
def finished(kind: str, vit: Path) -> tuple[Learner, Path]:
    """A learner after its last session, and the folder of its checkpoints; not to be changed."""
    folder = vit / kind
    return go_on(fresh(kind, vit), 0, folder), folder


def queries() -> torch.Tensor:
    return bars(3, 5, seed=77)[0]


# ------------------------------------------------------------------------------------------ prediction


def test_only_seen_classes_are_named(kind: str, vit: Path) -> None:
    learner, _ = finished(kind, vit)
    logits = learner.predict(queries(), (0, 3))
    assert logits.shape == (15, 5)
    assert torch.isneginf(logits[:, [1, 2, 4]]).all()
    assert torch.isfinite(logits[:, [0, 3]]).all()


def test_a_picture_is_predicted_whatever_it_is_asked_with(kind: str, vit: Path) -> None:
    learner, _ = finished(kind, vit)
    images = queries()
    together, order = (
        learner.predict(images, ALL),
        torch.randperm(15, generator=torch.Generator().manual_seed(3)),
    )
    torch.testing.assert_close(learner.predict(images[order], ALL), together[order], atol=1e-4, rtol=1e-4)
    alone = torch.cat([learner.predict(image[None], ALL) for image in images[:4]])
    torch.testing.assert_close(alone, together[:4], atol=1e-4, rtol=1e-4)


def test_predicting_changes_nothing(kind: str, vit: Path, tmp_path: Path) -> None:
    learner, folder = finished(kind, vit)
    state = torch.get_rng_state()
    learner.predict(queries(), ALL)
    learner.predict_shots(data(2), ALL)
    learner.features(queries())
    assert torch.equal(torch.get_rng_state(), state)
    learner.save(tmp_path)
    assert contents(tmp_path) == contents(folder / "2")


def test_shots_are_predicted_one_by_one_in_order(kind: str, vit: Path) -> None:
    learner, _ = finished(kind, vit)
    shots = data(2)
    logits = learner.predict_shots(shots, ALL)
    assert logits.shape == (4, 5)
    assert torch.isfinite(logits).all()
    assert torch.isneginf(learner.predict_shots(shots, (0, 4))[:, 1:4]).all()


def test_a_class_of_one_shot_is_not_recognised_by_it(kind: str, vit: Path) -> None:
    learner = fresh(kind, vit)
    learner.load(finished(kind, vit)[1] / "1")
    only = TrainingData(*(part[-1:] for part in (data(2).images, data(2).labels)), torch.tensor([False]))
    learner.begin_session(*SESSIONS[2])
    learner.learn(only, seed=0)
    assert int(learner.predict_shots(only, ALL).argmax()) != 4


# ------------------------------------------------------------------------------------------ state


def test_one_seed_gives_one_checkpoint(kind: str, vit: Path, tmp_path: Path) -> None:
    _, folder = finished(kind, vit)
    torch.manual_seed(123)  # the caller's generator plays no part
    go_on(fresh(kind, vit), 0, tmp_path)
    assert contents(tmp_path / "2") == contents(folder / "2")
    assert sorted(contents(folder / "2")) == ["learner.json", "weights.safetensors"]


def test_pixels_of_eight_bits_are_the_same_pictures(kind: str, vit: Path, tmp_path: Path) -> None:
    learners = {}
    for name in ("eight_bits", "floats"):
        learners[name] = fresh(kind, vit)
        for session in (0, 1):
            given = data(session)
            pixels = (given.images * 255).round().to(torch.uint8)
            images = pixels if name == "eight_bits" else pixels.float() / 255
            learners[name].begin_session(*SESSIONS[session])
            learners[name].learn(TrainingData(images, given.labels, given.is_generated), seed=0)
        learners[name].save(tmp_path / name)
    assert contents(tmp_path / "eight_bits") == contents(tmp_path / "floats")
    pixels = (queries() * 255).round().to(torch.uint8)
    logits = [
        learner.predict(form, SESSIONS[1][1])
        for learner in learners.values()
        for form in (pixels, pixels / 255)
    ]
    assert all(torch.equal(logits[0], other) for other in logits)


@pytest.mark.parametrize("session", [0, 1])
def test_any_session_can_be_resumed_from(kind: str, session: int, vit: Path, tmp_path: Path) -> None:
    whole, folder = finished(kind, vit)
    resumed = fresh(kind, vit)
    resumed.load(folder / str(session))
    go_on(resumed, session + 1, tmp_path)
    assert contents(tmp_path / "2") == contents(folder / "2")
    assert torch.equal(resumed.predict(queries(), ALL), whole.predict(queries(), ALL))
    assert torch.equal(resumed.predict_shots(data(2), ALL), whole.predict_shots(data(2), ALL))


def test_an_epoch_can_be_resumed_from_without_a_second_begin(kind: str, vit: Path, tmp_path: Path) -> None:
    learner, twin = fresh(kind, vit), fresh(kind, vit)
    learner.load(finished(kind, vit)[1] / "1")
    twin.load(finished(kind, vit)[1] / "1")
    learner.begin_session(*SESSIONS[1])
    for each, name in ((learner, "a"), (twin, "b")):
        each.learn(data(1), seed=5)
        each.save(tmp_path / name)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_no_picture_is_kept(kind: str, vit: Path, tmp_path: Path) -> None:
    """Nothing holds the tensors or has their shape; a checkpoint does not grow with their number."""
    sizes = []
    for count in (3, 9):
        learner, pictures = fresh(kind, vit), data(0, count)
        held = weakref.ref(pictures.images)
        learner.begin_session(*SESSIONS[0])
        learner.learn(pictures, seed=0)
        del pictures
        if held() is not None:
            gc.collect()  # cycles alone may have kept it; a whole collection takes time
        assert held() is None
        learner.save(tmp_path / str(count))
        tensors = load_file(tmp_path / str(count) / "weights.safetensors")
        assert not [name for name, tensor in tensors.items() if tuple(tensor.shape[-3:]) == (3, 16, 16)]
        sizes.append({path.name: path.stat().st_size for path in (tmp_path / str(count)).iterdir()})
    assert sizes[0] == sizes[1]


def test_memory_is_what_it_says(kind: str, vit: Path) -> None:
    learner, folder = finished(kind, vit)
    tensors = load_file(folder / "2" / "weights.safetensors")
    kept = {name for name in ("prototypes", "features") if name in tensors}
    assert kept == ({learner.memory} - {"none"})
    for name in kept:
        assert tensors[name].shape == (5, tensors[name].shape[1])  # one vector a class, no more


# ------------------------------------------------------------------------------------------ refusals


def test_nonsense_is_refused(kind: str, vit: Path) -> None:
    learner, base = fresh(kind, vit), data(0)
    with pytest.raises(ValueError, match="no session has begun"):
        learner.learn(base, seed=0)
    with pytest.raises(ValueError, match="class 5 is out of range"):
        learner.begin_session((5,), (0, 5))
    with pytest.raises(ValueError, match="class 3 is new but not among"):
        learner.begin_session((3,), (0, 1))
    learner.begin_session((0, 1), (0, 1))
    with pytest.raises(ValueError, match="label 2 is not among the classes seen"):
        learner.learn(base, seed=0)
    learner.begin_session((0, 1, 2, 3), (0, 1, 2, 3))
    with pytest.raises(ValueError, match="class 3 is new but has no picture"):
        learner.learn(base, seed=0)
    with pytest.raises(ValueError, match="class 0 has not been learned yet"):
        learner.predict(base.images, (0, 1))


def test_a_checkpoint_that_is_not_its_own_is_refused(kind: str, vit: Path, tmp_path: Path) -> None:
    _, folder = finished(kind, vit)
    other = "ncm" if kind != "ncm" else "finetune_proto"
    with pytest.raises(CheckpointError, match=f"kind='{kind}', but this learner has kind='{other}'"):
        fresh(other, vit).load(folder / "0")
    with pytest.raises(CheckpointError, match="n_classes=5, but this learner has n_classes=6"):
        fresh(kind, vit, n_classes=6).load(folder / "0")
    learner = fresh(kind, vit)
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        learner.load(tmp_path)
    for name, content in contents(folder / "0").items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "weights.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="cannot be read"):
        learner.load(tmp_path)


def learn_and_save(learner: Learner, folder: Path) -> None:
    learner.begin_session(*SESSIONS[0])
    learner.learn(data(0), seed=0)
    learner.save(folder)


def test_nothing_that_is_no_number_is_ever_saved(kind: str, vit: Path, tmp_path: Path) -> None:
    learner = fresh(kind, vit)
    for weight in learner.backbone.parameters():
        weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"is no longer finite|is not finite|the loss is nan"):
        learn_and_save(learner, tmp_path / "sealed")
    assert not (tmp_path / "sealed").exists()
