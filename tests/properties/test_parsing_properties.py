"""What comes from outside is read or refused in the project's own words, in a bounded time, whatever it is.

`make fuzz` looks for counterexamples as long as it is told to: in the VLM's answers, in records, in session lists and
trees of folders, and in pictures.
"""

import io
import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from hypothesis import given, note
from hypothesis import strategies as st
from PIL import Image

from tasks.datasets.folders import draw_folders
from tasks.datasets.layouts import find_layout
from tasks.datasets.lists import PUBLISHED, read_lists
from tasks.datasets.settings import DatasetError, DatasetSettings
from tasks.images import MAX_PIXELS, UnreadableImageError, load_pixels
from tasks.records import EpochRecord, Prediction, Session, Usage, Verdict
from tasks.store import StoreError, read_json, read_lines, write_lines
from tasks.vlm.cassette import TranscriptError, read_transcript
from tasks.vlm.client import Exchange, Message, Reply, Request, Sampling
from tasks.vlm.prompts import MAX_PROMPT_CHARS, clean_prompt, parse_answer
from tasks.vlm.zero_shot import parse_class
from tests.datasets.small_worlds import cub
from tests.properties.hostile import anything, damaged
from tests.properties.refusing import or_refused

SECONDS = 3.0
"""Of processor time for one answer, however long; a busy machine takes longer by the clock."""

PIECES = (
    "YES", "NO", "yes", "no", "No.", "Yes,", "not", "Answer:", "**", "`", "```", "```\n", '"', "“", "”", "'", ":", "\n", "\n\n",
    " ", "\t", "<think>", "</think>", "<thinking>", "<b>", "</b>", "Sure:", "Here is the prompt:", "Prompt:", "- ", "# ",
    "> ", "I'm sorry", "I cannot tell", "because", "a cat", "a dog or a cat", "It is a ", "semantically similar", "1.", "(",
    ")", "{", "}", "\x00", "\u2028", "\N{RIGHT-TO-LEFT OVERRIDE}", "\U0001f600",
)  # fmt: skip

replies = st.one_of(
    st.text(max_size=200),
    st.lists(st.sampled_from(PIECES) | st.text(max_size=6), max_size=30).map("".join),
    st.tuples(
        st.lists(st.sampled_from(PIECES), min_size=1, max_size=3).map("".join), st.integers(1, 40_000)
    ).map(lambda many: (many[0] * many[1])[:120_000]),
)


@contextmanager
def in_time() -> Iterator[None]:
    began = time.process_time()
    yield
    assert time.process_time() - began < SECONDS


# ---------------------------------------------------------------------------------------- the VLM's answers


@given(replies)
def test_any_answer_is_similar_different_or_unparsed(text: str) -> None:
    with in_time():
        assert parse_answer(text) in ("similar", "different", "unparsed")


@given(
    st.sampled_from(["YES", "NO"]),
    st.sampled_from(["", ".", "!", "\n", "**", '"']),
    st.sampled_from(["", "**", '"', "\n ", "Answer: "]),
)
def test_a_plain_yes_or_no_is_read_whatever_stands_around_it(said: str, after: str, before: str) -> None:
    assert parse_answer(f"{before}{said}{after}") == {"YES": "similar", "NO": "different"}[said]


@given(replies, st.integers(1, 200))
def test_any_reply_gives_a_prompt_of_one_line_that_fits_or_the_one_before(text: str, limit: int) -> None:
    def fits(prompt: str) -> bool:
        return len(prompt) <= limit

    with in_time():
        prompt = clean_prompt(text, fits, "the prompt before")
    if prompt == "the prompt before":
        return
    assert prompt.strip() == prompt != ""
    assert "\n" not in prompt
    assert all(letter.isprintable() for letter in prompt)
    assert len(prompt) <= MAX_PROMPT_CHARS
    assert fits(prompt)


@given(
    replies,
    st.lists(
        st.sampled_from(["a cat", "dog", "c++", "großer hund", "1", "is", "not"]), min_size=1, unique=True
    ),
)
def test_any_answer_names_one_of_the_classes_or_none(text: str, names: list[str]) -> None:
    with in_time():
        named = parse_class(text, names)
    assert named is None or 0 <= named < len(names)


# ---------------------------------------------------------------------------------------- records and transcripts

usages = st.builds(
    Usage, calls=st.integers(0), prompt_tokens=st.integers(0), completion_tokens=st.integers(0)
)
samplings = st.builds(
    Sampling,
    model=st.text(),
    temperature=st.none() | st.floats(0, 2),
    max_tokens=st.integers(1, 999),
    detail=st.just("low"),
)


@st.composite
def exchanges(draw: st.DrawFn) -> Exchange:
    texts = draw(st.lists(st.text(), min_size=1, max_size=3))
    request = Request(
        messages=tuple(Message(role="user", text=text) for text in texts), sample=draw(st.integers(0, 2))
    )
    reply = Reply(text=draw(st.text()), usage=draw(usages), model=draw(st.text()))
    return Exchange.of(request, draw(samplings), reply)


predictions = st.builds(
    Prediction, image_id=st.text(), label=st.integers(), predicted=st.none() | st.integers(),
    margin=st.none() | st.floats(allow_nan=False, allow_infinity=False),
)  # fmt: skip


@given(st.lists(predictions, max_size=4), st.lists(exchanges(), max_size=3))
def test_what_is_written_is_what_is_read(rows: list[Prediction], told: list[Exchange]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        for listed, kind in ((rows, Prediction), (told, Exchange)):
            write_lines(path, listed)
            assert read_lines(path, kind) == listed
        assert read_transcript(path) == told


def one_exchange() -> bytes:
    request = Request(messages=(Message(role="user", text="é, is it a cat?"),))
    sampling = Sampling(model="m", temperature=0.5, max_tokens=9, detail="low")
    told = Exchange.of(request, sampling, Reply(text="YES", usage=Usage(calls=1, cost=0.25), model="m"))
    return (told.model_dump_json() + "\n").encode()


@given(
    damaged(one_exchange()) | st.binary(max_size=80) | anything.map(lambda value: json.dumps(value).encode())
)
def test_damaged_records_are_read_or_refused_by_name(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        path.write_bytes(data)
        for kind in (Prediction, Verdict, EpochRecord, Session, Exchange):
            with or_refused(StoreError, "file"):
                read_lines(path, kind)
        with or_refused(StoreError, "file"):
            read_json(path)
        with or_refused(TranscriptError, "file"):
            read_transcript(path)


# ---------------------------------------------------------------------------------------- lists and folders

names = st.text(st.characters(exclude_characters="/\x00"), min_size=1, max_size=12).filter(
    lambda n: n not in (".", "..")
)
file_names = st.one_of(
    names, st.builds("{}{}".format, names, st.sampled_from([".png", ".JPG", ".gif", ".txt", ".png.txt"]))
)
trees = st.dictionaries(
    st.lists(st.sampled_from(["train", "test", "val"]) | names, min_size=1, max_size=2).map("/".join),
    st.lists(file_names, max_size=7),
    max_size=8,
)


def plant(root: Path, tree: dict[str, list[str]]) -> None:
    """Make folders and empty files; what the file system refuses is not there."""
    for folder, files in tree.items():
        try:
            (root / folder).mkdir(parents=True, exist_ok=True)
            for name in files:
                (root / folder / name).touch()
        except OSError as error:
            note(str(error))


@given(trees, st.integers(2, 3), st.integers(0, 2), st.integers(1, 3), st.integers(0, 5))
def test_any_tree_of_folders_is_cut_or_refused(
    tree: dict[str, list[str]], n_base: int, n_sessions: int, k_shot: int, seed: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        plant(Path(folder), tree)
        settings = DatasetSettings(
            name="toy", root=folder, n_base=n_base, n_way=1, k_shot=k_shot, n_sessions=n_sessions, base_shots=None,
            test_per_class=None, holdout=0.3, class_order=None, class_names=None, size=8, split_seed=seed,
        )  # fmt: skip
        try:
            folders, draws = draw_folders(settings)
        except DatasetError:
            return
        assert len(set(folders)) == len(folders) == len(draws) == settings.n_classes
        paths = [picture.path for draw in draws for role in draw for picture in role]
        assert len(set(paths)) == len(paths)
        assert all((Path(folder) / path).is_file() for path in paths)
        assert draw_folders(settings) == (folders, draws)


@given(st.data())
def test_any_change_to_a_published_list_is_refused_by_name(data: st.DataObject) -> None:
    world = cub()
    file = data.draw(st.sampled_from(sorted(world.lists)))
    changed = data.draw(damaged(world.lists[file].encode()))
    known, PUBLISHED["cub200"] = PUBLISHED["cub200"], world.protocol
    try:
        with tempfile.TemporaryDirectory() as folder, or_refused(DatasetError, file):
            (world.write_lists(Path(folder)) / file).write_bytes(changed)
            read_lists("cub200", Path(folder))
            assert changed == world.lists[file].encode()
    finally:
        PUBLISHED["cub200"] = known


@given(st.dictionaries(st.sampled_from(["train/ant", "train/bee", "test/ant", "test/bee"]), st.lists(
    st.integers(0, 30).map("{}.png".format) | st.sampled_from(["²", "٣", "x", "007", ".png", "1e3"]).map("{}.png".format)
)))  # fmt: skip
def test_any_folders_of_cifar100_are_read_or_refused(tree: dict[str, list[str]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        plant(Path(folder), tree)
        with or_refused(DatasetError, "index", "no session list"):
            find_layout("cifar100", Path(folder), "0", "0")


# ---------------------------------------------------------------------------------------- pictures


def pictures() -> list[bytes]:
    """Small pictures of every kind that is read, one with an orientation, one animated, one of 16 bits."""
    noise = np.random.default_rng(0).integers(0, 255, (9, 13, 3), dtype=np.uint8)
    rgb, exif = Image.fromarray(noise), Image.Exif()
    exif[0x0112], exif[0x0131], exif[0x011A] = 6, "a program", 72.0
    deep = Image.fromarray(noise[..., 0].astype(np.uint16) * 257)
    kinds: list[tuple[Image.Image, str, dict[str, object]]] = [
        *((rgb, kind, {}) for kind in ("PNG", "GIF", "BMP", "TIFF", "WEBP")),
        *((rgb, kind, {"exif": exif}) for kind in ("JPEG", "PNG", "WEBP", "TIFF")),
        *((rgb, kind, {"save_all": True, "append_images": [rgb]}) for kind in ("GIF", "PNG", "WEBP")),
        *((rgb.convert("CMYK"), kind, {}) for kind in ("JPEG", "TIFF")),
        *((deep, kind, {}) for kind in ("PNG", "TIFF")),
        (rgb.convert("P"), "PNG", {"transparency": 3}),
        (rgb, "TIFF", {"compression": "tiff_lzw"}),
    ]
    found = []
    for picture, kind, options in kinds:
        buffer = io.BytesIO()
        picture.save(buffer, kind, **options)
        found.append(buffer.getvalue())
    return found


@given(st.sampled_from(pictures()).flatmap(damaged), st.sampled_from([None, 8]))
def test_any_damaged_picture_is_read_or_refused_by_name(data: bytes, size: int | None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "victim.png"
        path.write_bytes(data)
        with or_refused(UnreadableImageError, "victim.png"):
            pixels = load_pixels(path, size)
            assert pixels.shape[0] == 3
            assert 0 < pixels.shape[1] * pixels.shape[2] <= MAX_PIXELS
            assert size is None or pixels.shape[1:] == (size, size)


def test_nothing_of_hypothesis_lies_in_the_tree() -> None:
    assert not Path(os.environ["HYPOTHESIS_STORAGE_DIRECTORY"]).is_relative_to(Path.cwd())
