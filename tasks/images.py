"""Pictures in and out: files of any common kind to float tensors, tensors to PNG, grids, data URLs.

Everywhere in this project an image is a float32 tensor [3, h, w] with values in [0, 1], sRGB as stored;
a batch is [n, 3, h, w]. Models normalise for themselves.
"""

import base64
import hashlib
import io
import re
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

MAX_PIXELS = 64_000_000
"""Pictures of more are refused before they are decoded: 8,000 x 8,000, which takes 192 MB as pixels."""

STORED_BYTES = 65_535
"""Pictures up to this many raw bytes are written uncompressed: then no zlib version enters their bytes."""


READ_FORMATS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP")
"""What is decoded. Pillow knows many more; one of them hands the file to a program (PostScript), few see a fuzzer."""

_DEEP = re.compile(r"(?<!BGR);16[BLN]?$")
"""Raw modes of 16 bits a channel; ``BGR;16`` has 16 bits a pixel."""

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What sets a picture of each EXIF orientation upright."""

DARKEST_16_BIT = 16_383
"""The highest value of a picture of 16 bits that is taken for one of fewer, kept in 16: it would be nearly black."""

Format = Literal["png", "webp"]
"""Of files that are written: both keep every pixel; WebP takes more time and about a quarter less room."""


class UnreadableImageError(ValueError):
    """A file that is not a picture, is damaged, too large, or of a kind without a plain meaning."""


# ---------------------------------------------------------------------------------------- reading


def load_image(path: Path, size: int | None) -> Tensor:
    """Read one picture as RGB.

    What it is, is read from its content, whatever its name ends in. Greyscale and palettes become RGB,
    transparency is laid on white, 16-bit values are scaled, CMYK is converted, the EXIF orientation is applied,
    of an animation the first frame is taken. Formats are those of :data:`READ_FORMATS`.

    Args:
        path: A picture file.
        size: Side of the result: the centre square, resampled bicubically. None keeps the picture's own.

    Returns:
        float32 [3, h, w] in [0, 1].

    Raises:
        UnreadableImageError: Names the path and what is wrong with it.
    """
    return load_pixels(path, size).float() / 255


def load_pixels(path: Path, size: int | None, md5: str | None = None) -> Tensor:
    """Read one picture as :func:`load_image` does, as it is stored: uint8 [3, h, w].

    Args:
        path: A picture file.
        size: Side of the result, or None.
        md5: What the file's content was when it was recorded, in hexadecimal digits; None takes any.

    Raises:
        UnreadableImageError: As for :func:`load_image`, or the content is another.
    """
    picture = _open_rgb(path, None if md5 is None else io.BytesIO(_unchanged(path, md5)))
    if size is not None and picture.size != (size, size):
        picture = ImageOps.fit(picture, (size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


def load_images(paths: Sequence[Path], size: int) -> Tensor:
    """Read pictures of one side length: float32 [n, 3, size, size] in [0, 1]; n may be 0."""
    if not paths:
        return torch.zeros(0, 3, size, size)
    return torch.stack([load_image(path, size) for path in paths])


def refuse_changed(path: Path, md5: str) -> None:
    """See that a picture file is the one that was recorded.

    Raises:
        UnreadableImageError: It is another one, or none.
    """
    _unchanged(path, md5)


def _unchanged(path: Path, md5: str) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error
    if hashlib.md5(data, usedforsecurity=False).hexdigest() != md5:
        raise UnreadableImageError(
            f"the image {path} is not the one that was recorded: its content has changed. Put it back; or, if it was "
            "meant to change, touch it and begin the run anew"
        )
    return data


def refuse_unreadable(data: bytes, name: str) -> None:
    """Decode a picture that is not on disk yet, as :func:`load_image` would.

    Raises:
        UnreadableImageError: says what is wrong with it; ``name`` is what it is called.
    """
    _open_rgb(Path(name), io.BytesIO(data))


def _open_rgb(path: Path, data: io.BytesIO | None = None) -> Image.Image:
    try:
        with Image.open(data or path, formats=READ_FORMATS) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise _too_large(path)
            deep = any(_DEEP.search(_raw_mode(tile[3])) for tile in getattr(picture, "tile", ()))
            turned = upright(picture)
            if deep and turned.mode in ("LA", "RGB", "RGBA"):  # Pillow keeps the upper 8 of each 16 bits
                _refuse_too_dark(path, turned)
            return _to_rgb(path, turned)
    except UnreadableImageError:
        raise
    except Image.DecompressionBombError as error:
        raise _too_large(path) from error
    except (
        OSError,
        SyntaxError,
        ValueError,
        EOFError,
        NotImplementedError,
        LookupError,
        TypeError,
        AttributeError,
        ArithmeticError,
        struct.error,
        zlib.error,
    ) as error:  # what Pillow raises over data that are not what their header says
        raise _unreadable(path, error) from error


def upright(picture: Image.Image) -> Image.Image:
    """A copy of a picture as its EXIF orientation wants it seen, without Pillow's writing the rest of its EXIF anew.

    That fails where another tag is of a type that is not the standard's, which says nothing of the pixels.
    """
    picture.load()
    orientation = picture.getexif().get(ExifTags.Base.Orientation)
    turn = _TURNS.get(orientation) if isinstance(orientation, int) else None
    return picture.copy() if turn is None else picture.transpose(turn)


def _raw_mode(arguments: object) -> str:
    """How a tile's pixels are stored, as Pillow's decoders are told: by itself, or before strides and offsets."""
    return str(arguments[0] if isinstance(arguments, tuple) and arguments else arguments)


def _unreadable(path: Path, error: Exception) -> UnreadableImageError:
    reason = "no such file" if isinstance(error, FileNotFoundError) else error
    return UnreadableImageError(f"cannot read the image {path}: {reason}; replace or remove the file")


def _too_large(path: Path) -> UnreadableImageError:
    return UnreadableImageError(
        f"cannot read the image {path}: it has more than {MAX_PIXELS:,} pixels; make it smaller"
    )


def _to_rgb(path: Path, picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):
        picture = _from_16_bit(path, picture)
    elif picture.mode == "F":
        raise UnreadableImageError(
            f"cannot read the image {path}: floating-point pixels have no fixed range; save it with 8 bits"
        )
    if picture.has_transparency_data:
        seen = picture.convert("RGBA")
        ground = Image.new("RGBA", seen.size, (255, 255, 255, 255))
        return Image.alpha_composite(ground, seen).convert("RGB")
    return picture.convert("RGB")


def _from_16_bit(path: Path, picture: Image.Image) -> Image.Image:
    values = np.asarray(picture).astype(np.int64)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65_535 or 0 < high <= DARKEST_16_BIT:
        raise _too_dark(path, low, high)
    scaled = ((values + 128) // 257).astype(np.uint8)
    if isinstance(clear := picture.info.get("transparency"), int):  # one value of the 65,536
        scaled[values == clear] = 255
    return Image.fromarray(scaled)


def _refuse_too_dark(path: Path, picture: Image.Image) -> None:
    colours = np.asarray(picture)[..., : len(picture.getbands()) - ("A" in picture.getbands())]
    low, high = int(colours.min()) * 256, int(colours.max()) * 256 + 255
    if 255 < high <= DARKEST_16_BIT:
        raise _too_dark(path, low, high)


def _too_dark(path: Path, low: int, high: int) -> UnreadableImageError:
    return UnreadableImageError(
        f"cannot read the image {path}: its values go from {low:,} to {high:,}, not up to 65,535 as those of 16 bits "
        f"(8, 10, 12 or 14 bits kept in 16 would come out nearly black); save it with 8 bits"
    )


# ---------------------------------------------------------------------------------------- writing


def to_uint8(image: Tensor) -> Tensor:
    """Round [0, 1] floats of any shape to uint8; values outside are clamped.

    Raises:
        ValueError: A value is not a number.
    """
    if not torch.isfinite(image).all():
        raise ValueError("an image holds NaN or infinite values and cannot be written")
    return (image.detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8)


def png_bytes(image: Tensor) -> bytes:
    """Encode [3, h, w] or [1, h, w] in [0, 1] as PNG without metadata.

    Small pictures are stored uncompressed, so that their bytes, hence their digests, are the same on any
    machine; larger ones are compressed, hence the same for one version of Pillow.

    Raises:
        ValueError: The shape is not [1 or 3, h, w].
    """
    if image.ndim != 3 or image.shape[0] not in (1, 3) or 0 in image.shape:
        raise ValueError(f"an image must have the shape [3, h, w] or [1, h, w], got {list(image.shape)}")
    pixels = to_uint8(image).permute(1, 2, 0).contiguous().numpy()
    height, width, channels = pixels.shape
    if height * (width * channels + 1) <= STORED_BYTES:
        return _stored_png(pixels)
    buffer = io.BytesIO()
    Image.fromarray(pixels.squeeze(-1) if channels == 1 else pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def webp_bytes(image: Tensor) -> bytes:
    """Encode [3, h, w] or [1, h, w] in [0, 1] as lossless WebP: the same for one version of Pillow.

    Raises:
        ValueError: The shape is not [1 or 3, h, w].
    """
    buffer = io.BytesIO()
    Image.open(io.BytesIO(png_bytes(image))).convert("RGB").save(buffer, format="WEBP", lossless=True)
    return buffer.getvalue()


def encoded(image: Tensor, suffix: str) -> bytes:
    """Encode an image as a file of that name's end wants it.

    Raises:
        ValueError: ``suffix`` is neither ``.png`` nor ``.webp``.
    """
    writers = {".png": png_bytes, ".webp": webp_bytes}
    if suffix not in writers:
        raise ValueError(f"images are written as {' or '.join(get_args(Format))}, not as {suffix!r}")
    return writers[suffix](image)


def save_png(image: Tensor, path: Path) -> None:
    """Write :func:`png_bytes` of [3, h, w] or [1, h, w]; the folder must exist."""
    path.write_bytes(png_bytes(image))


def _stored_png(pixels: np.ndarray) -> bytes:
    """PNG (ISO 15948) of uint8 [h, w, 1 or 3]: no filter, and one stored deflate block (RFC 1951, 3.2.4)."""
    height, width, channels = pixels.shape
    rows = np.zeros((height, 1 + width * channels), np.uint8)  # each row opens with its filter: 0, none
    rows[:, 1:] = pixels.reshape(height, -1)
    raw = rows.tobytes()
    block = b"\x01" + struct.pack("<HH", len(raw), len(raw) ^ 0xFFFF) + raw
    stream = b"\x78\x01" + block + struct.pack(">I", zlib.adler32(raw))
    header = struct.pack(">IIBBBBB", width, height, 8, 0 if channels == 1 else 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", stream), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, body) for kind, body in chunks)


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def to_data_url(image: Tensor | Path, max_side: int) -> str:
    """A picture as ``data:image/png;base64,...``, scaled down so that no side exceeds ``max_side``.

    Args:
        image: [3, h, w] or [1, h, w] in [0, 1], or a picture file.
        max_side: At least 1, in pixels; smaller pictures stay as they are.

    Raises:
        ValueError: ``max_side`` < 1, a wrong shape, or an unreadable file.
    """
    if max_side < 1:
        raise ValueError(f"max_side must be at least 1, got {max_side}")
    pixels = load_image(image, None) if isinstance(image, Path) else image
    longest = max(pixels.shape[-2:])
    if longest > max_side:
        target = [max(1, round(side * max_side / longest)) for side in pixels.shape[-2:]]
        pixels = torch.nn.functional.interpolate(
            pixels.float()[None], target, mode="bicubic", antialias=True, align_corners=False
        )[0]
    return "data:image/png;base64," + base64.b64encode(png_bytes(pixels)).decode("ascii")


# ---------------------------------------------------------------------------------------- arranging


def grid(images: Tensor, columns: int, pad: int) -> Tensor:
    """Lay pictures out in rows, ``pad`` white pixels between and around them.

    Args:
        images: [n, c, h, w] in [0, 1], n >= 1.
        columns: At least 1; fewer pictures make a narrower grid. The last row is filled with white.
        pad: At least 0.

    Returns:
        [c, rows * (h + pad) + pad, columns * (w + pad) + pad].

    Raises:
        ValueError: No image, or ``columns`` or ``pad`` out of range.
    """
    if images.ndim != 4 or len(images) == 0 or columns < 1 or pad < 0:
        raise ValueError(
            f"a grid needs images [n >= 1, c, h, w], columns >= 1 and pad >= 0, "
            f"got {list(images.shape)}, columns={columns}, pad={pad}"
        )
    n, c, h, w = images.shape
    columns = min(columns, n)
    rows = -(-n // columns)
    sheet = images.new_ones(c, rows * (h + pad) + pad, columns * (w + pad) + pad)
    for i, image in enumerate(images):
        top, left = pad + (i // columns) * (h + pad), pad + (i % columns) * (w + pad)
        sheet[:, top : top + h, left : left + w] = image
    return sheet


def as_unit(images: Tensor) -> Tensor:
    """8-bit pixels of any shape as float32 in [0, 1]; floating-point ones are in [0, 1] already and stay."""
    return images if images.is_floating_point() else images.float().div_(255)


def to_greyscale(images: Tensor) -> Tensor:
    """Luma of ITU-R BT.601: [..., 3, h, w] in [0, 1] to [..., 1, h, w] in [0, 1].

    Raises:
        ValueError: The images do not have three channels.
    """
    if images.ndim < 3 or images.shape[-3] != 3:
        raise ValueError(f"to_greyscale takes [..., 3, h, w], got {list(images.shape)}")
    weights = images.new_tensor([0.299, 0.587, 0.114])
    return (images * weights[:, None, None]).sum(-3, keepdim=True)
