"""Turns an image (path, bytes, array or PIL image) into pixels for the model."""

from os import PathLike
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from d2s.preprocess.images import eval_image

Picture = Image.Image | str | PathLike | bytes | np.ndarray


def pixels(picture: Picture, size: int, name: str = "image") -> Tensor:
    """Loads a picture and stretches it to a square, as evaluation does. Returns uint8 (3, size, size).

    Raises ValueError if the picture cannot be read. The message begins with the path, or else with `name`.
    """
    if isinstance(picture, (str, PathLike)):
        name = f"image {str(picture)!r}"
    try:
        return torch.from_numpy(np.ascontiguousarray(eval_image(_encoded_or_opened(picture), size)))
    except OSError as error:
        raise ValueError(f"{name}: {error.strerror or error}") from error
    except ValueError as error:
        raise ValueError(f"{name}: {str(error).removeprefix('image ')}") from error


def _encoded_or_opened(picture: Picture) -> bytes | Image.Image:
    """Converts a picture to encoded bytes or a PIL image. OSError, or ValueError for a bad type or shape."""
    if isinstance(picture, (str, PathLike)):
        return Path(picture).read_bytes()
    if isinstance(picture, np.ndarray):
        colours = picture.shape[2:]
        if picture.dtype != np.uint8 or picture.ndim not in (2, 3) or colours not in ((), (3,)):
            raise ValueError(f"array {picture.dtype} {picture.shape}: give uint8 (H, W, 3) or (H, W)")
        if picture.size == 0:
            raise ValueError(f"array {picture.shape} has no pixel")
        return Image.fromarray(np.ascontiguousarray(picture))
    if isinstance(picture, Image.Image):
        if min(picture.size) == 0:
            raise ValueError(f"size {picture.size} has no pixel")
        return picture
    if isinstance(picture, bytes):
        return picture
    raise ValueError(f"is a {type(picture).__name__}: give a PIL image, a path, bytes or an array")
