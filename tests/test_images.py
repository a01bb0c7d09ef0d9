import base64
import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image, ImageOps

from tasks.images import (
    UnreadableImageError,
    encoded,
    grid,
    load_image,
    load_images,
    load_pixels,
    png_bytes,
    refuse_unreadable,
    save_png,
    to_data_url,
    to_greyscale,
    to_uint8,
    upright,
)

RED = torch.tensor([1.0, 0.0, 0.0])


def pixel(path, y=0, x=0):
    return load_image(path, None)[:, y, x]


def save(picture, path, **options):
    picture.save(path, **options)
    return path


def test_rgb_png_round_trip_is_exact(tmp_path):
    image = torch.randint(0, 256, (3, 7, 5), generator=torch.Generator().manual_seed(0)) / 255
    save_png(image, tmp_path / "a.png")
    loaded = load_image(tmp_path / "a.png", None)
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded, image)


def test_greyscale_becomes_three_equal_channels(tmp_path):
    path = save(Image.new("L", (4, 3), 51), tmp_path / "a.png")
    assert torch.allclose(load_image(path, None), torch.full((3, 3, 4), 0.2))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_laid_on_white(tmp_path, mode):
    colour = (0, 0, 0, 0) if mode == "RGBA" else (0, 0)
    path = save(Image.new(mode, (2, 2), colour), tmp_path / "a.png")
    assert torch.equal(pixel(path), torch.ones(3))


def test_half_transparent_red_is_pink(tmp_path):
    path = save(Image.new("RGBA", (2, 2), (255, 0, 0, 51)), tmp_path / "a.png")
    assert torch.allclose(pixel(path), torch.tensor([1.0, 0.8, 0.8]), atol=1 / 255)


def test_palette_with_transparent_entry(tmp_path):
    picture = Image.new("P", (2, 1))
    picture.putpalette([255, 0, 0, 0, 0, 255] + [0] * 762)
    picture.putdata([0, 1])
    path = save(picture, tmp_path / "a.png", transparency=1)
    assert torch.equal(pixel(path, 0, 0), RED)
    assert torch.equal(pixel(path, 0, 1), torch.ones(3))


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    values = np.array([[0, 32768, 65535]], dtype=np.uint16)
    path = save(Image.fromarray(values), tmp_path / "a.png")
    assert torch.allclose(load_image(path, None)[0, 0], torch.tensor([0.0, 0.5, 1.0]), atol=1 / 255)


def test_cmyk_is_converted(tmp_path):
    path = save(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), tmp_path / "a.tif")
    assert torch.equal(pixel(path), RED)


def test_exif_orientation_is_applied(tmp_path):
    picture = Image.new("RGB", (16, 8), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter clockwise to view
    path = save(picture, tmp_path / "a.jpg", exif=exif)
    assert load_image(path, None).shape == (3, 16, 8)


def tiff_tags(*tags):
    """An EXIF block of a quarter turn and of other tags as (number, type, count, value), standard or not."""
    entries = sorted([(0x0112, 3, 1, 6), *tags])
    listed = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return (
        b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + listed + struct.pack("<I", 0) + b"\xff" * 16
    )


@pytest.mark.parametrize(
    "tag",
    [
        (0x0131, 5, 1, 38),
        (0x0131, 11, 1, 0),
        (0x011A, 2, 3, 0x003237),
        (0x8769, 16, 1, 38),
        (0x0112, 2, 2, 0x36),
    ],
    ids=[
        "a rational program",
        "a float",
        "a resolution in words",
        "an enormous pointer",
        "an orientation in words",
    ],
)
def test_odd_exif_says_nothing_of_the_pixels(tmp_path, tag):
    picture = Image.new("RGB", (16, 8), (255, 0, 0))
    path = save(picture, tmp_path / "a.jpg", exif=tiff_tags(tag))
    assert load_image(path, None).shape in ((3, 16, 8), (3, 8, 16))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_set_upright_as_pillow_does(orientation):
    rng = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = orientation
    (file := io.BytesIO()).name = "a.png"
    Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)).save(file, exif=exif)
    assert upright(Image.open(file)).tobytes() == ImageOps.exif_transpose(Image.open(file)).tobytes()


def test_size_takes_the_centre_square(tmp_path):
    picture = Image.new("RGB", (30, 10), (0, 0, 255))
    picture.paste((255, 0, 0), (10, 0, 20, 10))
    image = load_image(save(picture, tmp_path / "a.png"), 10)
    assert image.shape == (3, 10, 10)
    assert torch.equal(image[:, 5, 5], RED)


def test_load_images_of_nothing_is_an_empty_batch(tmp_path):
    assert load_images([], 8).shape == (0, 3, 8, 8)


def damaged(path, kind):
    whole = png_bytes(torch.rand(3, 40, 40, generator=torch.Generator().manual_seed(0)))
    body = {"empty": b"", "text": b"not a picture", "truncated": whole[:2000]}[kind]
    path.write_bytes(body)
    return path


@pytest.mark.parametrize("kind", ["empty", "text", "truncated"])
def test_damaged_file_is_refused_by_name(tmp_path, kind):
    path = damaged(tmp_path / "broken.png", kind)
    with pytest.raises(UnreadableImageError, match=r"cannot read the image .*broken\.png"):
        load_image(path, 8)


def test_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(UnreadableImageError, match=r"gone\.png: no such file"):
        load_image(tmp_path / "gone.png", 8)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [8_001, 10_000, 60_000])
def test_decompression_bomb_is_refused_before_decoding(tmp_path, side):
    header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    idat = b"IDAT" + zlib.compress(b"\0")
    data = struct.pack(">I", len(idat) - 4) + idat + struct.pack(">I", zlib.crc32(idat))
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + data)
    with pytest.raises(UnreadableImageError, match=r"bomb\.png: it has more than 64,000,000 pixels"):
        load_image(tmp_path / "bomb.png", 8)


def test_float_pixels_are_refused(tmp_path):
    path = save(Image.new("F", (4, 4), 0.5), tmp_path / "a.tif")
    with pytest.raises(UnreadableImageError, match="no fixed range"):
        load_image(path, None)


@pytest.mark.parametrize("shape", [(3, 28, 28), (1, 28, 28), (3, 200, 200)])
def test_png_is_standard_and_the_same_twice(shape):
    image = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(1)) / 255
    data = png_bytes(image)
    assert data == png_bytes(image.clone())
    picture = Image.open(io.BytesIO(data))
    picture.verify()
    assert picture.info == {}
    decoded = np.atleast_3d(np.array(Image.open(io.BytesIO(data)))).transpose(2, 0, 1)
    assert np.array_equal(decoded, to_uint8(image).numpy())


def test_small_png_bytes_are_pinned():
    image = torch.arange(12).view(3, 2, 2) / 11
    assert zlib.crc32(png_bytes(image)) == 2657101675  # its pixels are checked above


def test_to_uint8_rounds_and_clamps():
    values = torch.tensor([-0.1, 0.0, 0.499 / 255, 0.501 / 255, 1.0, 1.5])
    assert to_uint8(values).tolist() == [0, 0, 0, 1, 255, 255]


def test_to_uint8_refuses_nan():
    with pytest.raises(ValueError, match="NaN"):
        to_uint8(torch.tensor([0.5, float("nan")]))


@pytest.mark.parametrize("shape", [(2, 4, 4), (4, 4), (3, 0, 4)])
def test_png_refuses_other_shapes(shape):
    with pytest.raises(ValueError, match="must have the shape"):
        png_bytes(torch.zeros(shape))


def test_grid_places_images_row_by_row_on_white():
    images = torch.stack([torch.full((1, 2, 3), value) for value in (0.1, 0.2, 0.3)])
    sheet = grid(images, columns=2, pad=1)
    assert sheet.shape == (1, 7, 9)
    assert torch.equal(sheet[:, 1:3, 5:8], images[1])
    assert torch.equal(sheet[:, 4:6, 1:4], images[2])
    assert torch.equal(sheet[:, 4:6, 5:8], torch.ones(1, 2, 3))
    assert torch.equal(sheet[:, :, 0], torch.ones(1, 7))


def test_grid_is_no_wider_than_its_images():
    assert grid(torch.zeros(2, 3, 4, 4), columns=10, pad=0).shape == (3, 4, 8)


@pytest.mark.parametrize(("n", "columns", "pad"), [(0, 1, 0), (1, 0, 0), (1, 1, -1)])
def test_grid_refuses_nonsense(n, columns, pad):
    with pytest.raises(ValueError, match="a grid needs"):
        grid(torch.zeros(n, 3, 4, 4), columns, pad)


def decoded(url):
    head, body = url.split(",")
    assert head == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(body)))


def test_data_url_scales_down_only(tmp_path):
    image = torch.zeros(3, 20, 40)
    assert decoded(to_data_url(image, 10)).size == (10, 5)
    assert decoded(to_data_url(image, 100)).size == (40, 20)
    save_png(image, tmp_path / "a.png")
    assert to_data_url(tmp_path / "a.png", 100) == to_data_url(image, 100)


def test_greyscale_weights_sum_to_one():
    assert torch.allclose(to_greyscale(torch.ones(2, 3, 4, 4)), torch.ones(2, 1, 4, 4))
    assert torch.allclose(to_greyscale(RED.view(3, 1, 1)), torch.tensor(0.299))
    with pytest.raises(ValueError, match="takes"):
        to_greyscale(torch.ones(1, 4, 4))


# ---------------------------------------------------------------------------------------- kinds of files


@pytest.mark.parametrize("suffix", [".png", ".webp"])
@pytest.mark.parametrize("shape", [(3, 40, 60), (1, 9, 7), (3, 200, 300)])
def test_both_kinds_keep_every_pixel(tmp_path, suffix, shape):
    image = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0)) / 255
    path = tmp_path / f"a{suffix}"
    path.write_bytes(encoded(image, suffix))
    assert torch.equal(load_image(path, None), image.expand(3, -1, -1))
    with Image.open(path) as picture:
        assert picture.format == suffix[1:].upper()


def test_other_kinds_are_refused():
    with pytest.raises(ValueError, match=r"as png or webp, not as '\.jpg'"):
        encoded(torch.zeros(3, 2, 2), ".jpg")


# ---------------------------------------------------------------------------------------- what people have


@pytest.mark.parametrize("kind", ["gif", "webp", "png", "tif"])
def test_of_an_animation_or_several_pages_the_first_is_taken(tmp_path, kind):
    first, second = (Image.new("RGB", (4, 4), colour) for colour in ("red", "blue"))
    path = save(
        first,
        tmp_path / f"a.{kind}",
        save_all=True,
        append_images=[second],
        **({"lossless": True} if kind == "webp" else {}),
    )
    assert torch.equal(load_image(path, None), RED[:, None, None].expand(3, 4, 4))


def test_the_name_s_end_says_nothing(tmp_path):
    Image.new("RGB", (4, 4), "red").save(tmp_path / "a.jpg", format="PNG")
    assert torch.equal(pixel(tmp_path / "a.jpg"), RED)


def test_one_bit_and_grey_with_alpha_and_sixteen_bit_tiff(tmp_path):
    assert torch.equal(pixel(save(Image.new("1", (3, 3), 1), tmp_path / "a.png")), torch.ones(3))
    assert torch.equal(
        pixel(save(Image.new("LA", (3, 3), (51, 255)), tmp_path / "b.png")), torch.full((3,), 0.2)
    )
    values = np.full((3, 3), 65535, np.uint16)
    assert torch.equal(pixel(save(Image.fromarray(values), tmp_path / "c.tif")), torch.ones(3))


def test_eight_bit_values_in_sixteen_bits_would_be_black_and_are_refused(tmp_path):
    path = save(Image.fromarray(np.arange(256, dtype=np.uint16).reshape(16, 16)), tmp_path / "dark.png")
    with pytest.raises(
        UnreadableImageError, match=r"dark\.png: its values go from 0 to 255, not up to 65,535"
    ):
        load_image(path, 8)
    black = save(Image.fromarray(np.zeros((4, 4), np.uint16)), tmp_path / "black.png")
    assert torch.equal(pixel(black), torch.zeros(3))


@pytest.mark.parametrize("bits", [10, 12, 14])
def test_fewer_bits_kept_in_sixteen_would_be_nearly_black_and_are_refused(tmp_path, bits):
    ramp = np.linspace(0, 2**bits - 1, 256, dtype=np.uint16).reshape(16, 16)
    grey = save(Image.fromarray(ramp), tmp_path / "grey.png")
    rgb = tmp_path / "rgb.png"
    rgb.write_bytes(deep_png(np.stack([ramp] * 3, axis=-1), 2))
    alpha = tmp_path / "alpha.png"
    alpha.write_bytes(deep_png(np.stack([ramp, np.full_like(ramp, 65_535)], axis=-1), 4))
    for path in (grey, rgb, alpha):
        with pytest.raises(UnreadableImageError, match=rf"{path.name}: its values go from 0 to .*14 bits"):
            load_image(path, 8)


@pytest.mark.parametrize(
    ("width", "name"), [(71, "a.bmp"), (372, "b.bmp"), (64, "lzw.tif"), (71, "deflate.tif")]
)
def test_a_dark_picture_of_eight_bits_is_read_whatever_its_width(tmp_path, width, name):
    """Its rows then have 216 or 1116 bytes, or its data begin at 7416: a 16 that says nothing of bits."""
    values = np.random.default_rng(0).integers(0, 50, (40, width, 3), dtype=np.uint8)
    kinds = {"lzw.tif": "tiff_lzw", "deflate.tif": "tiff_adobe_deflate"}
    path = save(
        Image.fromarray(values), tmp_path / name, **({"compression": kinds[name]} if name in kinds else {})
    )
    assert torch.equal(load_pixels(path, None), torch.from_numpy(values).permute(2, 0, 1))


def test_sixteen_bits_a_pixel_are_not_sixteen_a_channel(tmp_path):
    """A BMP of 5, 6 and 5 bits, dark."""
    header = struct.pack("<2sIHHI", b"BM", 66 + 8, 0, 0, 66)
    info = struct.pack("<IiiHHIIiiIIIII", 40, 2, 2, 1, 16, 3, 8, 0, 0, 0, 0, 0xF800, 0x07E0, 0x001F)
    path = tmp_path / "a.bmp"
    path.write_bytes(header + info[:52] + struct.pack("<4H", *[3 << 11 | 6 << 5 | 3] * 4))
    assert torch.allclose(pixel(path), torch.full((3,), 24 / 255))


def deep_png(values, kind):
    """A PNG of 16 bits a channel, uint16 [h, w, channels], in a kind that Pillow reads and does not write."""
    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    framed = (
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def test_colours_of_sixteen_bits_are_scaled(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(deep_png(np.array([[[65_535, 0, 32_896]]], np.uint16), 2))
    assert torch.allclose(pixel(path), torch.tensor([1, 0, 128 / 255]))


def test_the_transparent_value_of_a_sixteen_bit_picture_is_white(tmp_path):
    values = np.array([[0, 1, 30_000, 65_535]], np.uint16)
    path = save(Image.fromarray(values), tmp_path / "a.png", transparency=0)
    seen = (load_image(path, None)[0, 0] * 255).round().int().tolist()
    assert seen == [255, 0, 117, 255]


def test_formats_that_are_programs_or_rare_are_no_pictures(tmp_path, monkeypatch):
    begun = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: begun.append(1))
    written = io.BytesIO()
    Image.new("RGB", (8, 8)).save(written, format="EPS")
    for data in (written.getvalue(), b"DDS " + bytes(200), b"P6 1 1 255\n\0\0\0"):
        (tmp_path / "a.png").write_bytes(data)
        with pytest.raises(UnreadableImageError, match=r"a\.png: cannot identify"):
            load_image(tmp_path / "a.png", 8)
        with pytest.raises(UnreadableImageError, match="reply: cannot identify"):
            refuse_unreadable(data, "reply")
    assert not begun, "PostScript was run"


def test_cmyk_of_a_jpeg_is_converted(tmp_path):
    assert load_image(save(Image.new("CMYK", (8, 8)), tmp_path / "a.jpg"), None).min() > 0.98


def test_a_picture_without_pixels_is_refused(tmp_path):
    empty = b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 0, 0, 1, 24, 0, 0, 0, 0, 0, 0)
    (tmp_path / "none.bmp").write_bytes(empty)
    (tmp_path / "none.gif").write_bytes(
        b"GIF89a" + struct.pack("<HHBBB", 0, 0, 0, 0, 0) + b",\0\0\0\0\0\0\0\0\0\2\0;"
    )
    for name in ("none.bmp", "none.gif"):
        with pytest.raises(UnreadableImageError, match=name):
            load_image(tmp_path / name, 8)


def test_what_is_not_on_disk_yet_is_looked_at_as_if_it_were():
    refuse_unreadable(png_bytes(torch.rand(3, 4, 4)), "reply")
    with pytest.raises(UnreadableImageError, match="cannot read the image reply"):
        refuse_unreadable(png_bytes(torch.rand(3, 200, 200))[:5000], "reply")
