"""Builds the training batches from an indexed data set.

An epoch visits items. Items are images, or pairs of an image and a sparse caption. The batch of training step g in
epoch e depends only on (seed, e, g, rank, world). A permutation of the items tells which items are in the batch.
Every random draw depends only on (seed, epoch, item).
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from d2s.data.batch import I64, Batch, BatchBuilder, draw_one
from d2s.data.damage import count_damage
from d2s.data.loader import StepLoader
from d2s.preprocess.images import CROP_DRAWS, train_image
from d2s.shards.order import draws
from d2s.shards.order.permutation import BlockPermutation, Permutation, batch_positions, steps_per_epoch
from d2s.shards.read.index import ShardIndex
from d2s.shards.read.records import DamagedSample, Record, ShardReader

_REPLACEMENTS = 16


class TrainBatches:
    """The training batches of one worker.

    Args:
        index: the index of the data set. split: name of the split to train on.
        builder: builds the batches, and holds their settings.
        batch_size: N, the number of pairs in a global batch; each worker gets N / world pairs.
        rank, world: the rank of this worker, and the number of workers.
    Attributes:
        damaged: a message about each damaged sample that this worker read or that another worker reported.
    Raises:
        ValueError: the split is unknown or empty, an image lacks a required caption, or the batch is too large.
    """

    def __init__(
        self,
        index: ShardIndex,
        split: str,
        builder: BatchBuilder,
        *,
        batch_size: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.items = _Items(index, split, builder)
        batch_positions(0, batch_size, rank, world)  # raises ValueError if world does not divide batch_size
        self.steps_per_epoch = steps_per_epoch(self.items.n, batch_size)
        self.batch_size, self.config = batch_size, builder.config
        self.damaged: list[str] = []
        dataset = _TrainSteps(self.items, builder, (batch_size, rank, world))
        self._loader = StepLoader(dataset, builder.config.loader_workers)

    def __len__(self) -> int:
        return self.steps_per_epoch

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Yields the batches start_step .. steps_per_epoch - 1 of an epoch. The next call ends this iterator.

        Raises:
            ValueError: more samples are damaged than config.damage_budget allows.
        """
        steps = [(epoch, step) for step in range(start_step, self.steps_per_epoch)]
        return count_damage(self._loader.run(steps), self.damaged, self.config.damage_budget)


class _Items:
    """The items that an epoch visits: all images of a split, or all pairs of an image and a sparse caption."""

    def __init__(self, index: ShardIndex, split: str, builder: BatchBuilder) -> None:
        self.index, self.split, self.config, self.seed = index, split, builder.config, builder.seed
        captions = self.captions = builder.captions
        self.rows = index.rows(split)
        self.pairs = captions != "dense" and self.config.sparse == "all"
        needed = ["sparse", "dense"] if captions == "both" else [captions]
        if self.pairs and index.n_sparse_total(split):
            needed.remove("sparse")  # an image without a sparse caption is in no pair
        for kind in needed:
            count, row = index.without(split, kind)
            if count:
                raise ValueError(
                    f"captions is {captions!r} but {count} of {len(self.rows)} images of split {split!r} have no "
                    f"{kind} caption, the first: {index.keys([row])[0]}; build the data set with them or without it"
                )
        self.n = index.n_sparse_total(split) if self.pairs else len(self.rows)

    def order(self, epoch: int) -> Permutation | BlockPermutation:
        """Returns the permutation that maps positions in the epoch to item numbers."""
        if self.config.order == "rows":
            return Permutation(self.n, self.seed, epoch)
        sizes = self.index.shard_sizes(self.split, "sparse" if self.pairs else "rows")
        return BlockPermutation(sizes, self.seed, epoch, self.config.block_shards)

    def rows_and_captions(self, items: I64, epoch: int) -> tuple[I64, I64]:
        """Returns two int64 arrays of shape (B,): for each item, the row of its image in the index, and which of the
        image's sparse captions to use (-1 for none). items: item numbers, of shape (B,)."""
        if self.pairs:
            return self.index.pair(self.split, items)
        rows = items + self.rows.start
        if self.captions == "dense":
            return rows, np.full(len(rows), -1)
        return rows, draw_one(self.index.take("n_sparse", rows), self.seed, epoch, items, "caption")


class _TrainSteps(Dataset):
    """Builds the batch of an (epoch, training step), in a loader process. batch: (global batch size, rank, world)."""

    def __init__(self, items: _Items, builder: BatchBuilder, batch: tuple[int, int, int]) -> None:
        self.items, self.builder, self.batch = items, builder, batch
        self.reader = ShardReader(items.index)
        self._order: tuple[int, Permutation | BlockPermutation] | None = None

    def __getitem__(self, where: tuple[int, int]) -> Batch:
        epoch, step = where
        items, config = self.items, self.builder.config
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, items.order(epoch))
        positions = batch_positions(step, *self.batch)
        numbers = self._order[1](np.arange(positions.start, positions.stop))
        rows, sparse = items.rows_and_captions(numbers, epoch)
        images = np.empty((len(numbers), 3, config.image_size, config.image_size), np.uint8)
        crops = draws.uniform(items.seed, epoch, numbers, "crop", CROP_DRAWS)
        damaged: list[str] = []
        records: list[Record] = []
        for i, item in enumerate(numbers):
            place = (rows[i], sparse[i])
            rows[i], sparse[i], record = self._read(item, place, crops[i], epoch, images[i], damaged)
            records.append(record)
        return self.builder.build(
            records, images, numbers, epoch,
            sparse=sparse, samples=rows, dense_start=items.index.take("dense_start", rows), damaged=damaged,
        )  # fmt: skip

    def _read(
        self,
        item: np.int64,
        place: tuple[int, int],
        crop: NDArray,
        epoch: int,
        out: NDArray,
        damaged: list[str],
    ) -> tuple[int, int, Record]:
        """Reads the sample of `item` and writes its image to `out`. Returns its row, caption number and record.
        place: row of the sample, and which of its sparse captions to use. crop: random numbers for the crop. If the
        sample is damaged, adds a message to `damaged` and reads a random sample instead, drawn with `item` as seed.
        Raises ValueError if 16 samples in succession are damaged."""
        (row, number), replacements = place, None
        for attempt in range(_REPLACEMENTS):
            try:
                return int(row), int(number), self._decode(int(row), crop, out)
            except DamagedSample as error:
                damaged.append(str(error))
            if replacements is None:
                bits = draws.bits(self.items.seed, epoch, [item], "replacement", _REPLACEMENTS)[0]
                replacements = (bits % np.uint64(self.items.n)).astype(np.int64)
            rows, numbers = self.items.rows_and_captions(replacements[attempt : attempt + 1], epoch)
            row, number = rows[0], numbers[0]
        raise ValueError(f"{_REPLACEMENTS} samples one after the other are damaged, the last: {damaged[-1]}")

    def _decode(self, row: int, crop: NDArray, out: NDArray) -> Record:
        """Returns the record of a row, and writes its augmented image to `out`. Raises DamagedSample."""
        config = self.builder.config
        record = self.reader.record(row)
        try:
            out[:] = train_image(
                record.image, config.image_size, crop, crop_min=config.crop_min, flip=config.flip
            )
        except ValueError as error:
            raise self.reader.damaged(row, str(error)) from None
        return record
