"""Turns encoded images into square uint8 arrays. Pillow decodes, torch resizes, the model normalises.

JPEGs much larger than needed are decoded at a half, quarter or eighth of their size (`Image.draft`). A crop
is stretched to a square by antialiased bilinear interpolation in torch. This takes half the time of Pillow's
resize, and pixel values differ by at most 1. If simplejpeg is installed, it decodes ordinary JPEGs a fifth
faster than Pillow, to the same pixels (both use libjpeg-turbo). Pillow decodes all other files.
"""

import io
import struct
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from d2s.shards.format.rgb import to_rgb, upright

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

U8 = NDArray[np.uint8]
CROP_DRAWS = 4
"""Number of random numbers that `train_image` uses: side ratio, left edge, top edge, flip."""
_DAMAGE = (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError)
"""Exceptions that Pillow raises if an image file is damaged."""


def decode(data: bytes, at_least: tuple[int, int] | None = None) -> Image.Image:
    """Decodes an image file (JPEG, PNG, WebP, ...) to RGB and rotates it by its EXIF orientation.

    Args:
        at_least: (width, height) in pixels. A larger JPEG may be decoded smaller, but at least at this size.
    Raises:
        ValueError: the bytes are not an image, are truncated, or describe an absurdly large image.
    """
    try:
        image = Image.open(io.BytesIO(data))
        if at_least is not None and image.format == "JPEG":
            image.draft(None, at_least)
    except UnidentifiedImageError:
        raise ValueError("image cannot be decoded: no image file of a kind that Pillow knows") from None
    except _DAMAGE as error:
        raise ValueError(f"image cannot be decoded: {error}") from None
    return _loaded(image)


def _loaded(image: Image.Image) -> Image.Image:
    """Converts an opened image to upright RGB. Raises ValueError if its file is damaged."""
    try:
        return upright(to_rgb(image))
    except _DAMAGE as error:
        raise ValueError(f"image cannot be decoded: {error}") from None


def train_image(
    data: bytes, size: int, draws: Sequence[float], *, crop_min: float = 0.6, flip: float = 0.5
) -> U8:
    """Crops an encoded image at random, stretches the crop to a square, and flips it with probability `flip`.

    Args:
        size: side of the output in pixels.
        draws: CROP_DRAWS uniform numbers in [0, 1), for the side ratio, left edge, top edge and flip.
        crop_min: smallest side ratio: width and height of the crop divided by those of the image.
    Returns:
        uint8 (3, size, size).
    Raises:
        ValueError: the image cannot be decoded.
    """
    ratio = crop_min + (1 - crop_min) * draws[0]
    # Decodes the image large enough that the crop has at least `size` pixels on each side.
    pixels = _decode_pixels(data, int(np.ceil(size / ratio)))
    height, width = (max(1, round(ratio * side)) for side in pixels.shape[:2])
    # The + 1 makes all positions of the crop equally likely.
    left, top = int(draws[1] * (pixels.shape[1] - width + 1)), int(draws[2] * (pixels.shape[0] - height + 1))
    return _stretch(pixels[top : top + height, left : left + width], size, draws[3] < flip)


def eval_image(data: bytes | Image.Image, size: int) -> U8:
    """Stretches a full image to a square. data: a file's bytes or a PIL image. Returns uint8 (3, size, size).

    Raises:
        ValueError: the image cannot be decoded.
    """
    pixels = np.array(_loaded(data)) if isinstance(data, Image.Image) else _decode_pixels(data, size)
    return _stretch(pixels, size)


def _decode_pixels(data: bytes, at_least: int) -> U8:
    """Decodes an image to uint8 (H, W, 3). May shrink it, but no side below `at_least` pixels.

    Raises:
        ValueError: the image cannot be decoded.
    """
    head = data[:65536]
    oriented = b"Exif\0" in head or b":Orientation" in head
    if simplejpeg is not None and data[:2] == b"\xff\xd8" and not oriented:
        try:
            height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
            ordinary = colours in ("YCbCr", "Gray")
            if ordinary and min(height, width) < 2 * at_least:  # for larger JPEGs, Pillow's draft is faster
                return simplejpeg.decode_jpeg(data, "RGB")
        except ValueError:
            pass  # Pillow reads more kinds of JPEG, and its error messages are more precise
    return np.array(decode(data, (at_least, at_least)))


def _stretch(pixels: U8, size: int, mirrored: bool = False) -> U8:
    """Stretches uint8 (H, W, 3) to uint8 (3, size, size), and flips it left to right if `mirrored`."""
    planes = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    square = torch.nn.functional.interpolate(planes, size=(size, size), mode="bilinear", antialias=True)
    return (square[0].flip(2) if mirrored else square[0]).contiguous().numpy()
