"""Computes the teacher's embeddings of the training split's dense captions once, and stores them in the run folder.

runs/<name>/teacher/dense.f32     the table: float32, one row for each dense caption, in the order of the index
runs/<name>/teacher/teacher.json  describes teacher and data; written last, so that an incomplete table has none
"""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from d2s.common.files import write_json
from d2s.data.eval_batches import eval_texts
from d2s.model import Teacher
from d2s.preprocess.text import TextPipeline
from d2s.shards.read.index import ShardIndex
from d2s.workers.collectives import run_on_all
from d2s.workers.group import Workers


class TeacherTable:
    """The teacher's embeddings of a split's dense captions, in a memory-mapped file.

    first: the number in the data set of the split's first dense caption. width: D, the width of an embedding.
    """

    def __init__(self, path: Path, first: int, width: int) -> None:
        self._table = np.memmap(path, np.float32, mode="r").reshape(-1, width)
        self._first = first

    def rows(self, dense_index: Tensor) -> Tensor:
        """Returns the embeddings of B dense captions, float32 of shape (B, D). dense_index: as in :class:`Batch`."""
        return torch.from_numpy(self._table[dense_index.cpu().numpy() - self._first])


def teacher_table(
    folder: Path,
    teacher: Teacher,
    index: ShardIndex,
    split: str,
    pipeline: TextPipeline,
    workers: Workers,
    *,
    made_from: str,
    poll: Callable[[], None] | None = None,
    batch_size: int = 128,
) -> TeacherTable:
    """Returns the table in `folder`. If there is none, computes and stores it. All workers call this together.
    made_from: identifies teacher and data. A stored table with another value is replaced. poll: a function that is
    called before each batch on all workers. If it raises an error, such as Preempted, no table is stored.
    batch_size: number of captions that a worker embeds at a time. Raises ValueError, on all workers, if the disk is
    full or broken."""
    first, count = int(index.column("dense_start")[index.rows(split).start]), index.total(split, "dense")
    width = teacher.text_encoder.linear.out_features
    path, marker = folder / "dense.f32", folder / "teacher.json"
    description = {"teacher": made_from, "split": split, "captions": count, "width": width}

    def is_stored() -> bool:
        return marker.is_file() and json.loads(marker.read_text(encoding="utf-8")) == description

    def allocate() -> None:
        if workers.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            marker.unlink(missing_ok=True)
            allocate_file(path, count * width * 4)

    def mark_complete() -> None:
        if workers.is_main:
            write_json(marker, description)

    if not run_on_all(is_stored)[0]:  # the first worker decides, because others may see an outdated folder
        _on_disk(allocate, path)
        table = np.memmap(path, np.float32, mode="r+").reshape(count, width)
        with torch.no_grad():
            # Rows of damaged samples stay 0. Training never reads them, because it replaces damaged samples.
            for numbers, _, ids, mask, valid in eval_texts(
                index, split, pipeline, "dense", batch_size, workers.rank, workers.world, skip_damaged=True
            ):
                if poll:
                    poll()
                embeddings = teacher(ids.to(workers.device), mask.to(workers.device)).float().cpu()
                table[numbers[valid].numpy()] = embeddings[valid].numpy()
        _on_disk(table.flush, path)
        _on_disk(mark_complete, path)
    return TeacherTable(path, first, width)


def _on_disk(action: Callable[[], None], path: Path) -> None:
    """Runs `action` on all workers. If `action` fails on any, all workers raise a ValueError about the table."""
    try:
        run_on_all(action)
    except ValueError as error:
        raise ValueError(
            f"the teacher's table {path} could not be written ({error}): make room, or set loss.teacher to 'online'"
        ) from None


def allocate_file(path: Path, size: int) -> None:
    """Creates a file of `size` bytes and reserves the disk space. If space ran out later, SIGBUS would kill the
    process that writes to the memory map. Raises OSError if the disk is full."""
    with open(path, "wb") as file:
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:  # macOS
                file.truncate(size)
        except OSError as error:
            path.unlink()
            raise OSError(error.errno, error.strerror, str(path)) from error
