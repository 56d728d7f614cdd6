"""Builds training batches from tar files at a URL pattern. `StreamBatches` has the interface of `TrainBatches`."""

import warnings
from collections.abc import Iterator

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from d2s.data.batch import Batch, BatchBuilder, draw_one
from d2s.data.damage import count_damage
from d2s.data.loader import new_loader, results_of
from d2s.preprocess.images import CROP_DRAWS, train_image
from d2s.shards.order import draws
from d2s.shards.order.permutation import batch_positions, steps_per_epoch
from d2s.shards.read.records import Record
from d2s.shards.read.stream import DENSE_COLUMNS, SPARSE_COLUMNS, Stream, expand


class StreamBatches:
    """The training batches of one worker, from a stream of tar files.

    An epoch is `samples_per_epoch` images, not one pass over the data. A reader that has read all of its tars starts
    again. An epoch has samples_per_epoch // batch_size training steps. Each visit of an image draws one caption.

    Args:
        urls: a pattern of tars, such as `https://host/{00000..00099}.tar`, or several patterns joined by `::`.
        samples_per_epoch: number of images in an epoch, over all workers.
        builder, batch_size, rank, world: as for `TrainBatches`.
    Attributes:
        damaged: a message about each sample or tar that this worker could not use.
    Raises:
        ValueError: the pattern matches no tars, the batch is too large, or (while iterating) too much is damaged.
    Warns:
        UserWarning: a setting of the builder has no effect on a stream.
    """

    def __init__(
        self,
        urls: str,
        builder: BatchBuilder,
        *,
        batch_size: int,
        samples_per_epoch: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        tars, config = expand(urls), builder.config
        batch_positions(0, batch_size, rank, world)
        self.steps_per_epoch = steps_per_epoch(samples_per_epoch, batch_size)
        self.batch_size, self.config = batch_size, config
        self.damaged: list[str] = []
        if config.sparse == "all" and builder.captions != "dense":
            warnings.warn("sparse is 'all', but a stream draws one caption a visit: use 'one'", stacklevel=2)
        if config.order == "blocks":
            warnings.warn("order is 'blocks', which has no effect on a stream", stacklevel=2)
        self._dataset = _StreamSteps(tars, builder, (batch_size, rank, world))

    def __len__(self) -> int:
        return self.steps_per_epoch

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Yields the batches of training steps start_step .. steps_per_epoch - 1 of an epoch.

        The samples depend on `start_step`: an epoch that is resumed in the middle does not continue the same order.

        Raises:
            ValueError: no sample is usable, or more samples are damaged than config.damage_budget allows.
        """
        self._dataset.steps = (epoch, start_step, self.steps_per_epoch)
        results = results_of(new_loader(self._dataset, self.config.loader_workers))
        return count_damage(results, self.damaged, self.config.damage_budget)


class _StreamSteps(IterableDataset):
    """Yields the batches of `steps`, which is (epoch, first training step, last training step + 1).
    Loader process w of k builds batches w, w + k, w + 2k, ... batch: (global batch size, rank, world)."""

    def __init__(self, tars: list[str], builder: BatchBuilder, batch: tuple[int, int, int]) -> None:
        self.tars, self.builder, self.batch = tars, builder, batch
        self.steps = (0, 0, 0)

    def __iter__(self) -> Iterator[Batch | ValueError]:
        info = get_worker_info()
        process, processes = (info.id, info.num_workers) if info else (0, 1)
        global_batch, rank, world = self.batch
        epoch, start, stop = self.steps
        # Each start step has its own random order. To continue one order, skipped samples would have to be read.
        stream = Stream(
            self.tars,
            seed=int(draws.bits(self.builder.seed, epoch, [start], "stream")[0, 0]),
            reader=rank * processes + process,
            readers=world * processes,
            budget=self.builder.config.damage_budget,
        )
        samples = stream.samples(epoch, self._missing)
        for _ in range(start + process, stop, processes):
            try:
                yield self._batch(samples, stream, global_batch // world, epoch)
            except ValueError as error:  # `results_of` raises it
                yield error
                return

    def _missing(self, record: Record) -> str | None:
        """Returns the reason why a record is unusable, or None if it is usable."""
        captions = self.builder.captions
        if captions != "dense" and not record.sparse:
            return f"has no sparse caption (looked in {', '.join(SPARSE_COLUMNS)})"
        if captions != "sparse" and not record.dense:
            return f"has no dense caption (looked in {', '.join(DENSE_COLUMNS)})"
        return None

    def _batch(self, samples: Iterator[tuple[int, Record]], stream: Stream, count: int, epoch: int) -> Batch:
        config, seed = self.builder.config, self.builder.seed
        images = np.empty((count, 3, config.image_size, config.image_size), np.uint8)
        items: list[int] = []
        records: list[Record] = []
        for item, record in samples:
            crop = draws.uniform(seed, epoch, [item], "crop", CROP_DRAWS)[0]
            try:
                images[len(items)] = train_image(
                    record.image, config.image_size, crop, crop_min=config.crop_min, flip=config.flip
                )
            except ValueError as error:
                stream.note(f"key {record.key}: {error}")
                continue
            items.append(item)
            records.append(record)
            if len(items) == count:
                break
        damaged, stream.notes = stream.notes, []
        numbers = np.array(items, np.int64)
        n_sparse = np.array([len(record.sparse) for record in records])
        return self.builder.build(
            records, images, numbers, epoch,
            sparse=draw_one(n_sparse, seed, epoch, numbers, "caption"),
            samples=np.full(count, -1), dense_start=None, damaged=damaged,
        )  # fmt: skip
