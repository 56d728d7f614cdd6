"""Pictures as users have them, to the pixels that the model reads."""

from __future__ import annotations

from io import BytesIO
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

Picture = Image.Image | str | PathLike | bytes | np.ndarray


def _file_bytes(picture: Image.Image | np.ndarray) -> bytes:
    """A picture in memory as a lossless file, so that every picture takes the one path of `d2s.images`."""
    if isinstance(picture, np.ndarray):
        if (
            picture.dtype != np.uint8
            or picture.ndim not in (2, 3)
            or (picture.ndim == 3 and picture.shape[2] != 3)
        ):
            raise ValueError(f"image array {picture.dtype} {picture.shape}: give uint8 (H, W, 3) or (H, W)")
        picture = Image.fromarray(picture)
    buffer = BytesIO()
    picture.convert("RGB").save(buffer, "bmp")
    return buffer.getvalue()


def pixels(picture: Picture, size: int) -> Tensor:
    """uint8 (3, size, size) of a PIL image, a path, the bytes of a file or an array, stretched to the square.

    Raises ValueError naming the file where it cannot be read.
    """
    from d2s.images import eval_image

    if isinstance(picture, (str, PathLike)):
        try:
            data = Path(picture).read_bytes()
        except OSError as error:
            raise ValueError(f"image {str(picture)!r}: {error.strerror}") from error
    elif isinstance(picture, bytes):
        data = picture
    elif isinstance(picture, (Image.Image, np.ndarray)):
        data = _file_bytes(picture)
    else:
        raise ValueError(f"image is a {type(picture).__name__}: give a PIL image, a path, bytes or an array")
    return torch.from_numpy(np.ascontiguousarray(eval_image(data, size)))
