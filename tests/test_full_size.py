"""One epoch at the true size, through all six stages: time and memory of each.

    .venv/bin/python -m pytest -m slow -s tests/test_full_size.py

Random weights cost what trained ones cost. It wants a GPU with 16 GB, 3 GB of disk and a few minutes.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flows.experiment import fscil
from tasks.images import save_png
from tasks.records import EpochRecord
from tasks.store import Store
from tests.diffusion.conftest import tokenizer
from tests.full_size import COUNTS, save_sd15, save_vit_b16, sd15_parts, vit_b16

STAGES = ("regenerate", "train_classifier", "evaluate", "mine_failures", "vlm_compare", "tune_lora")
PICTURES = 12  # of each of two classes
OVERRIDES = (
    "dataset.size=224", "dataset.n_base=2", "dataset.n_sessions=0", "dataset.holdout=0.4", "classifier=vit_b16",
    "generator=sd15", "augmenter.min_per_class=8", "augmenter.old_classes=0", "mining.min_contrast=0",
    "stopping.max_epochs=2", "tuning.updates=8", "runtime.device=cuda", "tracking=off",
)  # fmt: skip


def test_the_architectures_are_the_published_ones() -> None:
    with torch.device("meta"):
        models = {**sd15_parts(), "vit": vit_b16()}
    assert {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()} == COUNTS


class Meter:
    """Seconds and peak GPU memory of each stage, measured around ``Store.run``."""

    def __init__(self, run: Callable[..., Any]) -> None:
        self.run, self.rows = run, []

    def __call__(self, store: Store, stage: str, *arguments: object, **options: object) -> object:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        began = time.monotonic()
        record = self.run(store, stage, *arguments, **options)
        torch.cuda.synchronize()
        self.rows.append((stage, time.monotonic() - began, torch.cuda.max_memory_allocated() / 2**30))
        return record

    def table(self, images: int) -> str:
        lines = ["| stage | seconds | peak GiB | |", "|---|---:|---:|---|"]
        notes = {
            "regenerate": f"{images} images of 512 px",
            "train_classifier": f"{2 * PICTURES} pictures",
            "tune_lora": "8 updates",
        }
        lines += [f"| {s} | {t:.1f} | {g:.1f} | {notes.get(s, '')} |" for s, t, g in self.rows if s in STAGES]
        return "\n".join([f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bf16", *lines])


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="the true size needs a GPU: torch sees no CUDA device"
)
def test_one_epoch_at_the_true_size(
    tmp_path: Path, prefect_server: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, rng = torch.device("cuda"), torch.Generator().manual_seed(0)
    for name in ("ant", "bee"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for n in range(PICTURES):
            save_png(torch.rand(3, 256, 256, generator=rng), tmp_path / "pictures" / name / f"{n}.png")
    save_sd15(tmp_path / "sd15", tokenizer(tmp_path / "words"), device)
    save_vit_b16(tmp_path / "vit.safetensors", device)
    torch.cuda.empty_cache()
    meter = Meter(Store.run)
    monkeypatch.setattr(Store, "run", lambda store, *given, **named: meter(store, *given, **named))
    places = (
        f"dataset.root={tmp_path / 'pictures'}", f"generator.path={tmp_path / 'sd15'}",
        f"classifier.checkpoint={tmp_path / 'vit.safetensors'}",
        f"runtime.state={tmp_path / 'state'}", f"runtime.runs={tmp_path / 'runs'}",
    )  # fmt: skip
    fscil("imagefolder", "guided", 0, [*OVERRIDES, *places])
    folder = tmp_path / "runs" / "imagefolder" / "guided" / "seed-0" / "session-00" / "epoch-000"
    record = EpochRecord.model_validate_json((folder / "record.json").read_text())
    assert record.tune
    assert record.regenerate
    assert record.tune.output.updates == 8, record.tune.output.skipped_because
    assert {stage for stage, *_ in meter.rows} >= set(STAGES)
    print("\n" + meter.table(record.regenerate.output.count))
