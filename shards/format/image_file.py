"""Checks image files by decoding them, and shrinks them on request."""

import io
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from PIL import Image, UnidentifiedImageError

from d2s.shards.format.rgb import to_rgb, upright

# Formats that are stored without conversion. Every other format that Pillow reads is stored as JPEG.
SUFFIXES = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
IMAGE_SUFFIXES = (
    "jpg",
    "jpeg",
    "jfif",
    "png",
    "webp",
    "gif",
    "bmp",
    "tif",
    "tiff",
    "avif",
    "jp2",
    "ppm",
    "pgm",
)
"""Suffixes of the members of a tar that are images. The real format is detected from their bytes."""
# Errors that Pillow's decoders raise on broken files. Others are not caught, because they are bugs of ours.
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, IndexError, Image.DecompressionBombError)


GIT_LFS = b"version https://git-lfs"
"""How a file begins that only stands for another one in Git LFS."""


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """An image file (JPEG, PNG or WebP) that passed a check. Width and height are in pixels."""

    data: bytes
    suffix: str
    width: int
    height: int


def check_image(
    data: bytes, resize: int | None = None, quality: int = 95, convert: bool = True
) -> EncodedImage:
    """Decodes an image in full. With `resize`, shrinks a larger image's shorter side to that many pixels.

    An image that is not shrunk keeps its bytes if it is a JPEG, PNG or WebP. An image in another format
    becomes a JPEG, or raises ValueError if `convert` is False. Raises ValueError if it does not decode.
    """
    with _opened(data) as image:
        suffix = SUFFIXES.get(image.format or "")
        width, height = image.size
        if suffix and (resize is None or min(width, height) <= resize):
            image.load()
            return EncodedImage(data, suffix, width, height)
        if not convert:
            raise ValueError(_stored_as_it_is(image))
        return _encode(image, resize, quality)


def check_header(data: bytes) -> EncodedImage:
    """Reads only an image's header. Raises ValueError, with the reason, unless it is JPEG, PNG or WebP."""
    with _opened(data) as image:
        if image.format not in SUFFIXES:
            raise ValueError(_stored_as_it_is(image))
        return EncodedImage(data, SUFFIXES[image.format], *image.size)


def _stored_as_it_is(image: Image.Image) -> str:
    return f"format {image.format} is none of JPEG, PNG, WebP; `build` copies it as a JPEG"


@contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    """Opens an image without decoding it. Decoder errors inside the `with` block become ValueError."""
    if not data:
        raise ValueError("the image file is empty")
    try:
        with warnings.catch_warnings():
            # Pillow warns about metadata and large images. If it cannot read the pixels, it raises an error.
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data)) as image:
                yield image
    except UnidentifiedImageError:
        raise ValueError(f"the image does not decode: no known image format{_guess(data)}") from None
    except _BROKEN as error:
        raise ValueError(f"the image does not decode: {error}") from None


def _guess(data: bytes) -> str:
    """What a file that is no image seems to be, as the end of a message."""
    head = data[:512].lstrip().lower()
    if head.startswith(GIT_LFS):
        return "; a pointer of Git LFS: `git lfs pull` fetches the file"
    if head[4:8] == b"ftyp" and head[8:12] in (b"heic", b"heix", b"mif1", b"hevc", b"msf1"):
        return "; HEIC: convert it to JPEG"
    if head.startswith((b"<svg", b"<?xml")):
        return "; it seems to be SVG: convert it to PNG" if b"<svg" in head else "; it is XML"
    return "; it is HTML: download it again" if head.startswith((b"<!doctype html", b"<html")) else ""


def _encode(image: Image.Image, resize: int | None, quality: int) -> EncodedImage:
    width, height = image.size
    if resize is not None and min(width, height) > resize:
        scale = resize / min(width, height)
        target = max(1, round(width * scale)), max(1, round(height * scale))
        # The JPEG decoder can shrink by 2, 4 or 8. It stops at twice the target size; resize does the rest.
        image.draft("RGB", (2 * target[0], 2 * target[1]))
        image = to_rgb(image).resize(target, Image.Resampling.BICUBIC)
    # The JPEG gets no orientation tag, so the pixels themselves must be rotated.
    image = upright(to_rgb(image))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return EncodedImage(file.getvalue(), "jpg", *image.size)


def has_valid_ends(head: bytes, tail: bytes, size: int) -> bool:
    """Returns whether an image's first and last 12 bytes look intact. If not, it must be decoded to know."""
    if head[:2] == b"\xff\xd8":
        return tail[-2:] == b"\xff\xd9"
    if head[:8] == b"\x89PNG\r\n\x1a\n":
        return tail[-8:-4] == b"IEND"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return int.from_bytes(head[4:8], "little") + 8 <= size
    return False
