"""A cache of decoded pictures gives what decoding gives, decodes once, and stays within its bound."""

from pathlib import Path

import pytest
import torch

from tasks import image_cache
from tasks.image_cache import ImageCache
from tasks.images import UnreadableImageError, as_unit, load_images, load_pixels, save_png
from tasks.store import digest_of

SIZE = 8
BYTES = 3 * SIZE * SIZE


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    rng = torch.Generator().manual_seed(0)
    made = [tmp_path / f"{i}.png" for i in range(6)]
    for path in made:
        save_png(torch.rand(3, 11, 13, generator=rng), path)
    return made


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names: list[str] = []

    def counting(path: Path, size: int, md5: str) -> torch.Tensor:
        names.append(path.stem)
        return load_pixels(path, size, md5)

    monkeypatch.setattr(image_cache, "load_pixels", counting)
    return names


def load(cache: ImageCache, paths: list[Path], size: int = SIZE) -> torch.Tensor:
    return cache.load(paths, [digest_of(path) for path in paths], size)


def test_it_gives_what_decoding_gives_and_decodes_once(paths: list[Path], decoded: list[str]) -> None:
    cache = ImageCache(100 * BYTES)
    for _ in range(3):
        assert torch.equal(as_unit(load(cache, paths)), load_images(paths, SIZE))
    assert sorted(decoded) == list("012345")
    assert torch.equal(as_unit(load(cache, paths[::-1])), load_images(paths[::-1], SIZE))
    assert torch.equal(as_unit(load(cache, paths, 5)), load_images(paths, 5)), (
        "another size is another picture"
    )
    assert load(cache, []).shape == (0, 3, SIZE, SIZE)


def test_content_and_not_the_path_names_a_picture(paths: list[Path], decoded: list[str]) -> None:
    cache = ImageCache(100 * BYTES)
    load(cache, paths[:1])
    paths[1].write_bytes(paths[0].read_bytes())
    load(cache, paths[1:2])
    assert decoded == ["0"]
    save_png(torch.zeros(3, 9, 9), paths[0])
    assert load(cache, paths[:1]).max() == 0


def test_the_longest_unused_are_forgotten_within_the_bound(paths: list[Path], decoded: list[str]) -> None:
    cache = ImageCache(3 * BYTES)
    load(cache, paths[:3])
    load(cache, paths[:1])
    load(cache, paths[3:4])
    decoded.clear()
    load(cache, [paths[0], paths[2], paths[3]])
    assert decoded == []
    load(cache, paths[1:2])
    assert decoded == ["1"]


def test_more_than_fits_asked_for_again_and_again_keeps_what_fits(
    paths: list[Path], decoded: list[str]
) -> None:
    cache = ImageCache(4 * BYTES)
    for _ in range(3):
        decoded.clear()
        assert torch.equal(as_unit(load(cache, paths)), load_images(paths, SIZE))
    assert decoded == ["4", "5"]
    assert torch.equal(as_unit(load(ImageCache(0), paths)), load_images(paths, SIZE))


def test_large_pictures_are_decoded_by_threads_in_order(paths: list[Path], tmp_path: Path) -> None:
    assert torch.equal(as_unit(load(ImageCache(0), paths, 70)), load_images(paths, 70))
    (tmp_path / "bad.png").write_bytes(b"bad")
    with pytest.raises(UnreadableImageError, match=r"bad\.png"):
        load(ImageCache(0), [*paths, tmp_path / "bad.png"], 70)


@pytest.mark.parametrize("size", [SIZE, 70])
def test_a_picture_that_was_changed_or_lost_since_it_was_recorded_is_refused(
    paths: list[Path], size: int
) -> None:
    digests = [digest_of(path) for path in paths]
    content = bytearray(paths[3].read_bytes())
    content[-30] ^= 1
    paths[3].write_bytes(content)
    with pytest.raises(UnreadableImageError, match=r"3\.png is not the one that was recorded"):
        ImageCache(100 * BYTES).load(paths, digests, size)
    paths[3].unlink()
    with pytest.raises(UnreadableImageError, match=r"3\.png: no such file"):
        ImageCache(100 * BYTES).load(paths, digests, size)
