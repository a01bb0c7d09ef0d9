"""The VLM as classifier: the request, the strict reading of its answer, what is counted, and who is not asked twice."""

from pathlib import Path

import pytest
import torch
from fake_vlm import SETTINGS, ScriptedVlm
from torch import Tensor

from tasks.images import save_png
from tasks.miniature.reader import Reading
from tasks.miniature.vlm_server import choose, serve
from tasks.records import Usage
from tasks.vlm.cache import CachedClient
from tasks.vlm.client import Picture, Request
from tasks.vlm.openai_client import OpenAiClient
from tasks.vlm.transport import VlmError
from tasks.vlm.zero_shot import CHUNK, classify, name_one, parse_class, refuse_alike

DIGITS = ("zero", "one", "two", "three", "seven")
BIRDS = ("Black_footed_Albatross", "Crow", "American Crow", "Brewer Blackbird", "letter A")


def test_the_request_lists_the_classes_and_shows_the_image_once() -> None:
    picture = Picture(digest="0" * 32, url="data:image/png;base64,AAAA")
    (message,) = name_one(picture, ["zero", "golden\n retriever"])
    assert message.pictures == (picture,)
    assert message.text == (
        "Which one of these classes does the image show?\n- zero\n- golden retriever\n"
        "Please answer with the name of one class as it is written above. Do not output extra contents."
    )


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("seven", "seven"),
        ("Seven", "seven"),
        ("SEVEN.", "seven"),
        (" seven\n", "seven"),
        ("- seven", "seven"),
        ("**Seven**", "seven"),
        ('"seven"', "seven"),
        ("`seven`.", "seven"),
        ("(seven)", "seven"),
        ("It is a seven.", "seven"),
        ("It's a seven!", "seven"),
        ("This is a **seven**.", "seven"),
        ("The image shows a seven.", "seven"),
        ("Image: seven", "seven"),
        ("The class is seven.", "seven"),
        ('The correct class is "seven".', "seven"),
        ("Answer: seven", "seven"),
        ("The answer is: seven", "seven"),
        ("A picture of a seven", "seven"),
        ("<answer>seven</answer>", "seven"),
        ("<think>one? no, it has a bar</think>\nseven", "seven"),
        ("Seven, written by hand.", "seven"),
        ("Seven - with a bar", "seven"),
        ("Seven (handwritten)", "seven"),
        ("seven\n\nThe stroke has a bar.", "seven"),
        ("", None),
        ("   ", None),
        ("7", None),
        ("sevens", None),
        ("seventeen", None),
        ("seven-spot ladybird", None),
        ("five", None),
        ("a digit", None),
        ("It is none of these classes.", None),
        ("None of the above.", None),
        ("one or seven", None),
        ("seven, or perhaps one", None),
        ("One of the classes: seven", None),
        ("Seven. There is one bar.", None),
        ("It is not a seven.", None),
        ("Not seven", None),
        ("seven? one?", None),
        ("Seven?", None),
        ("One cannot tell.", None),
        ("This one is unclear.", None),
        ("Seven, but I cannot be certain.", None),
        ("Seven. I'm not sure, though.", None),
        ("I'm sorry, I can't assist with that.", None),
        ("I cannot tell whether it is a seven.", None),
        ("The image could be a seven.", None),
        ("Sieben", None),
        ("七", None),
    ],
)
def test_an_answer_is_one_plainly_named_class_or_unparsed(text: str, name: str | None) -> None:
    assert parse_class(text, DIGITS) == (None if name is None else DIGITS.index(name))


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("Black-footed Albatross", 0),
        ("a black footed albatross.", 0),
        ("black_footed_albatross", 0),
        ("Albatross", None),
        ("Crow", 1),
        ("American Crow", 2),
        ("An American crow, perched.", 2),
        ("American Crow, a kind of crow", None),
        ("Fish Crow", None),
        ("Brewer Blackbird", 3),
        ("Letter A", 4),
        ("The letter A.", 4),
    ],
)
def test_names_of_several_words_are_known_however_they_are_joined(text: str, place: int | None) -> None:
    assert parse_class(text, BIRDS) == place


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ([], "there is no class"),
        (["one", " _ "], "' _ ' has no letter"),
        (["one", "two", "two"], "'two' and 'two' cannot be told apart"),
        (["a", "b", "A", "B"], "'a' and 'A' cannot be told apart"),
        (["Sea_Gull", "two", "sea gull"], "'Sea_Gull' and 'sea gull' cannot be told apart"),
    ],
)
def test_names_that_no_answer_can_tell_apart_are_refused(names: list[str], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        refuse_alike(names)


# ------------------------------------------------------------------------------------------ asking


class Namer(ScriptedVlm):
    """Names images by their content's digest."""

    def __init__(self, texts: dict[str, str], fail_at: int | None = None) -> None:
        super().__init__(fail_at)
        self.texts = texts

    def text(self, request: Request) -> str:
        return self.texts[request.messages[0].pictures[0].digest]


def images(folder: Path, count: int) -> tuple[list[Path], dict[str, str]]:
    """Grey pictures, and the answers to them: all but every third one named."""
    paths, texts = [], {}
    for n in range(count):
        paths.append(folder / f"{n}.png")
        save_png(torch.full((3, 4, 4), n / 255), paths[-1])
        texts[Picture.of(paths[-1], 64).digest] = "It is a two." if n % 3 else "I cannot tell."
    return paths, texts


def test_unparsed_answers_are_no_class_and_are_counted(tmp_path: Path) -> None:
    paths, texts = images(tmp_path, CHUNK + 5)
    told: list[tuple[str, int, int]] = []
    found = classify(Namer(texts), paths, DIGITS, 64, lambda *step: told.append(step))
    assert found.places == [2 if n % 3 else None for n in range(CHUNK + 5)]
    assert found.unparsed == 23
    assert found.usage == Usage(calls=69, prompt_tokens=690, completion_tokens=138)
    assert len(found.exchanges) == 69
    assert told[-1] == ("classes", 69, 69)


def test_equal_images_are_asked_about_once(tmp_path: Path) -> None:
    paths, texts = images(tmp_path, 2)
    vlm = Namer(texts)
    assert classify(vlm, [*paths, paths[1]], DIGITS, 64).places == [None, 2, 2]
    assert len(vlm.asked) == 2


def test_after_a_kill_only_what_is_unanswered_is_asked(tmp_path: Path) -> None:
    paths, texts = images(tmp_path, 9)
    dying, alive = Namer(texts, fail_at=4), Namer(texts)
    with pytest.raises(VlmError, match="killed"):
        classify(CachedClient(dying, tmp_path / "cache"), paths, DIGITS, 64)
    resumed = classify(CachedClient(alive, tmp_path / "cache"), paths, DIGITS, 64)
    assert (len(dying.asked), len(alive.asked)) == (4, 5)
    assert resumed == classify(Namer(texts), paths, DIGITS, 64)


def test_a_longer_list_of_classes_is_another_question_and_the_same_list_is_not(tmp_path: Path) -> None:
    paths, texts = images(tmp_path, 3)
    vlm = Namer(texts)
    client = CachedClient(vlm, tmp_path / "cache")
    for names, asked in ((DIGITS[:3], 3), (DIGITS[:3], 3), (DIGITS, 6)):
        classify(client, paths, names, 64)
        assert len(vlm.asked) == asked


# ------------------------------------------------------------------------------------------ the miniature's answer


class ByBrightness:
    """Reads a dark image as a seven, any other as the letter A."""

    def read(self, images: Tensor) -> list[Reading]:
        rest = {
            "style": "sans-serif",
            "weight": "bold",
            "pose": "upright",
            "colour": "red",
            "background": "white",
        }
        categories = ["seven" if image.mean() < 0.5 else "letter A" for image in images]
        return [Reading(category=category, form="digit", **rest) for category in categories]


def test_the_miniature_names_what_it_reads_if_that_is_offered(tmp_path: Path) -> None:
    for name, value in (("dark", 0.1), ("bright", 0.9)):
        save_png(torch.full((3, 32, 32), value), tmp_path / f"{name}.png")
    shown = [tmp_path / "dark.png", tmp_path / "bright.png"]
    with serve(ByBrightness()) as server:
        settings = SETTINGS.model_copy(update={"kind": "miniature", "model": "miniature"})
        found = classify(OpenAiClient(settings, server.base_url), shown, DIGITS, 64)
    assert found.places == [4, None]
    assert [e.reply.text for e in found.exchanges] == ["seven", "It is none of these classes."]
    assert found.usage.prompt_tokens > 2 * 64


def test_the_miniature_spells_the_name_as_it_was_offered() -> None:
    assert choose("letter A", ["a", "Letter A"]) == "Letter A"
    assert parse_class(choose("five", DIGITS), DIGITS) is None
