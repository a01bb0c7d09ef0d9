import pytest

from tasks.vlm.client import Picture
from tasks.vlm.prompts import (
    MAX_PROMPT_CHARS,
    clean_prompt,
    compare,
    describe,
    parse_answer,
    rewrite,
)

PICTURE = Picture(digest="0" * 32, url="data:image/png;base64,AAAA")
ASK = (
    "Please describe the following image with special attention to category, style, and pose and background."
)


def test_the_dialogue_is_figure_3_word_for_word() -> None:
    assert [(m.role, m.text, len(m.pictures)) for m in describe(PICTURE)] == [("user", ASK, 1)]
    assert [(m.role, m.text) for m in rewrite("a butterfly", "a dog", "A papillion")] == [
        ("user", ASK),
        ("assistant", "a butterfly"),
        ("user", ASK),
        ("assistant", "a dog"),
        (
            "user",
            "Are the two images semantically similar? Please answer YES or NO. Do not output extra contents.",
        ),
        ("assistant", "NO"),
        (
            "user",
            "You are a prompt engineer of Stable Diffusion, the corresponding prompt of the first image is "
            '"A papillion". Please modify the prompt of the first image so that Stable Diffusion can '
            "generate the second image. Add necessary contents if needed.",
        ),
    ]


def test_rewriting_continues_the_judgement_and_sends_no_image_again() -> None:
    judged, rewritten = compare("a", "b"), rewrite("a", "b", "p")
    assert rewritten[: len(judged)] == judged
    assert not any(message.pictures for message in rewritten)


def test_a_prompt_with_braces_and_quotes_is_quoted_as_it_is() -> None:
    assert 'is "a {sign} saying "hi"". Please' in rewrite("a", "b", 'a {sign} saying "hi"')[-1].text


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("YES", "similar"),
        ("NO", "different"),
        ("yes", "similar"),
        ("no", "different"),
        ("Yes.", "similar"),
        ("No.", "different"),
        ("NO, because the first image is a drawing.", "different"),
        ("NO because the style differs", "different"),
        ("No, the first shows a butterfly and the second a dog.", "different"),
        ("Yes! Both show a dog.", "similar"),
        ("**NO**", "different"),
        ("**No.** They differ in style.", "different"),
        ('"YES"', "similar"),
        ("`NO`", "different"),
        ("\n\n  NO\n", "different"),
        ("NO\n\nThe first image is an illustration.", "different"),
        ("Answer: NO", "different"),
        ("The answer is: YES.", "similar"),
        ("<answer>NO</answer>", "different"),
        ("<think>They look alike? No, one is a drawing.</think>\nNO", "different"),
        ("no — one is a photo", "different"),
        ("", "unparsed"),
        ("   ", "unparsed"),
        ("I'm sorry, I can't assist with that.", "unparsed"),
        ("No, I can't compare images of people.", "unparsed"),
        ("NO. I'm sorry, as an AI I have not seen the images.", "unparsed"),
        ("The two images are not semantically similar.", "unparsed"),
        ("The images are similar. YES", "unparsed"),
        ("No doubt they are similar", "unparsed"),
        ("No images were provided.", "unparsed"),
        ("Not similar", "unparsed"),
        ("None", "unparsed"),
        ("N/A", "unparsed"),
        ("Nope", "unparsed"),
        ("YES/NO", "unparsed"),
        ("YES or NO", "unparsed"),
        ("Yes, no", "unparsed"),
        ("YES in category, but NO in style", "unparsed"),
        ("Nein", "unparsed"),
        ("Oui", "unparsed"),
        ("Sí.", "unparsed"),
        ("Non, elles sont différentes.", "unparsed"),
        ("否", "unparsed"),
        ("はい", "unparsed"),
        ("Yesterday both were dogs", "unparsed"),
        ("No-one can tell", "unparsed"),
        ("1", "unparsed"),
        ("YES.", "similar"),
        ("**YES**", "similar"),
        ("__NO__", "different"),
        ("NO BECAUSE THEY DIFFER", "different"),
        ("NO (one is a drawing)", "different"),
        ("No, no son similares.", "different"),
        ("Yes and no", "unparsed"),
        ("Yes and no.", "unparsed"),
        ("YES\n\nNO", "unparsed"),
        ("YES?", "unparsed"),
        ("I can't say yes", "unparsed"),
        ("I would say YES", "unparsed"),
        ("<think>No, one is a drawing, so", "unparsed"),
        ("NO. I'm not able to view images.", "unparsed"),
        ("No, I don't see any images.", "unparsed"),
        ("NO, I do not have access to the images.", "unparsed"),
        ("No, there are no images attached.", "unparsed"),
        ("NO IMAGES WERE PROVIDED", "unparsed"),
        ("NO, it cannot determine that from captions", "unparsed"),
        ("No, it is impossible to tell.", "unparsed"),
        ("NO DIFFERENCE", "unparsed"),
        ("NO ANSWER", "unparsed"),
        ("NO way to know", "unparsed"),
        ("No. 1 is a dog, No. 2 is a cat", "unparsed"),
        ("NO. The two images are semantically similar.", "unparsed"),
        ("YES. The two images are not semantically similar.", "unparsed"),
        ("Similar", "unparsed"),
        ("Ja.", "unparsed"),
        ("Нет", "unparsed"),
        ("いいえ", "unparsed"),
    ],
)
def test_answers_are_parsed_strictly(text: str, answer: str) -> None:
    assert parse_answer(text) == answer


def any_length(_prompt: str) -> bool:
    return True


def few_words(prompt: str) -> bool:
    return len(prompt.split()) <= 6


@pytest.mark.parametrize(
    ("text", "prompt"),
    [
        ("A dog on grass", "A dog on grass"),
        ('"A Papillon dog sitting on a lawn."', "A Papillon dog sitting on a lawn."),
        ("“A dog on grass”", "A dog on grass"),
        ("  A dog\n on   grass \n", "A dog on grass"),
        ("**A dog** on `grass`", "A dog on grass"),
        ('Here is the modified prompt:\n\n"A dog on grass"\n\nIt adds the lawn.', "A dog on grass"),
        ("Sure! Here's a prompt: A dog on grass", "A dog on grass"),
        ("Modified prompt: A dog on grass", "A dog on grass"),
        ("**Prompt:** A dog on grass", "A dog on grass"),
        ("### Revised Prompt:\n> A dog on grass", "A dog on grass"),
        ("```\nA dog on grass\n```", "A dog on grass"),
        ("A dog on grass\n\nThis prompt names the lawn.", "A dog on grass"),
        ('A sign saying "stop here" on a pole', 'A sign saying "stop here" on a pole'),
        ("<think>a dog?</think>A dog on grass", "A dog on grass"),
        ("A dog\x00 on\x07 grass\u200b", "A dog on grass"),
        ("", "before"),
        (" \n ", "before"),
        ('""', "before"),
        ("...", "before"),
        ("I'm sorry, I can't help with that.", "before"),
        ("I cannot modify the prompt.", "before"),
        ("I am not able to write prompts.", "before"),
        ("<think>The second image shows a dog, so the prompt", "before"),
    ],
)
def test_a_prompt_is_taken_out_of_its_wrapping(text: str, prompt: str) -> None:
    assert clean_prompt(text, any_length, "before") == prompt


def test_a_long_prompt_loses_its_end_and_what_dangles_there() -> None:
    text = "A picture of a dog, sitting on a grassy lawn, facing the camera"
    assert clean_prompt(text, few_words, "before") == "A picture of a dog, sitting"
    text = "A picture of a dog on a lawn"
    assert clean_prompt(text, few_words, "before") == "A picture of a dog"


def test_a_prompt_is_bounded_whatever_the_encoder_takes() -> None:
    cleaned = clean_prompt("dog " * 5000, any_length, "before")
    assert 0 < len(cleaned) <= MAX_PROMPT_CHARS


def test_where_not_one_word_fits_the_prompt_stays() -> None:
    assert clean_prompt("x" * 5000, any_length, "before") == "before"
    assert clean_prompt("A dog", lambda _prompt: False, "before") == "before"
