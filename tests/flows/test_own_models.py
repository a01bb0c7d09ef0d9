"""A user's own models and images: a saved Stable Diffusion checkpoint, a saved timm checkpoint, a folder of pictures.

The weights are random and few; formats, loading and the six stages are those of the true models.
"""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from flows.experiment import fscil
from tasks.images import save_png
from tasks.records import AugmentedImage, EpochRecord
from tasks.store import digest_of, read_json, read_lines
from tests.diffusion.checkpoints import pipeline_like, save_original
from tests.diffusion.conftest import tokenizer

SIZE, CLASSES, PICTURES = 32, ("ant", "bee"), 10
QUICK = (
    f"dataset.size={SIZE}", "dataset.n_base=2", "dataset.n_way=2", "dataset.k_shot=2", "dataset.n_sessions=0",
    "dataset.holdout=0.4", "augmenter.min_per_class=6", "augmenter.old_classes=0", "stopping.max_epochs=2",
    "learner.base.passes=1", "mining.centres=2", "mining.min_contrast=0", "tuning.updates=1", "tuning.batch=1",
    "runtime.device=cpu", "tracking=off", "generator=sd15", f"generator.size={SIZE}", "generator.steps=3",
    "generator.batch=4", "classifier=vit_b16", "classifier.name=test_vit", f"classifier.size={SIZE}",
)  # fmt: skip


def save_pictures(root: Path) -> None:
    rng = torch.Generator().manual_seed(0)
    for label, name in enumerate(CLASSES):
        (root / name).mkdir(parents=True)
        for n in range(PICTURES):
            colour = torch.eye(3)[label].view(3, 1, 1) * 0.05
            save_png(
                (colour + 0.4 * torch.rand(3, 40, 48, generator=rng)).clamp(0, 1), root / name / f"{n}.png"
            )


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("own")
    save_pictures(root / "pictures")
    pipeline = pipeline_like("2.x", tokenizer(root / "words"))
    pipeline.save_pretrained(root / "folder")
    save_original(pipeline, root / "model.safetensors")
    torch.manual_seed(0)
    save_file(timm.create_model("test_vit").state_dict(), root / "classifier.safetensors")
    return root


def run(own: Path, place: Path, *overrides: str) -> Path:
    """One guided experiment through all six stages; the folder of its first epoch."""
    given = (
        f"dataset.root={own / 'pictures'}",
        f"classifier.checkpoint={own / 'classifier.safetensors'}",
        f"runtime.state={place / 'state'}",
        f"runtime.runs={place / 'runs'}",
    )
    fscil("imagefolder", "guided", 0, [*QUICK, *given, *overrides])
    return place / "runs" / "imagefolder" / "guided" / "seed-0" / "session-00" / "epoch-000"


def test_an_epoch_through_all_six_stages_from_a_folder_and_from_a_single_file(
    own: Path, tmp_path: Path, prefect_server: None
) -> None:
    folder = run(own, tmp_path / "a", f"generator.path={own / 'folder'}", "generator.format=webp")
    record = EpochRecord.model_validate_json((folder / "record.json").read_text())
    assert record.mine
    assert record.compare
    assert record.tune
    assert record.regenerate
    assert record.tune.output.updates == 1, record.tune.output.skipped_because
    assert record.regenerate.output.adapter == record.tune.output.adapter.digest
    assert record.regenerate.output.batch_shape == (4, 3, SIZE, SIZE)
    images = read_lines(folder / "manifest.jsonl", AugmentedImage)
    assert {Path(image.path).suffix for image in images} == {".webp"}
    assert {image.label for image in images} == {0, 1}
    origin = read_json(next((tmp_path / "a" / "state" / "runs").rglob("provenance.json")))
    assert origin["weights_digests"]["backbone"] == digest_of(own / "classifier.safetensors")
    assert origin["weights_digests"]["generator"] == digest_of(own / "folder")

    file = [f"generator.path={own / 'model.safetensors'}", f"generator.config={own / 'folder'}"]
    again = run(own, tmp_path / "b", *file, "generator.format=webp", "stopping.max_epochs=1")
    first, second = (
        {
            image.slot: image.digest
            for image in read_lines(place.parent / "initial" / "manifest.jsonl", AugmentedImage)
        }
        for place in (folder, again)
    )
    assert first == second, "the same weights draw the same images, whatever they are stored in"
