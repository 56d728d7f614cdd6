"""The builder, training and `encode_image` show the same picture of an image file, whatever its mode."""

import io
import struct

import numpy as np
import pytest
from PIL import Image

from d2s.preprocess.images import eval_image, train_image
from d2s.preprocess.pixels import pixels
from d2s.shards.format.image_file import check_image
from d2s.shards.format.rgb import to_rgb

SIZE = 96
RAMP = np.linspace(0, 1, SIZE)[None].repeat(SIZE, 0)
"""From black on the left to white on the right."""
GREY = (RAMP * 255).astype(np.uint8)
COLOUR = np.stack([GREY, GREY.T, np.full_like(GREY, 90)], 2)
ALPHA = np.where(np.arange(SIZE) < SIZE // 2, 0, 255).astype(np.uint8)[:, None].repeat(SIZE, 1)
RGB = Image.fromarray(COLOUR)
OVER_WHITE = np.where(ALPHA[..., None] == 0, 255, COLOUR).astype(np.uint8)
GREY_OVER_WHITE = np.where(ALPHA == 0, 255, GREY)


def file(image, format, **options):
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def with_palette(format):
    """The upper half transparent, the lower half green."""
    image = Image.fromarray((ALPHA > 0).astype(np.uint8), "P")
    image.putpalette([200, 0, 0, 0, 160, 0])
    return file(image, format, transparency=0)


def alpha(mode):
    image = Image.fromarray(GREY) if mode == "LA" else RGB.copy()
    image.putalpha(Image.fromarray(ALPHA))
    assert image.mode == mode
    return image


def white_is_zero():
    """A TIFF of 16 bits whose 0 is white: Pillow does not invert it."""
    data = file(Image.fromarray(65535 - (RAMP * 65535).astype(np.uint16)), "TIFF")
    black_is_zero, inverted = (struct.pack("<HHII", 262, 3, 1, value) for value in (1, 0))
    assert data.count(black_is_zero) == 1
    return data.replace(black_is_zero, inverted)


GREEN = np.where(ALPHA[..., None] == 0, 255, np.array([0, 160, 0])).astype(np.uint8)
DEEP = Image.fromarray((RAMP * 65535).astype(np.uint16))
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF><tiff:Orientation>6</tiff:Orientation></rdf:RDF></x:xmpmeta>'
EXIF = Image.Exif()
EXIF[0x0112] = 6  # to be turned by 90 degrees
TURNED = np.rot90(COLOUR, -1)
CASES = {
    "1 PNG": (file(Image.fromarray(ALPHA > 0), "PNG"), ALPHA),
    "L PNG": (file(Image.fromarray(GREY), "PNG"), GREY),
    "L PNG, one level transparent": (
        file(Image.fromarray(np.minimum(ALPHA, 90)), "PNG", transparency=0), np.where(ALPHA == 0, 255, 90),
    ),
    "L JPEG": (file(Image.fromarray(GREY), "JPEG"), GREY),
    "I;16 PNG": (file(DEEP, "PNG"), GREY),
    "I;16 TIFF": (file(DEEP, "TIFF"), GREY),
    "I;16 TIFF, white is 0": (white_is_zero(), GREY),
    "I;16 JPEG 2000": (file(DEEP, "JPEG2000"), GREY),
    "I TIFF of 8 bits": (file(Image.fromarray(GREY.astype(np.int32)), "TIFF"), GREY),
    "I TIFF of 16 bits": (file(Image.fromarray((RAMP * 65535).astype(np.int32)), "TIFF"), GREY),
    "I TIFF of 31 bits": (file(Image.fromarray((RAMP * (2**31 - 1)).astype(np.int32)), "TIFF"), GREY),
    "F TIFF in [0, 1]": (file(Image.fromarray(RAMP.astype(np.float32)), "TIFF"), GREY),
    "F TIFF in [0, 255]": (file(Image.fromarray((RAMP * 255).astype(np.float32)), "TIFF"), GREY),
    "F TIFF in [0, 65535]": (file(Image.fromarray((RAMP * 65535).astype(np.float32)), "TIFF"), GREY),
    "P PNG": (file(RGB.quantize(256), "PNG"), np.asarray(RGB.quantize(256).convert("RGB"))),
    "P PNG, transparent": (with_palette("PNG"), GREEN),
    "P GIF, transparent": (with_palette("GIF"), GREEN),
    "LA PNG": (file(alpha("LA"), "PNG"), GREY_OVER_WHITE),
    "RGBA PNG": (file(alpha("RGBA"), "PNG"), OVER_WHITE),
    "RGBA WebP": (file(alpha("RGBA"), "WEBP", lossless=True), OVER_WHITE),
    "RGBA TIFF": (file(alpha("RGBA"), "TIFF"), OVER_WHITE),
    "RGBA PNG, turned": (file(alpha("RGBA"), "PNG", exif=EXIF), np.rot90(OVER_WHITE, -1)),
    "RGB PNG, one colour transparent": (
        file(Image.fromarray(GREEN // 2), "PNG", transparency=(127, 127, 127)),
        np.where(ALPHA[..., None] == 0, 255, GREEN // 2),
    ),
    "CMYK JPEG": (file(RGB.convert("CMYK"), "JPEG", quality=95), COLOUR),
    "CMYK TIFF": (file(RGB.convert("CMYK"), "TIFF"), COLOUR),
    "YCbCr TIFF": (file(RGB.convert("YCbCr"), "TIFF"), COLOUR),
    "RGB BMP": (file(RGB, "BMP"), COLOUR),
    "RGB JPEG": (file(RGB, "JPEG", quality=95), COLOUR),
    "RGB JPEG, turned by EXIF": (file(RGB, "JPEG", quality=95, exif=EXIF), TURNED),
    "RGB JPEG, turned by XMP": (file(RGB, "JPEG", quality=95, xmp=XMP), TURNED),
    "RGB PNG, turned": (file(RGB, "PNG", exif=EXIF), TURNED),
    "RGB TIFF, turned": (file(RGB, "TIFF", exif=EXIF), TURNED),
}  # fmt: skip


def resized(levels, size):
    image = Image.fromarray(np.ascontiguousarray(levels, np.uint8)).convert("RGB")
    return np.asarray(image.resize((size, size), Image.Resampling.BOX)).astype(int).transpose(2, 0, 1)


@pytest.mark.parametrize("name", CASES)
def test_builder_training_and_encode_image_show_the_same_picture(name, tmp_path):
    data, wanted = CASES[name]
    (tmp_path / "picture").write_bytes(data)
    plain, small = check_image(data).data, check_image(data, resize=48).data
    seen = {
        "encode_image of the file": pixels(tmp_path / "picture", 12).numpy(),
        "encode_image of a Pillow image": pixels(Image.open(io.BytesIO(data)), 12).numpy(),
        "evaluation": eval_image(plain, 12),
        "training": train_image(plain, 12, [0, 0, 0, 0.9], crop_min=1.0),
        "evaluation of a resized image": eval_image(small, 12),
        "training on a resized image": train_image(small, 12, [0, 0, 0, 0.9], crop_min=1.0),
    }
    for reader, found in seen.items():
        difference = np.abs(found.astype(int) - resized(wanted, 12))
        # Two filters differ where two colours meet, and by a JPEG's noise.
        assert difference.mean() < 8, reader
        assert np.median(difference) <= 3, reader


@pytest.mark.parametrize(
    "mode", ["RGBa", "La", "PA", "LAB", "HSV", "YCbCr", "RGBX", "I;16B", "I;16L", "I;16N"]
)
def test_modes_that_only_pillow_images_have_become_rgb(mode):
    assert to_rgb(Image.new(mode, (3, 2))).mode == "RGB"
    assert pixels(Image.new(mode, (3, 2)), 4).shape == (3, 4, 4)


def test_twelve_bits_are_scaled_from_twelve():
    image = Image.open(io.BytesIO(file(Image.fromarray(np.full((4, 4), 2048, np.uint16)), "TIFF")))
    image.load()
    image.tag_v2[258] = (12,)
    assert to_rgb(image).getpixel((0, 0)) == (128, 128, 128)


def test_floats_that_are_no_numbers_are_black():
    values = np.array([[np.nan, np.inf], [1.0, -np.inf]], np.float32)
    found = np.asarray(to_rgb(Image.fromarray(values)))[..., 0]
    assert found.tolist() == [[0, 0], [255, 0]]
