"""The teacher's embeddings of the training split's dense captions: computed once, stored in the run.

runs/<name>/teacher/dense.f32     float32, one row a dense caption of the split, in the index's order
runs/<name>/teacher/teacher.json  what made it: written last, so a half-made table is never used
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
    """Embeddings of the dense captions of one split, memory-mapped.

    rows(dense_index): dense_index (B,) int64 numbers captions as the index does (`dense_start[row] + j`);
    returns (B, D) float32.
    """

    def __init__(self, path: Path, first: int, width: int) -> None:
        self._table = np.memmap(path, np.float32, mode="r").reshape(-1, width)
        self._first = first

    def rows(self, dense_index: Tensor) -> Tensor:
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
    """Opens the stored table, or computes it first, each worker its share.

    made_from: names the teacher (a digest of its weights); a table of another teacher or split is computed anew.
    poll: called before each batch, on all workers alike; may raise, and leaves no table then.
    Raises ValueError, on all workers, where the disk does not take the table.
    """
    first, count = int(index.column("dense_start")[index.rows(split).start]), index.total(split, "dense")
    width = teacher.text_encoder.linear.out_features
    path, marker = folder / "dense.f32", folder / "teacher.json"
    description = {"teacher": made_from, "split": split, "captions": count, "width": width}

    def made_already() -> bool:
        return marker.is_file() and json.loads(marker.read_text(encoding="utf-8")) == description

    def make_room() -> None:
        if workers.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            marker.unlink(missing_ok=True)
            _allocate(path, count * width * 4)

    def mark() -> None:
        if workers.is_main:
            write_json(marker, description)

    if not run_on_all(made_already)[0]:  # the first worker's word: the others may see the folder as it was
        _on_disk(make_room, path)
        table = np.memmap(path, np.float32, mode="r+").reshape(count, width)
        with torch.no_grad():
            # Training replaces a damaged sample by another one, whose row is asked for in its place.
            for numbers, _, ids, mask, valid in eval_texts(
                index, split, pipeline, "dense", batch_size, workers.rank, workers.world, skip_damaged=True
            ):
                if poll:
                    poll()
                made = teacher(ids.to(workers.device), mask.to(workers.device)).float().cpu()
                table[numbers[valid].numpy()] = made[valid].numpy()
        _on_disk(table.flush, path)
        _on_disk(mark, path)
    return TeacherTable(path, first, width)


def _on_disk(action: Callable[[], None], path: Path) -> None:
    try:
        run_on_all(action)
    except ValueError as error:
        raise ValueError(
            f"the teacher's table {path} could not be written ({error}): make room, or set loss.teacher to 'online'"
        ) from None


def _allocate(path: Path, size: int) -> None:
    """A file of `size` bytes that has its room on the disk: a mapping of one without ends in SIGBUS, not an error."""
    with open(path, "wb") as file:
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:  # macOS
                file.truncate(size)
        except OSError as error:
            path.unlink()
            raise OSError(error.errno, error.strerror, str(path)) from error
