"""Every learner's preset composes, alone, with generated pictures, as published, and at the paper's size."""

import pytest

from flows.config import ConfigError, choices, load_config
from tasks.learners.factory import LEARNERS, NAMED

PRESETS = sorted({*LEARNERS, *NAMED} & set(choices("method")))


@pytest.mark.parametrize("method", PRESETS)
def test_a_learner_composes_with_an_augmenter_and_as_published(method: str) -> None:
    alone = load_config([f"method={method}"])
    assert (alone.method, alone.learner.kind, alone.augmenter.draws) == (method, method, False)
    both = load_config([f"method={method}_guided"])
    assert (both.method, both.learner) == (f"{method}_guided", alone.learner)
    assert both.augmenter == load_config(["method=guided"]).augmenter
    published = load_config([f"method={method}", f"learner={method}_as_published"]).learner
    assert published.kind == method
    assert published != alone.learner


@pytest.mark.parametrize("method", PRESETS)
def test_a_learner_composes_with_the_paper_s_network(method: str) -> None:
    config = load_config([f"method={method}", "dataset=cub200", "classifier=vit_b16"])
    assert config.trained.backbone == config.classifier
    assert "_224" in config.classifier.name
    assert config.dataset.size == 224


def test_the_published_row_that_can_be_checked_composes() -> None:
    config = load_config(["dataset=cifar100", "method=privilege_cifar100"])
    assert config.trained.kind == "privilege"
    assert config.trained.backbone == config.classifier
    assert config.classifier.name == "vit_base_patch16_224.augreg_in21k_ft_in1k"
    assert (config.trained.base.batch, config.trained.base.passes, config.trained.compare) == (128, 5, "dot")
    assert (config.augmenter.draws, config.stopping.max_epochs, config.dataset.k_shot) == (False, 1, 5)


def test_an_unknown_setting_of_a_learner_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"learner.*meta\.episodes.*greater than or equal to 0"):
        load_config(["method=cec", "learner.meta.episodes=-1"])
