"""Training batches from tars behind a URL pattern, with the interface of `TrainBatches`."""

import warnings
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from d2s.data.loader import Batch, BatchMaker, Captions, DataConfig, budgeted, choose, unwrap
from d2s.data.loader_processes import results_of
from d2s.preprocess.images import CROP_DRAWS, train_image
from d2s.preprocess.text import TextPipeline
from d2s.shards.order import draws
from d2s.shards.order.permutation import batch_positions, steps_per_epoch
from d2s.shards.read.reader import Record
from d2s.shards.read.stream import DENSE_COLUMNS, SPARSE_COLUMNS, Stream, expand
from d2s.workers.preemption import spare_loader


class StreamBatches:
    """The training batches of one worker, streamed: an epoch is `samples_per_epoch` visits, not the data once.

    Each visit of an image draws one of its captions. Every worker makes samples_per_epoch // batch_size steps,
    whatever the tars hold: a reader that comes to the end of its tars begins again.

    Args:
        urls: a pattern of tars, `https://host/{00000..00099}.tar`, or several joined by `::`.
        samples_per_epoch: visits that make an epoch, over all workers.
        sparse_columns, dense_columns: where captions are looked for, see `Stream`.
        buffer: samples in each reader's shuffle buffer (they are kept encoded).
        config, pipeline, captions, batch_size, seed, rank, world, dense_text: as for `TrainBatches`.
    Attributes:
        damaged: a line for each sample or tar that this worker could not use, each once.
    Raises:
        ValueError: no tars, too large a batch, or (while iterating) too much damage.
    Warns:
        UserWarning: a setting of config that a stream cannot follow.
    """

    def __init__(
        self,
        urls: str,
        config: DataConfig,
        pipeline: TextPipeline,
        *,
        captions: Captions,
        batch_size: int,
        samples_per_epoch: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        dense_text: bool = True,
        sparse_columns: Sequence[str] = SPARSE_COLUMNS,
        dense_columns: Sequence[str] = DENSE_COLUMNS,
        buffer: int = 1000,
    ) -> None:
        tars = expand(urls)
        batch_positions(0, batch_size, rank, world)
        self.steps_per_epoch = steps_per_epoch(samples_per_epoch, batch_size)
        self.batch_size, self.config = batch_size, config
        self.damaged: list[str] = []
        if config.sparse == "all" and captions != "dense":
            warnings.warn("sparse is 'all', but a stream draws one caption a visit: use 'one'", stacklevel=2)
        if config.order == "blocks":
            warnings.warn("order is 'blocks', which has no effect on a stream", stacklevel=2)
        maker = BatchMaker(config, pipeline, captions=captions, seed=seed, dense_text=dense_text)
        self._dataset = _StreamSteps(
            tars, maker, (batch_size, rank, world), buffer, (tuple(sparse_columns), tuple(dense_columns))
        )

    def __len__(self) -> int:
        return self.steps_per_epoch

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Batches of steps start_step .. steps_per_epoch - 1. A later start draws its samples anew.

        Raises:
            ValueError: no usable sample, or more damage than config.damage_budget.
        """
        self._dataset.plan = (epoch, start_step, self.steps_per_epoch)
        loader = DataLoader(
            self._dataset,
            batch_size=None,
            num_workers=self.config.loader_workers,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=spare_loader,
        )
        return budgeted(unwrap(results_of(loader)), self.damaged, self.config.damage_budget)


class _StreamSteps(IterableDataset):
    """Process w of k makes steps w, w + k, ...; the DataLoader takes from the processes in turn."""

    def __init__(
        self,
        tars: list[str],
        maker: BatchMaker,
        batch: tuple[int, int, int],
        buffer: int,
        columns: tuple[tuple[str, ...], tuple[str, ...]],
    ) -> None:
        self.tars, self.maker, self.batch, self.buffer, self.columns = tars, maker, batch, buffer, columns
        self.plan = (0, 0, 0)

    def __iter__(self) -> Iterator[Batch | ValueError]:
        info = get_worker_info()
        process, processes = (info.id, info.num_workers) if info else (0, 1)
        global_batch, rank, world = self.batch
        epoch, start, stop = self.plan
        # A later start is another sequence: going through the skipped samples would cost what they cost.
        stream = Stream(
            self.tars,
            seed=int(draws.bits(self.maker.seed, epoch, [start], "stream")[0, 0]),
            reader=rank * processes + process,
            readers=world * processes,
            buffer=self.buffer,
            budget=self.maker.config.damage_budget,
            sparse_columns=self.columns[0],
            dense_columns=self.columns[1],
        )
        samples = stream.samples(epoch, self._reason)
        for _ in range(start + process, stop, processes):
            try:
                yield self._batch(samples, stream, global_batch // world, epoch)
            except ValueError as error:  # raised where it can be one line: see d2s.data.loader.unwrap
                yield error
                return

    def _reason(self, record: Record) -> str | None:
        """Why a record is of no use, or None."""
        captions = self.maker.captions
        if captions != "dense" and not record.sparse:
            return f"has no sparse caption (looked in {', '.join(self.columns[0])})"
        if captions != "sparse" and not record.dense:
            return f"has no dense caption (looked in {', '.join(self.columns[1])})"
        return None

    def _batch(self, samples: Iterator[tuple[int, Record]], stream: Stream, count: int, epoch: int) -> Batch:
        config, seed = self.maker.config, self.maker.seed
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
        notes, stream.notes = stream.notes, []
        numbers, none = np.array(items, np.int64), np.full(count, -1)
        counts = [
            np.array([len(getattr(record, kind)) for record in records]) for kind in ("sparse", "dense")
        ]
        return self.maker.make(
            records,
            images,
            numbers,
            epoch,
            sparse=choose(counts[0], seed, epoch, numbers, "caption"),
            dense=choose(counts[1], seed, epoch, numbers, "dense"),
            samples=none,
            dense_index=none,
            damaged=notes,
        )
