"""From encoded images to square uint8 arrays. Pillow decodes, torch resizes; the model normalises.

JPEGs much larger than needed are decoded at a half, quarter or eighth of their size (`Image.draft`). Crop and
stretch are one antialiased bilinear resize of a box: torch's uint8 resize takes half of Pillow's time, and its pixels
differ by one level at most. If simplejpeg is installed, it decodes ordinary JPEGs a fifth faster to the same pixels
(both use libjpeg-turbo); Pillow decodes everything else, and all errors are Pillow's.
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
"""Random numbers that `train_image` uses: side ratio, left edge, top edge, flip."""
_DAMAGE = (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError)
"""What Pillow raises on the bytes of a damaged image."""


def decode(data: bytes, at_least: tuple[int, int] | None = None) -> Image.Image:
    """Decodes an image file (JPEG, PNG, WebP, ...) to upright RGB, as :mod:`d2s.shards.format.rgb` says.

    Args:
        at_least: (width, height) in pixels; a JPEG may be decoded at a fraction of its size, never below this.
    Raises:
        ValueError: the bytes are no image, are truncated, or describe an image of absurd size.
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
    """An opened image as upright RGB. Raises ValueError if its file is damaged."""
    try:
        return upright(to_rgb(image))
    except _DAMAGE as error:
        raise ValueError(f"image cannot be decoded: {error}") from None


def train_image(
    data: bytes, size: int, draws: Sequence[float], *, crop_min: float = 0.6, flip: float = 0.5
) -> U8:
    """A random crop of an encoded image, stretched to a square and flipped with probability `flip`.

    Args:
        size: side of the output in pixels.
        draws: CROP_DRAWS numbers in [0, 1): side ratio (one for both sides), left edge, top edge, flip.
        crop_min: smallest ratio of the crop's side to the image's; the ratio is uniform in (crop_min, 1).
    Returns:
        uint8 (3, size, size).
    Raises:
        ValueError: the image cannot be decoded.
    """
    ratio = crop_min + (1 - crop_min) * draws[0]
    # Large enough for the crop to have `size` pixels a side.
    pixels = _decode_pixels(data, int(np.ceil(size / ratio)))
    height, width = (max(1, round(ratio * side)) for side in pixels.shape[:2])
    # + 1: every position of the crop is equally likely.
    left, top = int(draws[1] * (pixels.shape[1] - width + 1)), int(draws[2] * (pixels.shape[0] - height + 1))
    return _stretch(pixels[top : top + height, left : left + width], size, draws[3] < flip)


def eval_image(data: bytes | Image.Image, size: int) -> U8:
    """The full image, encoded or opened, stretched to a square: uint8 (3, size, size).

    Raises:
        ValueError: the image cannot be decoded.
    """
    pixels = np.array(_loaded(data)) if isinstance(data, Image.Image) else _decode_pixels(data, size)
    return _stretch(pixels, size)


def _decode_pixels(data: bytes, at_least: int) -> U8:
    """uint8 (H, W, 3), with sides of `at_least` pixels or more, unless the image is smaller.

    Raises:
        ValueError: the image cannot be decoded.
    """
    head = data[:65536]
    oriented = b"Exif\0" in head or b":Orientation" in head
    if simplejpeg is not None and data[:2] == b"\xff\xd8" and not oriented:
        try:
            height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
            ordinary = colours in ("YCbCr", "Gray")
            if ordinary and min(height, width) < 2 * at_least:  # above, Pillow's draft is faster
                return simplejpeg.decode_jpeg(data, "RGB")
        except ValueError:
            pass  # Pillow reads more kinds of JPEG, and names what is wrong with a damaged one
    return np.array(decode(data, (at_least, at_least)))


def _stretch(pixels: U8, size: int, mirrored: bool = False) -> U8:
    """uint8 (H, W, 3) to uint8 (3, size, size)."""
    planes = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    square = torch.nn.functional.interpolate(planes, size=(size, size), mode="bilinear", antialias=True)
    return (square[0].flip(2) if mirrored else square[0]).contiguous().numpy()
