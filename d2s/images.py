"""Encoded images to square uint8 arrays. Pillow decodes, torch resizes; normalisation is left to the model.

JPEGs much larger than needed are decoded at a half, quarter or eighth of their size (`Image.draft`). Crop and
stretch are one antialiased bilinear resize of a box: torch's for bytes gives the same pixels as Pillow's, to one
level in rounding, in half the time.
"""

import io
import struct
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

U8 = NDArray[np.uint8]
CROP_DRAWS = 4
"""Draws that `train_image` uses: side ratio, place from the left, place from the top, flip."""
_ORIENTATION = 0x0112


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
        image.load()
        if "exif" in image.info and image.getexif().get(_ORIENTATION, 1) != 1:
            image = ImageOps.exif_transpose(image)
    except (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise ValueError(f"image cannot be decoded: {error}") from None
    return image if image.mode == "RGB" else _rgb(image)


def _rgb(image: Image.Image) -> Image.Image:
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
    image = decode(data, (whole, whole))
    if draws[3] < flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    width, height = max(1, round(ratio * image.width)), max(1, round(ratio * image.height))
    # + 1: every place from the first to the last is equally likely.
    left, top = int(draws[1] * (image.width - width + 1)), int(draws[2] * (image.height - height + 1))
    return _stretch(np.array(image)[top : top + height, left : left + width], size)


def eval_image(data: bytes, size: int) -> U8:
    """The whole image stretched to a square: uint8 (3, size, size).

    Raises:
        ValueError: the image cannot be decoded.
    """
    return _stretch(np.array(decode(data, (size, size))), size)


def _stretch(pixels: U8, size: int) -> U8:
    """uint8 (H, W, 3) to uint8 (3, size, size)."""
    planes = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    square = torch.nn.functional.interpolate(planes, size=(size, size), mode="bilinear", antialias=True)
    return square[0].contiguous().numpy()
