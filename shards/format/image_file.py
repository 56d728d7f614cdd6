"""Checks image files by decoding them, and makes them smaller where asked."""

import io
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from PIL import Image, ImageOps, UnidentifiedImageError

# The formats that go into a shard as they are; anything else that Pillow reads is stored as JPEG.
SUFFIXES = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
IMAGE_SUFFIXES = frozenset({"jpg", "jpeg", "png", "webp"})
# What Pillow's decoders raise on broken input; nothing wider, so that our own mistakes stay visible.
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, IndexError, Image.DecompressionBombError)


@dataclass(frozen=True, slots=True)
class Picture:
    """An encoded image that is known to decode; width and height in pixels."""

    data: bytes
    suffix: str
    width: int
    height: int


def check(data: bytes, resize: int | None = None, quality: int = 95, convert: bool = True) -> Picture:
    """Decodes an image in full and, if `resize` is given, shrinks its shorter side to that many pixels.

    An image that is small enough keeps its bytes; one in another format than JPEG, PNG or WebP becomes a JPEG,
    or is refused where `convert` is False. Raises ValueError with the reason if it does not decode.
    """
    with _opened(data) as image:
        suffix = SUFFIXES.get(image.format or "")
        width, height = image.size
        if suffix and (resize is None or min(width, height) <= resize):
            image.load()
            return Picture(data, suffix, width, height)
        if not convert:
            raise ValueError(f"format {image.format} is none of JPEG, PNG, WebP")
        return _encode(image, resize, quality)


def measure(data: bytes) -> Picture:
    """Reads no more of an image than its header. Raises ValueError with the reason if that is not possible."""
    with _opened(data) as image:
        if image.format not in SUFFIXES:
            raise ValueError(f"format {image.format} is none of JPEG, PNG, WebP")
        return Picture(data, SUFFIXES[image.format], *image.size)


@contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    """The image, not yet decoded; whatever its decoder stumbles over becomes one ValueError."""
    if not data:
        raise ValueError("the image file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data)) as image:
                yield image
    except UnidentifiedImageError:
        raise ValueError("the image does not decode: no known image format") from None
    except _BROKEN as error:
        raise ValueError(f"the image does not decode: {error}") from None


def _encode(image: Image.Image, resize: int | None, quality: int) -> Picture:
    width, height = image.size
    if resize is not None and min(width, height) > resize:
        scale = resize / min(width, height)
        target = max(1, round(width * scale)), max(1, round(height * scale))
        # A JPEG decoder can shrink by 2, 4 or 8 while it decodes; twice the target leaves room to filter.
        image.draft("RGB", (2 * target[0], 2 * target[1]))
        image = image.convert("RGB").resize(target, Image.Resampling.BICUBIC)
    # The pixels are turned as the camera meant them, since the re-encoded file carries no orientation tag.
    upright = ImageOps.exif_transpose(image).convert("RGB")
    file = io.BytesIO()
    upright.save(file, "JPEG", quality=quality)
    return Picture(file.getvalue(), "jpg", *upright.size)


def looks_whole(head: bytes, tail: bytes, size: int) -> bool:
    """A cheap test on the first 12 and last 12 bytes of a file: False means that it should be decoded to tell."""
    if head[:2] == b"\xff\xd8":
        return tail[-2:] == b"\xff\xd9"
    if head[:8] == b"\x89PNG\r\n\x1a\n":
        return tail[-8:-4] == b"IEND"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return int.from_bytes(head[4:8], "little") + 8 <= size
    return False
