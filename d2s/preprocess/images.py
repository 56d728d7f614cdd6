"""Encoded images to square uint8 arrays. Pillow decodes, torch resizes; normalisation is left to the model.

JPEGs much larger than needed are decoded at a half, quarter or eighth of their size (`Image.draft`). Crop and
stretch are one antialiased bilinear resize of a box: torch's for bytes gives the same pixels as Pillow's, to one
level in rounding, in half the time. Where simplejpeg is installed it decodes plain JPEGs a fifth faster to the
very same pixels (both are libjpeg-turbo); Pillow takes whatever is not plain, and words every error.
"""

import io
import struct
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

U8 = NDArray[np.uint8]
CROP_DRAWS = 4
"""Draws that `train_image` uses: side ratio, place from the left, place from the top, flip."""
_ORIENTATION = 0x0112
_DAMAGE = (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError)
"""What Pillow raises on the bytes of a damaged image."""


def decode(data: bytes, at_least: tuple[int, int] | None = None) -> Image.Image:
    """Decodes an image file to RGB, turned as its EXIF orientation says.

    Args:
        data: a JPEG, PNG, WebP... file's bytes.
        at_least: (width, height) in pixels; a JPEG may be decoded at a fraction of its size, never below this.
    Raises:
        ValueError: the bytes are no image, are cut short, or are too large to be believed.
    """
    try:
        image = Image.open(io.BytesIO(data))
        if at_least is not None and image.format == "JPEG":
            image.draft(None, at_least)
    except UnidentifiedImageError:
        raise ValueError("image cannot be decoded: no image file of a kind that Pillow knows") from None
    except _DAMAGE as error:
        raise ValueError(f"image cannot be decoded: {error}") from None
    return to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """An opened image as RGB: turned as its EXIF orientation says, laid over white, 16 bits a pixel cut to 8.

    Raises:
        ValueError: its file turns out to be damaged.
    """
    try:
        image.load()
        if "exif" in image.info and image.getexif().get(_ORIENTATION, 1) != 1:
            image = ImageOps.exif_transpose(image)
    except _DAMAGE as error:
        raise ValueError(f"image cannot be decoded: {error}") from None
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16"):  # convert() would cut 16 bits off at 255
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def train_image(
    data: bytes, size: int, draws: Sequence[float], *, crop_min: float = 0.6, flip: float = 0.5
) -> U8:
    """A random crop, stretched to a square and flipped by chance.

    Args:
        data: the encoded image.
        size: side of the output in pixels.
        draws: at least CROP_DRAWS numbers in [0, 1): side ratio (both sides the same), left, top, flip.
        crop_min: smallest ratio of the crop's side to the image's; the ratio is uniform in (crop_min, 1).
        flip: probability of a left-right flip.
    Returns:
        uint8 (3, size, size).
    Raises:
        ValueError: the image cannot be decoded.
    """
    ratio = crop_min + (1 - crop_min) * draws[0]
    # The whole image must be decoded large enough for its crop to keep `size` pixels a side.
    whole = int(np.ceil(size / ratio))
    pixels = _decode_pixels(data, whole)
    height, width = (max(1, round(ratio * side)) for side in pixels.shape[:2])
    # + 1: every place from the first to the last is equally likely.
    left, top = int(draws[1] * (pixels.shape[1] - width + 1)), int(draws[2] * (pixels.shape[0] - height + 1))
    return _stretch(pixels[top : top + height, left : left + width], size, draws[3] < flip)


def eval_image(data: bytes | Image.Image, size: int) -> U8:
    """The whole image, encoded or opened, stretched to a square: uint8 (3, size, size).

    Raises:
        ValueError: the image cannot be decoded.
    """
    pixels = np.array(to_rgb(data)) if isinstance(data, Image.Image) else _decode_pixels(data, size)
    return _stretch(pixels, size)


def _decode_pixels(data: bytes, at_least: int) -> U8:
    """uint8 (H, W, 3), neither side below `at_least` unless the image's is.

    Raises:
        ValueError: the image cannot be decoded.
    """
    if simplejpeg is not None and data[:2] == b"\xff\xd8" and b"Exif\0" not in data[:65536]:
        try:
            height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
            if (
                colours in ("YCbCr", "Gray") and min(height, width) < 2 * at_least
            ):  # else Pillow's draft is faster
                return simplejpeg.decode_jpeg(data, "RGB")
        except ValueError:
            pass  # Pillow knows more kinds of JPEG, and says what is wrong with a damaged one
    return np.array(decode(data, (at_least, at_least)))


def _stretch(pixels: U8, size: int, mirrored: bool = False) -> U8:
    """uint8 (H, W, 3) to uint8 (3, size, size)."""
    planes = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    square = torch.nn.functional.interpolate(planes, size=(size, size), mode="bilinear", antialias=True)
    return (square[0].flip(2) if mirrored else square[0]).contiguous().numpy()
