"""Converts images of any Pillow mode to 8-bit RGB. The builder, training and `encode_image` all use it."""

import numpy as np
from PIL import Image, ImageCms, ImageOps

_ORIENTATION = 0x0112
# TIFF tags.
_BITS, _PHOTOMETRIC = 258, 262
_WHITE_IS_ZERO = 0
# Entries of `Image.info` that may contain an orientation. Checking them first saves a slow search.
_ORIENTED = ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif")


def upright(image: Image.Image) -> Image.Image:
    """Rotates and mirrors an image as its EXIF or XMP orientation says. For TIFF, Pillow itself does so."""
    if any(name in image.info for name in _ORIENTED) and image.getexif().get(_ORIENTATION, 1) != 1:
        return ImageOps.exif_transpose(image)
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts an image to 8-bit RGB, without rotation. Transparent parts become white.

    Values of more than 8 bits are scaled to 8. If the file does not say their range, it is taken to be the
    smallest that contains them: 8 or 16 bits, or for floats also [0, 1]. Damaged files raise Pillow's errors.
    """
    image.load()
    transparent = "transparency" in image.info
    if image.mode == "RGB" and not transparent:
        return image
    if image.mode == "I" or image.mode.startswith("I;") or image.mode == "F":
        result = Image.fromarray(_eight_bits(image)).convert("RGB")
    elif image.mode == "LAB":
        spaces = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        result = ImageCms.profileToProfile(image, *spaces, outputMode="RGB")
    elif transparent or image.mode in ("RGBA", "RGBa", "LA", "La", "PA"):
        layer = image.convert("LA") if image.mode == "La" else image
        white = Image.new("RGBA", image.size, "white")
        result = Image.alpha_composite(white, layer.convert("RGBA")).convert("RGB")
    else:
        result = image.convert("RGB")
    result.info |= {name: image.info[name] for name in _ORIENTED if name in image.info}
    return result


def _eight_bits(image: Image.Image) -> np.ndarray:
    """Converts an image of integers or floats to grey uint8 (H, W). Transparent pixels become white."""
    values, tags = np.asarray(image), getattr(image, "tag_v2", {})
    if image.mode == "F":
        values = np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
        top = values.max(initial=0)
        grey = values * (255 if top <= 1 else 1 if top <= 255 else 1 / 256 if top < 65536 else 255 / top)
    elif image.mode == "I" and image.format not in ("PNG", "PPM"):  # these two have 16 bits
        top = int(values.max(initial=0))
        grey = values >> max(0, (top > 255) * 8, top.bit_length() - 8 if top > 65535 else 0)
    else:
        grey = values >> (4 if tags.get(_BITS) == (12,) else 8)
    grey = np.clip(grey, 0, 255).astype(np.uint8)
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        grey = 255 - grey
    if "transparency" in image.info:
        grey = np.where(values == image.info["transparency"], np.uint8(255), grey)
    return grey
