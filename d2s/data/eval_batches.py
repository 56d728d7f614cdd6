"""Builds evaluation batches. The workers divide the images or captions of a split, and read each exactly once."""

from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from d2s.data.batch import I64
from d2s.data.config import DataConfig
from d2s.data.loader import StepLoader
from d2s.preprocess.images import eval_image
from d2s.preprocess.text import TextPipeline
from d2s.shards.order.permutation import batch_positions
from d2s.shards.read.index import ShardIndex
from d2s.shards.read.records import DamagedSample, ShardReader


class _ImageSteps(Dataset):
    def __init__(self, index: ShardIndex, rows: range, size: int, batch: tuple[int, int, int]) -> None:
        self.rows, self.size, self.batch = rows, size, batch
        self.reader = ShardReader(index)

    def __getitem__(self, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        numbers, valid = _numbers(len(self.rows), step, *self.batch)
        images = np.zeros((len(numbers), 3, self.size, self.size), np.uint8)
        for i, number in enumerate(numbers[valid]):
            row = self.rows[int(number)]
            encoded = self.reader.record(row).image
            try:
                images[i] = eval_image(encoded, self.size)
            except ValueError as error:
                raise self.reader.damaged(row, str(error)) from None
        rows = np.where(valid, numbers + self.rows.start, -1)
        return torch.from_numpy(rows), torch.from_numpy(images), torch.from_numpy(valid)


def _numbers(n: int, step: int, local: int, rank: int, world: int) -> tuple[I64, NDArray[np.bool_]]:
    """Returns the numbers of the images or captions that worker `rank` of `world` reads for its batch `step`.
    n: how many images or captions there are. local: batch size of one worker. Also returns a boolean array, which is
    True if a number is below n. Both arrays have shape (local,)."""
    positions = batch_positions(step, local * world, rank, world)
    numbers = np.arange(positions.start, positions.stop)
    return numbers, numbers < n


def eval_images(
    index: ShardIndex, split: str, config: DataConfig, batch_size: int, rank: int = 0, world: int = 1
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yields this worker's share of the images of a split. Every worker gets the same number of batches.

    Args:
        batch_size: B, the number of images in a batch of one worker.
    Yields:
        Three tensors: rows in the index, int64 of shape (B,); images, uint8 of shape (B, 3, H, W); `valid`, boolean
        of shape (B,). The last batch may be filled up with black images. There `valid` is False and the row is -1.
    Raises:
        ValueError: the split does not exist, or a sample is damaged. Damaged samples are not replaced in evaluation.
    """
    rows = index.rows(split)
    dataset = _ImageSteps(index, rows, config.image_size, (batch_size, rank, world))
    yield from StepLoader(dataset, config.loader_workers).run(range(-(-len(rows) // (batch_size * world))))


def eval_texts(
    index: ShardIndex,
    split: str,
    pipeline: TextPipeline,
    kind: Literal["sparse", "dense"] = "sparse",
    batch_size: int = 256,
    rank: int = 0,
    world: int = 1,
    *,
    skip_damaged: bool = False,
) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yields this worker's share of the captions of a split. Every worker gets the same number of batches.

    Args:
        kind: whether to read sparse or dense captions. batch_size: B, number of captions in a batch of one worker.
        skip_damaged: if a sample is damaged, mark its captions as not valid, instead of raising ValueError.
    Yields:
        Five tensors: caption numbers within the split, and rows of their images in the index, both int64 of shape
        (B,); token ids, int64, and mask, boolean, both of shape (B, L); `valid`, boolean of shape (B,). If `valid` is
        False, the caption is empty, and its number and row are -1.
    Raises:
        ValueError: the split does not exist or has no captions of this kind, or a sample is damaged.
    """
    total, reader = index.total(split, kind), ShardReader(index)
    if total == 0:
        raise ValueError(
            f"split {split!r} of {index.root} has no {kind} captions: evaluate another kind or split"
        )

    def captions_of(row: int) -> tuple[str, ...] | None:
        try:
            return reader.captions(row)[1 + (kind == "dense")]
        except DamagedSample:
            if skip_damaged:
                return None
            raise

    for step in range(-(-total // (batch_size * world))):
        numbers, valid = _numbers(total, step, batch_size, rank, world)
        rows, which = index.pair(split, np.minimum(numbers, total - 1), kind)
        captions = {row: captions_of(row) for row in dict.fromkeys(rows.tolist())}
        valid &= [captions[row] is not None for row in rows.tolist()]
        places = zip(rows.tolist(), which, valid, strict=True)
        ids, mask = pipeline.encode([captions[row][j] if there else "" for row, j, there in places])
        arrays = (np.where(valid, numbers, -1), np.where(valid, rows, -1), valid)
        numbers_, rows_, valid_ = map(torch.from_numpy, arrays)
        yield numbers_, rows_, ids, mask, valid_
