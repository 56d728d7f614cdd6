"""What a batch is, how loading is configured, and how worker processes are run."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from d2s.data.config import DataConfig
from d2s.data.damage import add_new, check_budget
from d2s.data.loader_processes import results_of
from d2s.preprocess.text import TextPipeline
from d2s.shards.order import draws
from d2s.shards.read.reader import Record
from d2s.workers.preemption import spare_loader

I64 = NDArray[np.int64]
Captions = Literal["sparse", "dense", "both"]
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


@dataclass(kw_only=True)
class Batch:
    """One worker's part of a global batch; B pairs of an image and a caption."""

    images: torch.Tensor
    """uint8 (B, 3, H, W), H = W = image_size."""
    text_ids: torch.Tensor
    """int64 (B, L): the caption to align, augmented; sparse, or dense where captions is "dense"."""
    text_mask: torch.Tensor
    """bool (B, L), True at real tokens."""
    dense_ids: torch.Tensor | None = None
    """int64 (B, K): the clean dense caption for the teacher, or None."""
    dense_mask: torch.Tensor | None = None
    """bool (B, K)."""
    image_ids: torch.Tensor
    """int64 (B,): captions of images with the same id are never negatives of each other."""
    samples: torch.Tensor
    """int64 (B,): global rows."""
    dense_index: torch.Tensor
    """int64 (B,): number of the dense caption in the whole data set (a teacher cache's row); -1 where none."""
    draw_seeds: torch.Tensor
    """int64 (B,): 64 bits of each sample's own for random draws inside the model."""
    damaged: list[str] = field(default_factory=list)
    """One line for each sample that was replaced."""
    truncated: int = 0
    """Captions that were cut."""

    def __len__(self) -> int:
        return len(self.images)

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return Batch(**{k: function(v) if isinstance(v, torch.Tensor) else v for k, v in values.items()})

    def rows(self, start: int, stop: int) -> "Batch":
        """The pairs start .. stop - 1, as views; what was damaged or cut is told of the whole batch."""
        return self._map(lambda tensor: tensor[start:stop])

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on a device; copies from pinned memory do not block."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """The batch in pinned memory (called by the DataLoader)."""
        return self._map(torch.Tensor.pin_memory)


class BatchMaker:
    """Records and images to a Batch: caption by caption number, augmented, with every draw from its item.

    Args:
        captions: "sparse", "dense", or "both": sparse ones, with a dense one of the same image for the teacher.
        dense_text: with "both", tokenise the dense caption too.
    Raises:
        ValueError: an unknown `captions`.
    """

    def __init__(
        self, config: DataConfig, pipeline: TextPipeline, *, captions: Captions, seed: int, dense_text: bool
    ) -> None:
        if captions not in ("sparse", "dense", "both"):
            raise ValueError(f"captions is {captions!r}: use 'sparse', 'dense' or 'both'")
        self.config, self.pipeline, self.captions = config, pipeline, captions
        self.seed, self.dense_text = seed, dense_text

    def make(
        self,
        records: Sequence[Record],
        images: NDArray[np.uint8],
        items: I64,
        epoch: int,
        *,
        sparse: I64,
        dense: I64,
        samples: I64,
        dense_index: I64,
        damaged: list[str],
    ) -> Batch:
        """Args: images (B, 3, H, W); items (B,), which draw; sparse, dense (B,): caption numbers in the records."""
        config, seed, cut_before = self.config, self.seed, self.pipeline.truncated
        long = [] if self.captions == "sparse" else [r.dense[j] for r, j in zip(records, dense, strict=True)]
        if self.captions != "dense":
            texts, room = [r.sparse[j] for r, j in zip(records, sparse, strict=True)], config.max_words_sparse
        else:
            texts, room = long, config.max_words_dense
            if config.dense == "sentences":
                texts = [some_sentences(t, seed, epoch, i) for t, i in zip(long, items, strict=True)]
        ids, mask = self.pipeline.augment(
            texts, seed, epoch, items, word_augment=config.word_augment, max_length=room
        )
        dense_ids = dense_mask = None
        if self.captions == "both" and self.dense_text:
            dense_ids, dense_mask = self.pipeline.encode(long, config.max_words_dense)
        return Batch(
            images=torch.from_numpy(images),
            text_ids=ids,
            text_mask=mask,
            dense_ids=dense_ids,
            dense_mask=dense_mask,
            image_ids=torch.tensor([record.image_id for record in records], dtype=torch.int64),
            samples=torch.from_numpy(samples.astype(np.int64)),
            dense_index=torch.from_numpy(dense_index.astype(np.int64)),
            draw_seeds=torch.from_numpy(draws.bits(seed, epoch, items, "tokens")[:, 0].astype(np.int64)),
            damaged=damaged,
            truncated=self.pipeline.truncated - cut_before,
        )


def choose(counts: I64, seed: int, epoch: int, items: I64, stream: str) -> I64:
    """One of counts[i] things for each item: int64 (B,) in 0..counts[i]-1."""
    return (draws.uniform(seed, epoch, items, stream)[:, 0] * counts).astype(np.int64)


def some_sentences(text: str, seed: int, epoch: int, item: int) -> str:
    """A random subset, of random size, of a text's sentences, in their order; at least one."""
    sentences = _SENTENCE_END.split(text.strip())
    if len(sentences) == 1:
        return text
    draw = draws.uniform(seed, epoch, [int(item)], "sentences", len(sentences) + 1)[0]
    count = 1 + int(draw[0] * len(sentences))
    return " ".join(sentences[i] for i in np.sort(np.argsort(draw[1:])[:count]))


def budgeted(batches: Iterable[Batch], seen: list[str], budget: int) -> Iterator[Batch]:
    """Passes batches on and adds the damage that they report to `seen`, a line for each sample.

    Raises:
        ValueError: more than `budget` lines.
    """
    for batch in batches:
        add_new(seen, batch.damaged)
        check_budget(seen, budget)
        yield batch


class _Plan:
    """A sampler whose content is set anew for each epoch, so that worker processes live through all of them."""

    def __init__(self) -> None:
        self.items: Sequence[Any] = ()

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)


def unwrap(results: Iterable[Any]) -> Iterator[Any]:
    """Passes results on and raises a ValueError among them.

    A worker process hands a user's mistake over as a value: raised there, it would come out of the DataLoader
    with two tracebacks in its message instead of one line.
    """
    for result in results:
        if isinstance(result, ValueError):
            try:
                raise result
            finally:
                del result  # the error holds this frame: if the frame held the error, neither would go away
        yield result


class _Guarded(Dataset):
    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitem__(self, item: Any) -> Any:
        try:
            return self.dataset[item]
        except ValueError as error:
            return error


class StepLoader:
    """Runs `dataset[item]` for a list of items in worker processes; results come in the list's order.

    An item names a whole batch, so what a batch holds cannot depend on the number of processes.
    """

    def __init__(self, dataset: Dataset, workers: int) -> None:
        self._dataset, self._workers = _Guarded(dataset), workers
        self._plan = _Plan()
        self._loader: DataLoader | None = None

    def run(self, items: Sequence[Any]) -> Iterator[Any]:
        """Yields dataset[item] for each item. A second run ends the first.

        Raises:
            ValueError: what dataset[item] raised; the worker processes are stopped first.
        """
        if not items:
            return
        self._loader = self._loader or self._new_loader()
        self._plan.items = items
        for result in results_of(self._loader):
            if isinstance(result, ValueError):
                # Nothing but this loop holds the processes now, so that they stop as it is left. In a cycle with
                # the error's frames they would wait for the collector, which stops them after ten seconds.
                self._loader = None
            yield from unwrap([result])

    def _new_loader(self) -> DataLoader:
        return DataLoader(
            self._dataset,
            batch_size=None,
            sampler=self._plan,
            num_workers=self._workers,
            persistent_workers=self._workers > 0,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=spare_loader,
        )
