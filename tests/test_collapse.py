"""A set that shows nothing any more is refused; a few blank pictures are told by class."""

import pytest
import torch

from tasks.collapse import CollapseError, refuse_collapse, refuse_nan
from tasks.records import AugmentedImage, Digest

NAMES = ("ant", "bee")


def a_set(blank: int, of: int) -> tuple[torch.Tensor, list[AugmentedImage]]:
    """Pictures of noise, the first ones of one colour; labels take turns."""
    images = torch.randint(
        0, 256, (of, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    images[:blank] = torch.tensor([200, 10, 10], dtype=torch.uint8)[:, None, None]
    rows = [
        AugmentedImage(
            id=str(n),
            slot=str(n),
            source_id=None,
            label=n % 2,
            prompt=f"p{n}",
            seed=n,
            path=f"{n}.png",
            digest=Digest(str(n)),
            parent_id=None,
        )
        for n in range(of)
    ]
    return images, rows


@pytest.mark.parametrize(
    ("adapted", "remedy"), [(True, "lower tuning.learning_rate"), (False, "look at generator.path")]
)
def test_a_set_that_is_mostly_blank_is_refused_with_its_classes_a_prompt_and_the_remedy(
    adapted: bool, remedy: str
) -> None:
    images, rows = a_set(blank=5, of=8)
    with pytest.raises(
        CollapseError, match=rf"5 of 8 .* \(ant 3, bee 2; one was asked for 'p0'\); .*{remedy}"
    ):
        refuse_collapse(images, rows, NAMES, adapted)


def test_a_few_blank_pictures_are_told(caplog: pytest.LogCaptureFixture) -> None:
    images, rows = a_set(blank=1, of=8)
    refuse_collapse(images, rows, NAMES, adapted=True)
    assert [m.split(" (")[0] for m in caplog.messages] == ["1 of 8 generated images are near-constant"]
    assert "ant 1" in caplog.text


def test_pictures_and_none_at_all_pass_in_silence(caplog: pytest.LogCaptureFixture) -> None:
    refuse_collapse(*a_set(blank=0, of=600), NAMES, adapted=True)
    refuse_collapse(torch.zeros(0, 3, 8, 8, dtype=torch.uint8), [], NAMES, adapted=True)
    assert not caplog.messages


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_image_that_is_none_is_refused_with_its_prompt(value: float) -> None:
    images = torch.zeros(3, 3, 4, 4)
    refuse_nan(images, ["a", "b", "c"])
    images[1, 2, 0, 0] = value
    with pytest.raises(CollapseError, match="NaN or infinite values for the prompt 'b'"):
        refuse_nan(images, ["a", "b", "c"])
