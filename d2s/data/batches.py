"""From an index to batches: training batches by step, evaluation batches that show everything once.

Step g of epoch e is a pure function of (seed, e, g, rank, world): the order names the items, the reader fetches
them, and every random draw derives from (seed, epoch, item). An item is an (image, sparse caption) pair or an
image; its number is what draws.
"""

from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from d2s.data.loader import Batch, BatchMaker, Captions, DataConfig, StepLoader, budgeted, choose
from d2s.preprocess.images import CROP_DRAWS, eval_image, train_image
from d2s.preprocess.text import TextPipeline
from d2s.shards.order import draws
from d2s.shards.order.permutation import BlockPermutation, Permutation, batch_positions, steps_per_epoch
from d2s.shards.read.index import ShardIndex
from d2s.shards.read.reader import DamagedSample, Record, ShardReader

__all__ = ["Batch", "DataConfig", "TrainBatches", "eval_images", "eval_texts"]

I64 = NDArray[np.int64]
_REPLACEMENTS = 16


class TrainBatches:
    """The training batches of one worker.

    Args:
        index: the data set. split: the split to train on.
        config: image, text, order and loading settings.
        pipeline: the text pipeline.
        captions: what to align with the images: "sparse"; "dense"; or "both": sparse captions, with a dense one
            of the same image for the teacher.
        batch_size: the global batch N; each worker gets N / world rows.
        seed: of the order and of all draws.
        rank, world: this worker and the number of workers.
        dense_text: with "both", give the clean dense caption's tokens too; else only its number in the data set
            (for a teacher whose embeddings are stored).
    Attributes:
        damaged: a line for each damaged sample that this worker met or was told of, each once.
    Raises:
        ValueError: an unknown or empty split, images without the captions asked for, or too large a batch.
    """

    def __init__(
        self,
        index: ShardIndex,
        split: str,
        config: DataConfig,
        pipeline: TextPipeline,
        *,
        captions: Captions,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        dense_text: bool = True,
    ) -> None:
        maker = BatchMaker(config, pipeline, captions=captions, seed=seed, dense_text=dense_text)
        self.items = _Items(index, split, config, captions)
        batch_positions(0, batch_size, rank, world)
        self.steps_per_epoch = steps_per_epoch(self.items.n, batch_size)
        self.batch_size, self.config = batch_size, config
        self.damaged: list[str] = []
        dataset = _TrainSteps(self.items, maker, (batch_size, rank, world))
        self._loader = StepLoader(dataset, config.loader_workers)

    def __len__(self) -> int:
        return self.steps_per_epoch

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Batches start_step .. steps_per_epoch - 1 of an epoch. A second call ends the first one's iterator.

        Raises:
            ValueError: more damaged samples than config.damage_budget.
        """
        steps = [(epoch, step) for step in range(start_step, self.steps_per_epoch)]
        return budgeted(self._loader.run(steps), self.damaged, self.config.damage_budget)


class _Items:
    """What an epoch goes through: (image, sparse caption) pairs of a split, or its images."""

    def __init__(self, index: ShardIndex, split: str, config: DataConfig, captions: Captions) -> None:
        self.index, self.split, self.config, self.captions = index, split, config, captions
        self.rows = index.rows(split)
        self.pairs = captions != "dense" and config.sparse == "all"
        needed = {"sparse": ["sparse"], "dense": ["dense"], "both": ["sparse", "dense"]}[captions]
        if self.pairs and index.n_sparse_total(split):
            needed.remove("sparse")  # an image without one is simply in no pair
        for kind in needed:
            count, row = index.without(split, kind)
            if count:
                raise ValueError(
                    f"captions is {captions!r} but {count} of {len(self.rows)} images of split {split!r} have no "
                    f"{kind} caption, the first: {index.keys([row])[0]}; build the data set with them or without it"
                )
        self.n = index.n_sparse_total(split) if self.pairs else len(self.rows)

    def order(self, seed: int, epoch: int) -> Permutation | BlockPermutation:
        if self.config.order == "rows":
            return Permutation(self.n, seed, epoch)
        sizes = self.index.shard_sizes(self.split, "sparse" if self.pairs else "rows")
        return BlockPermutation(sizes, seed, epoch, self.config.block_shards)

    def rows_and_captions(self, items: I64, seed: int, epoch: int) -> tuple[I64, I64]:
        """Global rows and sparse caption numbers (or -1) of items: (B,), (B,)."""
        if self.pairs:
            return self.index.pair(self.split, items)
        rows = items + self.rows.start
        if self.captions == "dense":
            return rows, np.full(len(rows), -1)
        return rows, choose(self.index.take("n_sparse", rows), seed, epoch, items, "caption")


class _TrainSteps(Dataset):
    """Maps (epoch, step) to a Batch. Lives in the worker processes."""

    def __init__(self, items: _Items, maker: BatchMaker, batch: tuple[int, int, int]) -> None:
        self.items, self.maker, self.batch = items, maker, batch
        self.reader = ShardReader(items.index)
        self._order: tuple[int, Permutation | BlockPermutation] | None = None

    def __getitem__(self, where: tuple[int, int]) -> Batch:
        epoch, step = where
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, self.items.order(self.maker.seed, epoch))
        positions = batch_positions(step, *self.batch)
        items = self._order[1](np.arange(positions.start, positions.stop))
        rows, numbers = self.items.rows_and_captions(items, self.maker.seed, epoch)
        config, notes, records = self.items.config, [], []
        images = np.empty((len(items), 3, config.image_size, config.image_size), np.uint8)
        crops = draws.uniform(self.maker.seed, epoch, items, "crop", CROP_DRAWS)
        for i, item in enumerate(items):
            place = (rows[i], numbers[i])
            rows[i], numbers[i], record = self._sample(item, place, crops[i], epoch, images[i], notes)
            records.append(record)
        which = np.full(len(rows), -1)
        dense_index = which
        if self.items.captions != "sparse":
            which = choose(self.items.index.take("n_dense", rows), self.maker.seed, epoch, items, "dense")
            dense_index = self.items.index.take("dense_start", rows) + which
        return self.maker.make(
            records,
            images,
            items,
            epoch,
            sparse=numbers,
            dense=which,
            samples=rows,
            dense_index=dense_index,
            damaged=notes,
        )

    def _sample(
        self,
        item: np.int64,
        place: tuple[int, int],
        crop: NDArray,
        epoch: int,
        out: NDArray,
        notes: list[str],
    ) -> tuple[int, int, Record]:
        """Reads one sample, its image to `out`. A damaged one is replaced by others that `item` draws."""
        config, (row, number), others = self.items.config, place, None
        for attempt in range(_REPLACEMENTS):
            try:
                record = self.reader.record(int(row))
                try:
                    out[:] = train_image(
                        record.image, config.image_size, crop, crop_min=config.crop_min, flip=config.flip
                    )
                except ValueError as error:
                    raise self.reader.damaged(int(row), str(error)) from None
                return int(row), int(number), record
            except DamagedSample as error:
                notes.append(str(error))
            if others is None:
                picks = draws.bits(self.maker.seed, epoch, [item], "replacement", _REPLACEMENTS)[0]
                others = (picks % np.uint64(self.items.n)).astype(np.int64)
            rows, numbers = self.items.rows_and_captions(
                others[attempt : attempt + 1], self.maker.seed, epoch
            )
            row, number = rows[0], numbers[0]
        raise ValueError(f"{_REPLACEMENTS} samples one after the other are damaged, the last: {notes[-1]}")


class _ImageSteps(Dataset):
    def __init__(self, index: ShardIndex, rows: range, size: int, batch: tuple[int, int, int]) -> None:
        self.rows, self.size, self.batch = rows, size, batch
        self.reader = ShardReader(index)

    def __getitem__(self, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        numbers, valid = _slice(len(self.rows), step, *self.batch)
        images = np.zeros((len(numbers), 3, self.size, self.size), np.uint8)
        for i, number in enumerate(numbers[valid]):
            row = self.rows[int(number)]
            try:
                images[i] = eval_image(self.reader.record(row).image, self.size)
            except DamagedSample:
                raise
            except ValueError as error:
                raise self.reader.damaged(row, str(error)) from None
        rows = np.where(valid, numbers + self.rows.start, -1)
        return torch.from_numpy(rows), torch.from_numpy(images), torch.from_numpy(valid)


class _TextSteps(Dataset):
    def __init__(
        self,
        index: ShardIndex,
        split: str,
        pipeline: TextPipeline,
        kind: str,
        room: int | None,
        batch: tuple[int, int, int],
        skip_damaged: bool,
    ) -> None:
        self.index, self.split, self.pipeline, self.kind, self.room = index, split, pipeline, kind, room
        self.batch, self.skip_damaged = batch, skip_damaged
        self.total = index.total(split, kind)
        self.reader = ShardReader(index)

    def _captions(self, row: int) -> tuple[str, ...] | None:
        try:
            return self.reader.captions(row)[1 + (self.kind == "dense")]
        except DamagedSample:
            if self.skip_damaged:
                return None
            raise

    def __getitem__(self, step: int) -> tuple[torch.Tensor, ...]:
        numbers, valid = _slice(self.total, step, *self.batch)
        rows, which = self.index.pair(self.split, np.minimum(numbers, self.total - 1), self.kind)
        texts: list[str] = []
        row_read, captions = -1, None
        for place, (row, j) in enumerate(zip(rows, which, strict=True)):
            if row_read != row:
                row_read, captions = row, self._captions(int(row))
            texts.append("" if captions is None else captions[j])
            valid[place] &= captions is not None
        texts = [text if there else "" for text, there in zip(texts, valid, strict=True)]
        ids, mask = self.pipeline.encode(texts, self.room)
        arrays = (np.where(valid, numbers, -1), np.where(valid, rows, -1), valid)
        numbers_, rows_, valid_ = map(torch.from_numpy, arrays)
        return numbers_, rows_, ids, mask, valid_


def _slice(n: int, step: int, local: int, rank: int, world: int) -> tuple[I64, NDArray[np.bool_]]:
    """Numbers 0..n-1 that a worker handles at a step (local,), and which of them exist (local,)."""
    positions = batch_positions(step, local * world, rank, world)
    numbers = np.arange(positions.start, positions.stop)
    return numbers, numbers < n


def eval_images(
    index: ShardIndex, split: str, config: DataConfig, batch_size: int, rank: int = 0, world: int = 1
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Every image of a split once, over all workers together; each worker makes the same number of steps.

    Args:
        batch_size: rows a worker and step, B.
    Yields:
        Global rows int64 (B,), images uint8 (B, 3, H, W), valid bool (B,): False (row -1, a black image) where
        the split has ended.
    Raises:
        ValueError: no such split, or a damaged sample (an evaluation replaces none).
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
    max_length: int | None = None,
    loader_workers: int = 0,
    skip_damaged: bool = False,
) -> Iterator[tuple[torch.Tensor, ...]]:
    """Every caption of a kind of a split once, over all workers together, clean; equal steps for each worker.

    Args:
        batch_size: captions a worker and step, B. max_length: positions at most, else the pipeline's.
        skip_damaged: mark the captions of a sample that cannot be read as not valid, instead of raising.
    Yields:
        Caption numbers within the split int64 (B,), global image rows int64 (B,), ids int64 (B, L), mask bool
        (B, L), valid bool (B,): False (numbers -1, an empty caption) where the split has ended.
    Raises:
        ValueError: no such split, no captions of this kind in it, or a damaged sample.
    """
    if index.total(split, kind) == 0:
        raise ValueError(
            f"split {split!r} of {index.root} has no {kind} captions: evaluate another kind or split"
        )
    dataset = _TextSteps(index, split, pipeline, kind, max_length, (batch_size, rank, world), skip_damaged)
    yield from StepLoader(dataset, loader_workers).run(range(-(-dataset.total // (batch_size * world))))
