import io

import numpy as np
import pytest
from PIL import Image

from d2s.preprocess.images import decode, eval_image, train_image


def encoded(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def gradient(width, height):
    """Red grows from left to right, green from top to bottom."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width)[None]
    pixels[..., 1] = np.linspace(0, 255, height)[:, None]
    return Image.fromarray(pixels)


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_eval_stretches_the_whole_image_as_pillow_does():
    image = noise(90, 61)
    found = eval_image(encoded(image), 48)
    assert (found.shape, found.dtype) == ((3, 48, 48), np.uint8)
    assert found.flags.c_contiguous
    wanted = np.asarray(image.resize((48, 48), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    assert np.abs(found.astype(int) - wanted).max() <= 1


def test_train_without_crop_and_flip_is_eval():
    data = encoded(noise(90, 61))
    assert (train_image(data, 48, [0.3, 0.4, 0.5, 0.9], crop_min=1.0, flip=0.0) == eval_image(data, 48)).all()


def test_flip_mirrors():
    data = encoded(noise(90, 61))
    plain = train_image(data, 48, [0, 0, 0, 0.9], crop_min=1.0)
    flipped = train_image(data, 48, [0, 0, 0, 0.1], crop_min=1.0)
    assert np.abs(plain[:, :, ::-1].astype(int) - flipped).max() <= 1
    assert (plain != flipped).any()


@pytest.mark.parametrize(
    "draws", [(0.0, 0.0, 0.0), (0.5, 0.999, 0.0), (0.999, 0.5, 0.5), (0.0, 0.999, 0.999)]
)
def test_the_crop_is_where_the_draws_say(draws):
    width, height = 400, 200
    ratio = 0.6 + 0.4 * draws[0]
    found = train_image(encoded(gradient(width, height)), 50, [*draws, 0.9]).astype(float)
    left, top = draws[1] * (1 - ratio) * 255, draws[2] * (1 - ratio) * 255
    assert found[0, 25, 0] == pytest.approx(left, abs=4)
    assert found[0, 25, -1] == pytest.approx(left + ratio * 255, abs=4)
    assert found[1, 0, 25] == pytest.approx(top, abs=4)
    assert found[1, -1, 25] == pytest.approx(top + ratio * 255, abs=4)


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (3, 2)])
def test_tiny_images(size):
    assert train_image(encoded(noise(*size)), 32, [0.0, 0.99, 0.99, 0.1]).shape == (3, 32, 32)
    assert eval_image(encoded(noise(*size)), 32).shape == (3, 32, 32)


def test_large_jpegs_are_decoded_small_but_never_below_the_need():
    data = encoded(gradient(1600, 1200), "JPEG", quality=95)
    assert decode(data).size == (1600, 1200)
    assert decode(data, (150, 150)).size == (200, 150)
    assert decode(data, (151, 151)).size == (400, 300)
    small, whole = eval_image(data, 140), gradient(1600, 1200).resize((140, 140), Image.Resampling.BILINEAR)
    assert np.abs(small.astype(int) - np.asarray(whole).transpose(2, 0, 1)).max() <= 6


def test_other_modes_become_rgb():
    grey = Image.fromarray(np.full((4, 4), 77, np.uint8))
    assert decode(encoded(grey)).getpixel((0, 0)) == (77, 77, 77)
    deep = Image.fromarray(np.full((4, 4), 77 * 256 + 5, np.uint16))
    assert decode(encoded(deep)).getpixel((0, 0)) == (77, 77, 77)
    clear = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    assert decode(encoded(clear)).getpixel((0, 0)) == (255, 255, 255)
    cmyk = Image.new("CMYK", (4, 4), (0, 0, 0, 0))
    assert decode(encoded(cmyk, "JPEG")).getpixel((0, 0)) == (255, 255, 255)
    palette = gradient(8, 8).quantize(16)
    assert decode(encoded(palette)).mode == "RGB"


def test_exif_orientation_is_followed():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    assert decode(encoded(gradient(40, 20), "JPEG", exif=exif)).size == (20, 40)


@pytest.mark.parametrize("options", [{}, {"quality": 60}, {"subsampling": 0}, {"progressive": True}])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_simplejpeg_changes_no_pixel(monkeypatch, options, mode):
    pytest.importorskip("simplejpeg")
    picture = noise(61, 83).resize((131, 97), Image.Resampling.BICUBIC).convert(mode)
    data = encoded(picture, "JPEG", **options)
    draws = [0.3, 0.6, 0.2, 0.1]
    fast = eval_image(data, 64), train_image(data, 64, draws)
    monkeypatch.setattr("d2s.preprocess.images.simplejpeg", None)
    slow = eval_image(data, 64), train_image(data, 64, draws)
    assert all((a == b).all() for a, b in zip(fast, slow, strict=True))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_damage_is_a_value_error_in_one_line(format):
    data = encoded(noise(64, 64), format)
    for bad in (b"", b"no image", data[: len(data) // 2]):
        with pytest.raises(ValueError, match="image cannot be decoded") as error:
            train_image(bad, 32, [0, 0, 0, 0])
        assert "\n" not in str(error.value)
